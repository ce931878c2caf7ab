"""How a run stands: one `Status` from what its directory tells, at one moment. Standard library only."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_ext.errors import DataError
from tools.watching.figures import format_bytes, format_duration
from tools.watching.reading import (
    LogLine,
    MetricsFile,
    Row,
    RunRecord,
    details,
    empty_record,
    iteration_of,
    last_number,
    make_record,
    metrics_path,
    newest_checkpoint,
    number,
    read_log,
    time_of,
)

LEAST_STALL_SECONDS = 60.0
STARTING_SECONDS = 900.0
"""A start may take this long (imports, checks, loading a checkpoint) before it counts as stalled."""
RECENT_ROWS = 100
"""Training rows that the trend and the time left are taken from."""
_LOG_BYTES = 65536
_LOG_WARNINGS = 3
_LOG_SETTLES_SECONDS = 30.0
"""Log lines that belong to a row are written within this time of it."""


class Restart(NamedTuple):
    """One time that the run began again."""

    time: float
    iteration: int
    reason: str
    lost_seconds: float
    redone_iterations: int


class Checkpoint(NamedTuple):
    """The newest whole checkpoint."""

    path: str
    iteration: int
    age_seconds: float
    size_bytes: int


@dataclass(kw_only=True)
class Status:
    """How a run stands. None is what its directory does not tell."""

    run: str
    name: str
    state: str = "not started"
    """not started, starting, running, stalled, stopped, failed or finished."""
    reason: str = ""
    """Why it stopped or failed, as it said itself."""
    since: float | None = None
    """When that state began; for a running one, its newest start."""
    iteration: int | None = None
    last_iteration: int | None = None
    """Iteration at which it is to end."""
    consumed_tokens: float | None = None
    consumed_samples: float | None = None
    elapsed_seconds: float | None = None
    """From the first start to the newest row, pauses between restarts included."""
    eta_seconds: float | None = None
    loss: float | None = None
    loss_change: float | None = None
    """Over the recent rows: mean of their last tenth less that of their first."""
    loss_change_iterations: int | None = None
    recent_losses: list[float | None] = field(default_factory=list)
    valid_loss: float | None = None
    valid_iteration: int | None = None
    best_valid_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    iteration_seconds: float | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    peak_memory_gib: float | None = None
    world_size: int | None = None
    device: str | None = None
    restarts: list[Restart] = field(default_factory=list)
    lost_seconds: float = 0.0
    checkpoint: Checkpoint | None = None
    being_saved: str | None = None
    """Directory of a checkpoint that is being written."""
    skipped: list[str] = field(default_factory=list)
    """Spans of samples that were left out, as the run recorded them."""
    rewinds: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def progress(self) -> float | None:
        """Share of the iterations that is done."""
        if self.iteration is None or not self.last_iteration:
            return None
        return min(1.0, self.iteration / self.last_iteration)


class Watched:
    """A run directory that is looked at again and again; only what was added to its metrics is read each time."""

    def __init__(self, run: Path) -> None:
        if not run.exists():
            raise DataError(f"{run}: not there; RUN must be a run directory, which a run makes when it starts")
        path = metrics_path(run)
        self._folder = path.parent
        self._label = str(run)
        self._metrics = MetricsFile(path)

    def look(self, now: float) -> Status:
        """Say how the run stands.

        Raises:
            DataError: the metrics cannot be read, or are something else.
        """
        try:
            self._metrics.read()
        except FileNotFoundError:
            record = empty_record(self._folder)  # not begun yet
        except OSError as error:
            raise DataError(f"{self._metrics.path}: cannot be read ({error.strerror or error})") from None
        else:
            record = make_record(self._metrics)
        return find_status(record, label=self._label, now=now)


def find_status(record: RunRecord, *, label: str, now: float) -> Status:
    """Work out how a run stands at the time `now`."""
    log = read_log(record.folder, last_bytes=_LOG_BYTES)
    status = Status(run=label, name=record.name, last_iteration=record.target)
    _place(status, record, log, now)
    _figures(status, record)
    _restarts(status, record)
    _checkpoints(status, record, now)
    status.eta_seconds = _time_left(status, record, now)
    _warn(status, record, log, now)
    return status


def _place(status: Status, record: RunRecord, log: Sequence[LogLine], now: float) -> None:
    """Say in which state the run is, and since when."""
    logged = _modified(record.folder / "log.txt")
    rows = record.rows
    newest = time_of(rows[-1]) if rows else 0.0
    # The log speaks before the first row of a start does.
    starting = bool(log) and logged > newest + _LOG_SETTLES_SECONDS and not log[-1].message.startswith("stopped ")
    status.iteration = record.last_iteration
    if not rows:
        if log:
            status.state, status.since = "starting" if now - logged <= STARTING_SECONDS else "stalled", logged
        return
    if rows[-1]["kind"] == "stop":
        status.reason = str(rows[-1].get("reason", ""))
        status.state = next((end for end in ("finished", "failed") if status.reason.startswith(end)), "stopped")
        status.reason = status.reason.removeprefix("failed: ")
        status.since = newest
    elif now - newest > _patience(rows):
        status.state, status.since = "stalled", newest
    else:
        status.state = "running"
        status.since = time_of(record.sessions[-1].start) if record.sessions else time_of(rows[0])
    if status.state != "running" and starting and now - logged <= STARTING_SECONDS:
        status.state, status.since, status.reason = "starting", logged, ""


def _patience(rows: Sequence[Row]) -> float:
    """How long to wait for the next row before calling the run stalled."""
    if rows[-1]["kind"] == "start":
        return STARTING_SECONDS
    pauses = [
        time_of(after) - time_of(before)
        for before, after in zip(rows, rows[1:], strict=False)
        if after["kind"] not in ("start", "restart")
    ]
    return max(LEAST_STALL_SECONDS, 3 * max(pauses, default=0.0))


def _figures(status: Status, record: RunRecord) -> None:
    """Take over the newest figures."""
    rows, train, valid = record.rows, record.train, record.valid
    if not rows:
        return
    for name in (
        "loss", "lr", "grad_norm", "iteration_seconds", "tokens_per_second", "tokens_per_second_per_gpu",
        "tflops_per_gpu", "mfu", "peak_memory_gib",
    ):  # fmt: skip
        setattr(status, name, last_number(train, name))
    placed = [row for row in rows if "consumed_tokens" in row]
    status.consumed_tokens = last_number(placed, "consumed_tokens")
    status.consumed_samples = last_number(placed, "consumed_samples")
    status.valid_loss = last_number(valid, "loss")
    status.valid_iteration = iteration_of(valid[-1]) if valid else None
    status.best_valid_loss = min((loss for row in valid if (loss := number(row.get("loss"))) is not None), default=None)
    status.elapsed_seconds = max(0.0, time_of(rows[-1]) - time_of(rows[0]))
    if record.sessions:
        start = record.sessions[-1].start
        status.world_size, status.device = start.get("world_size"), start.get("device")
    recent = train[-RECENT_ROWS:]
    status.recent_losses = [number(row.get("loss")) for row in recent]
    finite = [loss for loss in status.recent_losses if loss is not None]
    if len(finite) >= 10:
        tenth = len(finite) // 10
        status.loss_change = statistics.fmean(finite[-tenth:]) - statistics.fmean(finite[:tenth])
        status.loss_change_iterations = iteration_of(recent[-1]) - iteration_of(recent[0])


def _restarts(status: Status, record: RunRecord) -> None:
    for session in record.restarts:
        status.restarts.append(
            Restart(
                time=time_of(session.start),
                iteration=iteration_of(session.start),
                reason=session.why,
                lost_seconds=session.lost_seconds,
                redone_iterations=session.redone_iterations,
            )
        )
        status.lost_seconds += session.lost_seconds
    for kind, told in (("skip", status.skipped), ("rewind", status.rewinds)):
        told += [f"at iteration {iteration_of(row):,}: {details(row)}" for row in record.of_kind(kind)]


def _checkpoints(status: Status, record: RunRecord, now: float) -> None:
    found, rejected = newest_checkpoint(record.folder)
    if found is not None:
        age = max(0.0, now - found.time)
        status.checkpoint = Checkpoint(str(found.path), found.iteration, age, found.size)
    for path, reason in rejected:
        if path.suffix == ".tmp" and status.state == "running" and status.being_saved is None:
            status.being_saved = path.name
        else:
            status.warnings.append(f"checkpoint {path.name} is not whole: {reason}")


def _time_left(status: Status, record: RunRecord, now: float) -> float | None:
    """Time to the last iteration, at the pace of the recent rows, validations and saves included."""
    if status.state != "running" or status.iteration is None or status.last_iteration is None:
        return None
    begun = time_of(record.sessions[-1].start) if record.sessions else 0.0
    recent = [row for row in record.train[-RECENT_ROWS:] if time_of(row) >= begun]
    if not recent:
        return None
    iterations = iteration_of(recent[-1]) - iteration_of(recent[0])
    pace = (time_of(recent[-1]) - time_of(recent[0])) / iterations if iterations else status.iteration_seconds
    if pace is None:
        return None
    left = (status.last_iteration - iteration_of(recent[-1])) * pace
    return max(0.0, left - max(0.0, now - time_of(recent[-1])))


def _warn(status: Status, record: RunRecord, log: Sequence[LogLine], now: float) -> None:
    """Add what a person should look at, the most pressing first."""
    warnings: list[str] = []
    if status.state == "stalled" and status.since is not None:
        ago = format_duration(now - status.since)
        what = "new metrics" if record.rows else "first iteration"
        warnings.append(f"no {what} for {ago}: it hangs, was killed, or waits to be started again")
    if not (record.rows or record.config or log):
        warnings.append("nothing of a run is in this directory yet")
    loss = record.train[-1].get("loss") if record.train else 0.0
    if number(loss) is None or (isinstance(loss, float) and not math.isfinite(loss)):
        warnings.append(f"the loss is not finite ({loss})")
    starts = [iteration_of(session.start) for session in record.sessions]
    if len(starts) >= 3 and starts[-1] == starts[-2] == starts[-3] and status.iteration == starts[-1]:
        warnings.append(f"the last three starts were all at iteration {starts[-1]:,}: it does not get on")
    interval = record.setting("checkpoint", "save_interval")
    if isinstance(interval, int) and status.iteration is not None and status.state == "running":
        behind = status.iteration - (status.checkpoint.iteration if status.checkpoint else 0)
        if behind > 2 * interval:
            warnings.append(f"no whole checkpoint for {behind:,} iterations; checkpoint.save_interval is {interval:,}")
    if status.checkpoint is not None and status.state in ("running", "starting"):
        free = shutil.disk_usage(record.folder).free
        if free < status.checkpoint.size_bytes:
            needed = format_bytes(status.checkpoint.size_bytes)
            warnings.append(f"only {format_bytes(free)} of disk free; the next checkpoint needs about {needed}")
    if record.damaged:
        lines = ", ".join(map(str, record.damaged[:5])) + (" and more" if len(record.damaged) > 5 else "")
        warnings.append(f"metrics.jsonl: left out, because a crash cut it short: line {lines}")
    spoken = [line for line in log if line.level]
    warnings += [f"log.txt, {line.time}: {line.level} {line.message}" for line in spoken[-_LOG_WARNINGS:]]
    status.warnings = warnings + status.warnings


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
