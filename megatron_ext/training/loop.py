"""The training loop. Read it from top to bottom: that is all that happens."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Literal, NoReturn

from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.config.tree import Config
from megatron_ext.data.loader import Loader
from megatron_ext.errors import CheckpointError, MegapintsError, TrainingError
from megatron_ext.training.bad_iterations import BadIterations
from megatron_ext.training.evaluate import evaluate
from megatron_ext.training.metrics import Metrics
from megatron_ext.training.replicas import compare_replicas
from megatron_ext.training.samples_log import SamplesLog
from megatron_ext.training.state import StepResult, TrainState, is_due
from megatron_ext.training.step import Machine, gathered_parameters, train_step
from megatron_ext.training.stop import Stop
from megatron_ext.training.stragglers import Stragglers
from megatron_ext.training.watchdog import Watchdog

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that a run consists of, on this rank."""

    config: Config
    machine: Machine
    valid_loader: Loader | None
    checkpoints: Checkpoints
    bad_iterations: BadIterations
    samples_log: SamplesLog
    metrics: Metrics
    stop: Stop
    watchdog: Watchdog
    stragglers: Stragglers


def train(run: Run, state: TrainState) -> str:
    """Train until there is a reason to stop, save, and say the reason. Every rank calls it.

    Raises:
        TrainingError: an iteration was bad, and the run is to stop at it, or replicas differ. Nothing is saved since.
    """
    settings = run.config.train
    if settings.manual_gc_interval is not None:
        gc.disable()  # ranks that collect at different moments wait for each other
    run.metrics.begin(state)
    run.samples_log.begin(state)
    while (reason := run.stop.check(state, run.checkpoints.last_save_seconds)) is None:
        run.watchdog.note(state.iteration + 1, "iteration")
        result = run.bad_iterations.pass_over(state) or train_step(run.machine, state)
        if result.fault is not None and answer_fault(run, state, result) == "went back":
            continue
        state.advance(result)
        run.watchdog.note(state.iteration, "between iterations")
        run.samples_log.record(state, trained=result.updated)
        run.metrics.count(state, result)
        note_saved(run, state)
        if is_due(state, run.config.log.interval):
            run.metrics.log_train(state, result)
        if is_due(state, run.config.reliability.straggler_interval):
            run.metrics.log_stragglers(state, run.stragglers.compare(state.iteration))
        if is_due(state, run.config.reliability.replica_check_interval):
            check_replicas(run, state)
        if run.valid_loader is not None and is_due(state, settings.eval_interval):
            run.watchdog.note(state.iteration, "validation")
            run.metrics.log_eval(state, evaluate(run.machine, run.valid_loader))
        if is_due(state, run.config.checkpoint.save_interval):
            save(run, state)
        if is_due(state, settings.manual_gc_interval):
            gc.collect()
    finish(run, state, reason)
    return reason


def answer_fault(run: Run, state: TrainState, result: StepResult) -> Literal["go on", "went back"]:
    """Do what reliability.bad_iteration_policy says about an iteration that was bad. Every rank calls it.

    Going back only changes memory, so it may come before the record: a run that is killed in between starts from the
    same checkpoint, and finds the same iteration bad again, for the first time.

    Raises:
        TrainingError: the run is to stop at it.
    """
    run.watchdog.note(state.iteration, "rewind")
    try:
        run.bad_iterations.check_allowed(state, result)
        progress = None
        if run.config.reliability.bad_iteration_policy == "rewind":
            run.checkpoints.wait()
            with gathered_parameters(run.machine):
                progress = run.checkpoints.resume()
        bad = run.bad_iterations.record(state, result, back_to=progress)
    except MegapintsError as error:
        end_with(run, state, error)
    if progress is not None:
        state.go_to(progress)
    run.metrics.log_bad_iteration(state, bad)
    return "go on" if progress is None else "went back"


def check_replicas(run: Run, state: TrainState) -> None:
    """Stop where the weights of replicas differ. Every rank calls it.

    Raises:
        TrainingError: they do; on every rank. Nothing is saved since.
    """
    found = compare_replicas(run.machine)
    if found is None:
        return
    if found.difference is not None:
        finding = TrainingError(
            f"iteration {state.iteration}: the weights of replicas differ: {found.difference}. Memory, a device or a "
            "link there is faulty; leave that node out, and start again from the last checkpoint."
        )
        end_with(run, state, finding)
    run.metrics.log_replicas(state, found.checksum)


def end_with(run: Run, state: TrainState, finding: MegapintsError) -> NoReturn:
    """End the run on what was found, once the save before it is whole: it is good, and may still be on its way.

    The finding is told first: that save may take long, or fail for the same reason. Every rank calls it.

    Raises:
        MegapintsError: the finding, whatever becomes of the save.
    """
    first_rank = run.machine.place.rank == 0
    if first_rank:
        _LOG.error("%s", finding)
    run.watchdog.note(state.iteration, "save")
    try:
        run.checkpoints.close()
    except CheckpointError as error:
        if first_rank:
            _LOG.error("%s", error)
    raise finding


def finish(run: Run, state: TrainState, reason: str) -> None:
    """Bring a stopping run to disk: last validation, last checkpoint, last line."""
    run.watchdog.note(state.iteration, "end")
    wants_eval = run.valid_loader is not None and run.config.train.eval_interval is not None
    done = reason.startswith("finished")
    if wants_eval and run.valid_loader is not None and done and not is_due(state, run.config.train.eval_interval):
        run.metrics.log_eval(state, evaluate(run.machine, run.valid_loader))
    if state.iteration not in (0, run.checkpoints.last_saved):  # something was trained since
        save(run, state)
    run.checkpoints.close()
    note_saved(run, state)
    run.metrics.log_stop(state, reason)


def save(run: Run, state: TrainState) -> None:
    """Write a checkpoint of this state, or begin to.

    Raises:
        MegapintsError: it cannot be written, or the record of the samples that it would cover; on every rank.
    """
    run.watchdog.note(state.iteration, "save")
    try:
        run.samples_log.flush()
    except MegapintsError as error:
        end_with(run, state, error)
    with gathered_parameters(run.machine):
        run.checkpoints.save(state.progress())
    run.metrics.restart_clock()
    note_saved(run, state)


def note_saved(run: Run, state: TrainState) -> None:
    """Let a save in the background come a step further, and note what is whole now."""
    for published in run.checkpoints.poll():
        run.stop.note_saved(published.progress.iteration)
        run.metrics.log_checkpoint(state, published)
