"""Why a run was started again and what that cost; and how a start that fails says so. Standard library only.

Both live in RUN/metrics.jsonl: each start writes a `start` row, each end a `stop` row with its reason. A start that was
killed leaves none; then the job, where there is one, may know more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from megatron_ext.durable import write_whole
from megatron_ext.errors import CheckpointError, ConfigError, DataError, LaunchError, MegapintsError
from megatron_ext.parallel.launch import Job, find_job

METRICS = "metrics.jsonl"
UNKNOWN = "ended without a word (killed or crashed)"
_LOG = logging.getLogger(__name__)
_REFUSALS = (ConfigError, LaunchError, DataError, CheckpointError)
_PLACE = ("iteration", "consumed_samples", "consumed_tokens")
_TAIL_BYTES = 1 << 16
_LONGEST_REASON = 500
_FAILED, _BY_KEYBOARD = "failed", "interrupted by the keyboard"
_ASKED_EARLY = "asked by SIGTERM before the first iteration"
_NEXT_SENTENCE = re.compile(r"\.\s+(?=[A-Z])|\.$")


class Restart(NamedTuple):
    """A start of a run that had been started before."""

    number: int
    """1 for the second start."""
    reason: str
    """What ended the start before."""
    lost_seconds: float
    """From the last moment whose work survives until now: iterations that are trained again, queue, start."""
    redone_iterations: int
    """Iterations that are trained again, as far as the rows tell (log.interval)."""

    def __str__(self) -> str:
        again = f"{self.redone_iterations} iterations are trained again; " if self.redone_iterations else ""
        return f"restart {self.number} (after: {self.reason}; {again}{self.lost_seconds:.0f} s lost)"


def find_restart(metrics: Path, *, iteration: int, job: Job, now: float) -> Restart | None:
    """Say what a start that goes on after `iteration` follows; None for a run's first start.

    The pause of a run that had finished, and is made longer now, is no loss.
    """
    starts, survived, start, last = 0, now, {}, {}
    for row in _rows(metrics):
        if row["kind"] == "start":
            starts, start = starts + 1, row
        if row["iteration"] <= iteration and not _is_failure(row):
            survived = row["time"]
        last = row
    if starts == 0:
        return None
    if last["kind"] == "stop":
        reason = str(last.get("reason", ""))
    elif job.previous_end and start.get("job") == job.number:
        reason = job.previous_end
    else:
        reason = UNKNOWN
    until = last["time"] if reason.startswith("finished") else now
    return Restart(starts, reason, max(0.0, until - survived), max(0, last["iteration"] - iteration))


def _is_failure(row: dict[str, Any]) -> bool:
    """Say whether this is the end of a start that saved nothing at it; its time may be long after the work's."""
    return row["kind"] == "stop" and str(row.get("reason", "")).startswith((_FAILED, _BY_KEYBOARD, _ASKED_EARLY))


def _rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """Read the rows that are whole; none where there is no file."""
    if not metrics.exists():
        return
    with metrics.open("rb") as stream:
        for line in stream:
            if (row := _row(line)) is not None:
                yield row


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        whole = isinstance(row["iteration"], int) and isinstance(row["time"], int | float) and "kind" in row
    except (ValueError, TypeError, KeyError):
        return None
    return row if whole else None


@contextlib.contextmanager
def failure_noted(directory: Path, *, rank: int) -> Iterator[None]:
    """Write a `stop` row when the block fails, with why, from rank 0, before anything else is taken down.

    A start that was refused before it wrote anything leaves no row: the directory may be another run's, named by
    mistake. Until the run's Stop takes its signals, SIGTERM is a failure too.

    Any rank may enter; the others do nothing.
    """
    if rank != 0:
        yield
        return
    signal.signal(signal.SIGTERM, _end_early)
    metrics = directory / METRICS
    before = _size(metrics)
    try:
        yield
    except BaseException as error:
        if isinstance(error, _REFUSALS) and _size(metrics) == before:
            with contextlib.suppress(OSError):  # the refusal is what is to be told
                tell_batch_script(reason_of(error), outcome="refused")
        else:
            note_stop(metrics, reason_of(error))
        raise


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


class EndedEarly(SystemExit):
    """SIGTERM came before the run could stop by itself."""


def _end_early(number: int, _: FrameType | None) -> None:
    raise EndedEarly(128 + number)


def reason_of(error: BaseException) -> str:
    """Put what an error says first into one line, as the reason of a `stop` row; what to do stands where it is told."""
    if isinstance(error, EndedEarly):
        return _ASKED_EARLY
    if isinstance(error, KeyboardInterrupt):
        return _BY_KEYBOARD
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = _NEXT_SENTENCE.split(lines[0])[0] if lines else ""
    name = "" if isinstance(error, MegapintsError) and first else f"{type(error).__name__}: "
    return f"{_FAILED}: {name}{first}".rstrip(": ")[:_LONGEST_REASON]


def note_stop(metrics: Path, reason: str) -> None:
    """Append a `stop` row that stands where the last row does, and tell the job's batch script. Rank 0 calls it.

    A disk that takes no more is only warned of.
    """
    try:
        tell_batch_script(reason)
        end_cut_line(metrics)
        row = {"kind": "stop", "reason": reason, **_last_place(metrics), "time": time.time()}
        _LOG.info("stopped after iteration %d: %s", row["iteration"], reason)
        with metrics.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        _LOG.warning("%s: no row about this end could be written (%s)", metrics, error.strerror or error)


def tell_batch_script(reason: str, *, outcome: Literal["failed", "refused"] = "failed") -> None:
    """Turn the job's record into that of a failure: srun may wait for a task that the others cannot end.

    A start that was `refused` would be refused again. Where rank 0 is gone, others call it.

    Raises:
        OSError: it cannot be written.
    """
    record = find_job().record
    if record is not None:
        words = record.read_text().split() if record.exists() else []
        iterations = words[1:4] if len(words) > 3 else ["-"] * 3
        write_whole(record, f"{outcome} {' '.join(iterations)} {reason}\n")


def _last_place(metrics: Path) -> dict[str, int]:
    found = dict.fromkeys(_PLACE, 0)
    if metrics.exists():
        with metrics.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            for line in stream.read().split(b"\n"):
                if (row := _row(line)) is not None:
                    found = {name: row.get(name, 0) for name in _PLACE}
    return found


def end_cut_line(path: Path) -> None:
    """Give a last line that a crash cut short its end, so that the next row starts on a line of its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
