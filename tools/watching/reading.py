"""What a run directory tells of a run: its rows, its restarts, its checkpoints, its log. Standard library only.

Everything here reads; a run that is being written, was killed in the middle of a line, or was written by a
version that reports more kinds of rows, is read as far as it goes. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint import layout
from megatron_ext.errors import CheckpointError, DataError

METRICS = "metrics.jsonl"
Row = dict[str, Any]
# What every row has; the rest is what its kind has to say.
COMMON_FIELDS = ("kind", "iteration", "consumed_samples", "consumed_tokens", "time")
# A session that has one of these is past its beginning.
_UNDER_WAY = ("train", "valid", "checkpoint", "stop")
_LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:(WARNING|ERROR|CRITICAL) )?(.*)")


class LogLine(NamedTuple):
    """One line of log.txt."""

    time: str
    level: str
    """WARNING, ERROR or CRITICAL; empty for all else."""
    message: str


@dataclass(kw_only=True)
class Session:
    """One start of a run, to its end."""

    start: Row
    restart: Row = field(default_factory=dict)
    """What the trainer itself said about this restart; empty where it said nothing."""
    stop: Row | None = None
    last: Row = field(default_factory=dict)
    """The newest row of it."""
    redone_iterations: int = 0
    """Iterations that the session before had logged and this one did again."""
    redone_seconds: float = 0.0
    """Time that the session before had spent on them."""
    down_seconds: float = 0.0
    """From the last sign of the session before to the first row of this one: in the queue, and starting."""
    why: str = ""
    """What ended the session before; empty for the first session."""

    @property
    def lost_seconds(self) -> float:
        """Time that the restart cost: as the trainer says, or what was done again and the time between.

        A run that had finished, and was made longer later, lost nothing.
        """
        said = number(self.restart.get("lost_seconds"))
        if said is not None:
            return said
        return 0.0 if self.why.startswith("finished") else self.redone_seconds + self.down_seconds

    @property
    def seconds(self) -> float:
        return max(0.0, time_of(self.last) - time_of(self.start))


@dataclass(kw_only=True)
class RunRecord:
    """All that is read of one run."""

    folder: Path
    name: str
    rows: list[Row] = field(default_factory=list)
    """Every row, as written."""
    train: list[Row] = field(default_factory=list)
    """Training rows of the run as it went on after its last resume or rewind."""
    valid: list[Row] = field(default_factory=list)
    """Validation rows, likewise."""
    sessions: list[Session] = field(default_factory=list)
    damaged: tuple[int, ...] = ()
    """Lines of metrics.jsonl that are no rows: a crash cut them short."""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def setting(self, section: str, name: str) -> Any:
        """A value of config.toml; None where it is not there or is "none"."""
        table = self.config.get(section)
        value = table.get(name) if isinstance(table, dict) else None
        return None if value == "none" else value

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def restarts(self) -> list[Session]:
        return self.sessions[1:]

    @property
    def last_iteration(self) -> int | None:
        """Where the run stands: its newest row, of whatever kind."""
        return next((iteration_of(row) for row in reversed(self.rows) if "iteration" in row), None)

    @property
    def target(self) -> int | None:
        """Iteration at which it ends."""
        target = self.setting("train", "exit_iters") or self.setting("train", "train_iters")
        return target if isinstance(target, int) else None


class MetricsFile:
    """A metrics.jsonl that may still grow: each `read` parses only what was added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.rows: list[Row] = []
        self.damaged: list[int] = []
        self._offset = self._lines = 0
        self._rest = b""

    def read(self) -> None:
        """Read on; a last line without its end is left for the next time.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it cannot be read.
        """
        with self.path.open("rb") as stream:
            if stream.seek(0, 2) < self._offset:  # another file now
                self._start_over()
            stream.seek(self._offset)
            added = stream.read()
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        for line in lines:
            self._lines += 1
            if line.strip():
                self._take(line)

    def _take(self, line: bytes) -> None:
        row = _row(line)
        if row is None:
            self.damaged.append(self._lines)
        else:
            self.rows.append(row)

    def all_rows(self) -> list[Row]:
        """The rows read, and the last line even though its end is missing, if it is whole all the same."""
        last = _row(self._rest)
        return self.rows if last is None else [*self.rows, last]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def read_rows(path: Path) -> MetricsFile:
    """Read a metrics.jsonl from its beginning.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    metrics = MetricsFile(path)
    try:
        metrics.read()
    except FileNotFoundError:
        raise DataError(f"{path}: not there; RUN must be a run directory or its {METRICS}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    return metrics


def metrics_path(run: Path) -> Path:
    """Find the metrics file of a run directory; a file is taken as it is."""
    return run / METRICS if run.is_dir() else run


def read_run(run: Path) -> RunRecord:
    """Read a run whose metrics there must be.

    Raises:
        DataError: as `read_rows`, or a row is not one of a run.
    """
    path = metrics_path(run)
    return make_record(read_rows(path))


def empty_record(folder: Path) -> RunRecord:
    """Describe a run that has written no metrics yet."""
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=_read_toml(folder / "config.toml"),
        environment=_read_json(folder / "environment.json"),
    )


def make_record(metrics: MetricsFile) -> RunRecord:
    """Bring the rows read so far into order, with the run's description beside them.

    Raises:
        DataError: it is a file of something else, or a training or validation row says no iteration.
    """
    path, rows = metrics.path, metrics.all_rows()
    if metrics.damaged and not rows:
        raise DataError(f"{path}: no line of it is a row of metrics; RUN must be a run directory or its {METRICS}")
    current = current_rows(rows, path)
    return replace(
        empty_record(path.parent),
        rows=rows,
        train=[row for row in current if row["kind"] == "train"],
        valid=[row for row in current if row["kind"] == "valid"],
        sessions=find_sessions(rows),
        damaged=tuple(metrics.damaged),
    )


def current_rows(rows: Sequence[Row], path: Path) -> list[Row]:
    """Keep the train and valid rows of the run as it went on after its last resume or rewind.

    A run that stopped after iteration 20 and resumed from its checkpoint of iteration 10 writes 11 to 20
    again; until it has, its start row tells that the former ones no longer count. Of iterations that a rewind passes
    over there will be none. The row of a validation comes after the training row of the same iteration.
    """
    kept: list[Row] = []
    for index, row in enumerate(rows, start=1):
        if row["kind"] not in ("train", "valid", "start", "rewind"):
            continue
        if not isinstance(row.get("iteration"), int):
            if row["kind"] in ("start", "rewind"):
                continue
            raise DataError(f"{path}: row {index} has no iteration; was it written by pretrain_pints.py?")
        if row["kind"] in ("start", "rewind"):
            while kept and kept[-1]["iteration"] > row["iteration"]:
                kept.pop()
            continue
        while kept and _position(kept[-1]) >= _position(row):
            kept.pop()
        kept.append(row)
    return kept


def _position(row: Row) -> tuple[int, bool]:
    return row["iteration"], row["kind"] == "valid"


def find_sessions(rows: Sequence[Row]) -> list[Session]:
    """Cut the rows at each start, and see what each restart cost."""
    sessions: list[Session] = []
    before: list[Row] = []  # rows of the session that is going on
    announced: Row = {}  # a restart row that came ahead of its start row
    for row in rows:
        if row["kind"] == "restart" and (not sessions or any(other["kind"] in _UNDER_WAY for other in before)):
            announced = row
        elif row["kind"] == "start":
            said: Row = {name: row[name] for name in ("reason", "lost_seconds") if name in row}
            session = Session(start=row, last=row, restart={**announced, **said})
            if sessions:
                _price(session, sessions[-1], before)
            sessions.append(session)
            before, announced = [row], {}
        elif sessions:
            before.append(row)
            sessions[-1].last = row
            if row["kind"] == "stop":
                sessions[-1].stop = row
            elif row["kind"] == "restart":
                sessions[-1].restart = row
                sessions[-1].why = str(row.get("reason") or sessions[-1].why)
    return sessions


def _price(session: Session, earlier: Session, rows: Sequence[Row]) -> None:
    """Work out what came between two sessions, from the rows of the earlier one."""
    resumed, reached = iteration_of(session.start), iteration_of(earlier.last)
    session.redone_iterations = max(0, reached - resumed)
    if session.redone_iterations:
        there = [time_of(row) for row in rows if iteration_of(row) <= resumed]
        session.redone_seconds = max(0.0, time_of(earlier.last) - max(there, default=time_of(earlier.start)))
    session.down_seconds = max(0.0, time_of(session.start) - time_of(earlier.last))
    ended = "ended without a word (killed or crashed)" if earlier.stop is None else str(earlier.stop.get("reason", ""))
    session.why = str(session.restart.get("reason") or ended or "stopped")


def training_seconds(record: RunRecord) -> float:
    """Time spent in iterations, over all sessions, those that were lost again included."""
    total, reached = 0.0, 0
    for row in record.rows:
        if row["kind"] == "train":
            total += (number(row.get("iteration_seconds")) or 0.0) * max(0, iteration_of(row) - reached)
        if row["kind"] in ("train", "start", "rewind"):
            reached = iteration_of(row)
    return total


def read_log(folder: Path, *, last_bytes: int | None = None) -> list[LogLine]:
    """Read log.txt, or only its end; none where there is none. Lines that go on a message join it."""
    try:
        with (folder / "log.txt").open("rb") as stream:
            if last_bytes is not None:
                stream.seek(max(0, stream.seek(0, 2) - last_bytes))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    lines: list[LogLine] = []
    for line in text.splitlines():
        match = _LOG_LINE.match(line)
        if match:
            lines.append(LogLine(match[1], match[2] or "", match[3]))
        elif lines:
            lines[-1] = lines[-1]._replace(message=f"{lines[-1].message}\n{line}")
    return lines


class CheckpointFound(NamedTuple):
    """The newest whole checkpoint of a run."""

    path: Path
    iteration: int
    time: float
    """When it was whole."""
    size: int
    """Bytes of all its files."""


def newest_checkpoint(folder: Path) -> tuple[CheckpointFound | None, tuple[layout.Rejected, ...]]:
    """Find the newest whole checkpoint, and the newer directories that are none."""
    checkpoints = folder / layout.CHECKPOINTS
    try:
        found = layout.find_newest(checkpoints)
        if found.path is None:
            return None, found.rejected
        description = found.path / layout.DESCRIPTION
        files = json.loads(description.read_text()).get("files", {})
        size = sum((found.path / name).stat().st_size for name in files)
        iteration = layout.iteration_of(found.path) or 0
        return CheckpointFound(found.path, iteration, description.stat().st_mtime, size), found.rejected
    except CheckpointError as error:
        return None, (layout.Rejected(checkpoints, str(error)),)
    except (OSError, ValueError):  # a directory was removed or renamed while we looked
        return None, ()


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None: a value that was not finite may be stored as null."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def time_of(row: Row) -> float:
    return number(row.get("time")) or 0.0


def iteration_of(row: Row) -> int:
    """The iteration after which a row was written; 0 where it does not say."""
    iteration = row.get("iteration")
    return iteration if isinstance(iteration, int) else 0


def last_number(rows: Sequence[Row], name: str) -> float | None:
    """The newest row's value of a field."""
    return number(rows[-1].get(name)) if rows else None


def details(row: Row) -> str:
    """What a row says besides its place: `reason asked by SIGTERM, samples 96`."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in COMMON_FIELDS)
