"""How much of each source a run reads, and how often. Neither torch nor numpy is needed until files are opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_ext.config import checks, derived
from megatron_ext.config.tree import Config, DataConfig
from megatron_ext.errors import DataError

if TYPE_CHECKING:
    from megatron_ext.data.sampler import Blend

MANY_EPOCHS = 4.0
"""Passes up to which repeated text is nearly as good as new (Muennighoff et al. 2023, arXiv:2305.16264)."""
ALIGNMENT = "<>>>>>"
"""Of the columns of `rows`."""
_UNKNOWN = "?"


class Use(NamedTuple):
    """What a run reads of one source."""

    prefix: str
    samples: int | None
    """In one pass over its training share; None: not known yet."""
    drawn: float | None
    """Samples that the run reads of it; None: not known yet."""

    @property
    def epochs(self) -> float | None:
        """Passes over it."""
        return None if self.samples is None or self.drawn is None else self.drawn / self.samples


def amounts(data: DataConfig, sizes: Sequence[int]) -> tuple[float, ...] | None:
    """Give the proportions in which sources of these sizes are drawn; None: each once, whole."""
    if data.train_weights is None:
        return None
    if data.train_weights_unit == "epochs":
        return tuple(weight * size for weight, size in zip(data.train_weights, sizes, strict=True))
    return data.train_weights


def uses_of(config: Config, prefixes: Sequence[str], blend: Blend) -> list[Use]:
    """Tell what a run reads of each source that it has opened."""
    total = derived.samples_after(config.train, config.train.train_iters)
    return [
        Use(prefix, size, total * share)
        for prefix, size, share in zip(prefixes, blend.sizes, blend.shares(), strict=True)
    ]


def estimate(config: Config) -> list[Use]:
    """Foretell the use of each source from the sizes of the files that are there; opening them tells it exactly."""
    data, total = config.data, derived.samples_after(config.train, config.train.train_iters)
    shares = [1.0] if data.valid_data is not None else [float(share) for share in data.split.split(",")]
    tokens = [_tokens_of(prefix) for prefix in data.train_data]
    sizes = [
        None if count is None else max(0, int(count * shares[0] / sum(shares)) - 1) // config.train.seq_length
        for count in tokens
    ]
    known = [size for size in sizes if size]
    complete = len(known) == len(sizes)
    if not complete and (data.train_weights is None or data.train_weights_unit == "epochs"):
        return [Use(prefix, size or None, None) for prefix, size in zip(data.train_data, sizes, strict=True)]
    parts = amounts(data, known if complete else [1] * len(sizes)) or known
    return [
        Use(prefix, size or None, total * part / sum(parts))
        for prefix, size, part in zip(data.train_data, sizes, parts, strict=True)
    ]


def _tokens_of(prefix: str) -> int | None:
    """Count a file's tokens; None where it is not there or is damaged, which other checks say."""
    if not all(Path(f"{prefix}{ending}").is_file() for ending in (".bin", ".idx")):
        return None
    from megatron_ext.data.indexed import IndexedFile

    try:
        return int(IndexedFile.open(prefix).tokens.size)
    except (DataError, OSError):
        return None


def rows(uses: Sequence[Use], *, seq_length: int) -> list[tuple[str, ...]]:
    """Lay out a table, its head first; all columns but the first are numbers."""
    total = sum(use.drawn or 0.0 for use in uses)
    found: list[tuple[str, ...]] = [("source", "tokens", "samples", "read in the run", "share", "epochs")]
    for use in uses:
        found.append(
            (
                use.prefix,
                _UNKNOWN if use.samples is None else f"{use.samples * seq_length:,}",
                _UNKNOWN if use.samples is None else f"{use.samples:,}",
                _UNKNOWN if use.drawn is None else f"{round(use.drawn) * seq_length:,}",
                _UNKNOWN if use.drawn is None else f"{use.drawn / total:.2%}",
                _UNKNOWN if use.epochs is None else f"{use.epochs:.2f}",
            )
        )
    return found


def warnings(uses: Sequence[Use]) -> list[str]:
    """Name the sources that are read more often than pays."""
    return [
        f"{use.prefix} is read {use.epochs:.1f} times: beyond about {MANY_EPOCHS:g} passes repeated text is worth "
        "much less than new (Muennighoff et al. 2023); add data, lower its weight, or train for fewer iterations."
        for use in uses
        if use.epochs is not None and use.epochs > MANY_EPOCHS
    ]


def problems(config: Config, uses: Sequence[Use]) -> list[str]:
    """Name what contradicts the configuration: passes above data.max_epochs, or epochs that the run does not give."""
    data = config.data
    found = [
        f"data.max_epochs ({data.max_epochs:g}) would be passed: {use.prefix} is read {use.epochs:.2f} times in "
        f"{config.train.train_iters} iterations; train for fewer, or add data."
        for use in uses
        if data.max_epochs is not None and use.epochs is not None and use.epochs > data.max_epochs
    ]
    sizes = [use.samples for use in uses if use.samples is not None]
    if data.train_weights_unit == "epochs" and len(sizes) == len(uses):
        found.extend(checks.plan_problem(config, sum(amounts(data, sizes) or ())))
    return found
