"""The training loop. Read it from top to bottom: that is all that happens."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.config.tree import Config
from megatron_ext.data.loader import Loader
from megatron_ext.errors import TrainingError
from megatron_ext.training.evaluate import evaluate
from megatron_ext.training.metrics import Metrics
from megatron_ext.training.state import TrainState, is_due
from megatron_ext.training.step import Machine, gathered_parameters, train_step
from megatron_ext.training.stop import Stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that a run consists of, on this rank."""

    config: Config
    machine: Machine
    valid_loader: Loader | None
    checkpoints: Checkpoints
    metrics: Metrics
    stop: Stop


def train(run: Run, state: TrainState) -> str:
    """Train until there is a reason to stop, save, and say the reason. Every rank calls it.

    Raises:
        TrainingError: the loss or gradient is not finite. Nothing of that is saved.
    """
    settings = run.config.train
    if settings.manual_gc_interval is not None:
        gc.disable()  # ranks that collect at different moments wait for each other
    run.metrics.begin(state)
    while (reason := run.stop.check(state)) is None:
        try:
            result = train_step(run.machine, state)
        except TrainingError:
            run.checkpoints.close()  # what was saved before is good, and may still be on its way to the disk
            raise
        state.advance(result)
        run.metrics.count(state, result)
        run.checkpoints.poll()
        if is_due(state, run.config.log.interval):
            run.metrics.log_train(state, result)
        if run.valid_loader is not None and is_due(state, settings.eval_interval):
            run.metrics.log_eval(state, evaluate(run.machine, run.valid_loader))
        if is_due(state, run.config.checkpoint.save_interval):
            save(run, state)
        if is_due(state, settings.manual_gc_interval):
            gc.collect()
    finish(run, state, reason)
    return reason


def finish(run: Run, state: TrainState, reason: str) -> None:
    """Bring a stopping run to disk: last validation, last checkpoint, last line."""
    wants_eval = run.valid_loader is not None and run.config.train.eval_interval is not None
    done = reason.startswith("finished")
    if wants_eval and run.valid_loader is not None and done and not is_due(state, run.config.train.eval_interval):
        run.metrics.log_eval(state, evaluate(run.machine, run.valid_loader))
    if state.iteration not in (0, run.checkpoints.last_saved):  # something was trained since
        save(run, state)
    run.checkpoints.close()
    run.metrics.log_stop(state, reason)


def save(run: Run, state: TrainState) -> None:
    """Write a checkpoint of this state, or begin to."""
    with gathered_parameters(run.machine):
        run.checkpoints.save(state.progress())
    run.metrics.log_checkpoint(state)
