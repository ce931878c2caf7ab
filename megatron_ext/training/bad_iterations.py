"""Loss spikes, and losses and gradients that are not finite: how they are told, and what is remembered of them.

A bad iteration makes no update. Its samples, and with `rewind` those of iterations before it, are written to
RUN/skipped.json before the run goes on, and whenever training comes to them again they are passed over: nothing is
computed, but the iteration counts, and so do its samples. Which samples an iteration has never changes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.checkpoint.save_load import Progress
from megatron_ext.config.tree import Config, ReliabilityConfig
from megatron_ext.data.blend import Samples
from megatron_ext.durable import write_whole
from megatron_ext.errors import DataError, TrainingError
from megatron_ext.optim.schedule import global_batch_size_at, learning_rate
from megatron_ext.parallel import groups
from megatron_ext.training.state import StepResult, TrainState

RECORD = "skipped.json"
_FORMAT = 1
_LOG = logging.getLogger(__name__)


def find_fault(
    loss: float, grad_norm: float, recent_losses: Collection[float], settings: ReliabilityConfig
) -> str | None:
    """Say what is bad about an iteration; None: nothing. Pure, so that ranks and restarts judge alike.

    A loss is a spike when it lies more than spike_deviations standard deviations (of a sample, n - 1) above the mean of
    the last spike_window_iters good ones. Before there are so many, none is.
    """
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {what} is {value}"
    count = len(recent_losses)
    if settings.spike_deviations is None or count < settings.spike_window_iters:
        return None
    mean = math.fsum(recent_losses) / count  # fsum: exact, so in no order of the window another value
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in recent_losses) / (count - 1))
    if loss - mean <= settings.spike_deviations * deviation or deviation == 0:
        return None
    return (
        f"the loss is {loss:.4f}, {(loss - mean) / deviation:.1f} standard deviations above {mean:.4f}, "
        f"the mean of the last {count}"
    )


@dataclass(frozen=True, kw_only=True)
class BadIteration:
    """One that was found bad, and the span that is passed over because of it (iterations from 1, samples from 0)."""

    iteration: int
    reason: str
    policy: Literal["skip", "rewind"]
    first_iteration: int
    last_iteration: int
    first_sample: int
    last_sample: int
    source: str
    """Where the first and the last sample come from."""


class BadIterations:
    """The bad iterations of a run, restarts included. Every rank holds one, and calls it alike."""

    def __init__(self, config: Config, run_dir: Path, samples: Samples) -> None:
        """Read what was recorded before. Every rank calls it.

        Raises:
            DataError: the record is damaged.
        """
        self._config = config
        self._path = run_dir / RECORD
        self._samples = samples
        self._first_rank = groups.where_am_i().rank == 0
        found: list[BadIteration] = []
        with groups.together():
            if self._first_rank:
                found = _read(self._path)
        self._found: list[BadIteration] = groups.broadcast_object(found)

    def pass_over(self, state: TrainState) -> StepResult | None:
        """Leave out the coming iteration where one of its samples lies in a recorded span; None where none does."""
        train, first = self._config.train, state.consumed_samples
        samples = global_batch_size_at(train, first)
        spent = next(
            (bad for bad in self._found if first <= bad.last_sample and bad.first_sample < first + samples), None
        )
        if spent is None:
            return None
        if self._first_rank:
            _LOG.info("iteration %d passed over: found bad at iteration %d (%s)", state.iteration + 1, spent.iteration,
                      spent.reason)  # fmt: skip
        lr = learning_rate(self._config.optimizer, train, first)
        return StepResult(math.nan, math.nan, lr, samples, samples * train.seq_length, updated=False)

    def check_allowed(self, state: TrainState, result: StepResult) -> None:
        """Stop the run where its policy says so, or where it had its share of bad iterations already.

        Raises:
            TrainingError: on every rank.
        """
        settings, number = self._config.reliability, len(self._found) + 1
        if settings.bad_iteration_policy == "stop":
            why, remedy = "", "set reliability.bad_iteration_policy to skip or rewind"
        elif number > settings.max_bad_iterations:
            why = (
                f" It is bad iteration {number} of this run, and reliability.max_bad_iterations is "
                f"{settings.max_bad_iterations} ({self._path} lists those before)."
            )
            remedy = "raise that limit"
        else:
            return
        raise TrainingError(
            f"{self._describe(state, result)}.{why} Nothing was saved since; look at the data there "
            f"(tools/inspect_data.py), lower optimizer.lr, or {remedy}, and resume from the last checkpoint."
        )

    def record(self, state: TrainState, result: StepResult, *, back_to: Progress | None) -> BadIteration:
        """Write a bad iteration down; on the disk when this returns. Every rank calls it.

        Args:
            state: where the run stood before it.
            result: what was found.
            back_to: where the run goes back to; None: it goes on, and only this iteration is passed over.

        Raises:
            TrainingError: it cannot be written; on every rank.
        """
        iteration, last_sample = state.iteration + 1, state.consumed_samples + result.samples - 1
        first_iteration, first_sample = iteration, state.consumed_samples
        if back_to is not None:
            first_iteration = max(back_to.iteration + 1, iteration - self._config.reliability.rewind_skip_iters)
            first_sample = back_to.consumed_samples
            for _ in range(back_to.iteration + 1, first_iteration):
                first_sample += global_batch_size_at(self._config.train, first_sample)
        bad = BadIteration(
            iteration=iteration,
            reason=result.fault or "",
            policy="skip" if back_to is None else "rewind",
            first_iteration=first_iteration,
            last_iteration=iteration,
            first_sample=first_sample,
            last_sample=last_sample,
            source=self._source(first_sample, last_sample),
        )
        self._found.append(bad)
        with groups.together():
            if self._first_rank:
                self._write()
                self._tell(state, result, bad, back_to)
        return bad

    def _write(self) -> None:
        body = {"format": _FORMAT, "bad_iterations": [asdict(bad) for bad in self._found]}
        try:
            write_whole(self._path, json.dumps(body, indent=1) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{self._path}: cannot be written ({error.strerror}), and a bad iteration must be recorded before it "
                "is passed over; make room, and resume from the last checkpoint."
            ) from None

    def _tell(self, state: TrainState, result: StepResult, bad: BadIteration, back_to: Progress | None) -> None:
        limit = self._config.reliability.max_bad_iterations
        if back_to is not None:
            answer = (
                f"went back to iteration {back_to.iteration}; iterations {bad.first_iteration} to "
                f"{bad.last_iteration}, samples {bad.first_sample} to {bad.last_sample}, will be passed over"
            )
        elif self._config.reliability.bad_iteration_policy == "rewind":
            answer = "passed over, without an update; there is no checkpoint yet to go back to"
        else:
            answer = "passed over, without an update"
        _LOG.warning("%s: %s (bad iteration %d of at most %d)", self._describe(state, result), answer,
                     len(self._found), limit)  # fmt: skip

    def _describe(self, state: TrainState, result: StepResult) -> str:
        first, last = state.consumed_samples, state.consumed_samples + result.samples - 1
        return (
            f"iteration {state.iteration + 1}: {result.fault}, on samples {first} to {last} "
            f"(from {self._source(first, last)})"
        )

    def _source(self, first: int, last: int) -> str:
        return f"{self._samples.locate(first)} to {self._samples.locate(last)}"


def _read(path: Path) -> list[BadIteration]:
    try:
        body = json.loads(path.read_text())
        if body["format"] != _FORMAT:
            raise DataError(f"{path}: format {body['format']}, this version reads {_FORMAT}.")
        return [BadIteration(**entry) for entry in body["bad_iterations"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: damaged ({error}); it must list the samples that this run passes over. Put a copy back, or "
            "remove it to train on them again."
        ) from None
