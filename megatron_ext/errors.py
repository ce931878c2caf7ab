"""Layer 0: the errors that a person can cause and mend.

Each message says where, what it is, what it must be, and what to do. Entry points print the message
alone, without a traceback, and exit with `EXIT_CODE`. A bug of ours stays an `AssertionError` or
whatever Python raises, with its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_CODE = 2


class MegapintsError(Exception):
    """Base of every error that is a person's to mend."""

    everywhere = False
    """It is known to be raised on every rank alike, so one of a node is enough to tell it."""


class ConfigError(MegapintsError):
    """One or more problems of a configuration, all found before anything starts."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # so that it travels between ranks


class LaunchError(MegapintsError):
    """The ranks could not be found, or do not fit the configuration."""


class DataError(MegapintsError):
    """A data file, tokenizer or manifest is missing, damaged, or not the one expected."""


class CheckpointError(MegapintsError):
    """A checkpoint is missing, incomplete, or does not fit the model."""


class LostRankError(MegapintsError):
    """Another rank is gone, so this one cannot go on. Nobody's mistake: the run is to be started again."""


class TrainingError(MegapintsError):
    """Training met a state that it must not train on (NaN, Inf, no samples left)."""
