"""Which samples each iteration was trained on, written down as they were read, and read back as one sequence.

    RUN/samples/data_rank_0003.jsonl     what data-parallel rank 3 read, over all starts of the run

Each start writes a line of its own, `{"start": ID, "iteration": …, "data_size": …, "sources": […]}`, and then a line
per finished iteration, `{"start": ID, "iteration": …, "samples": [[k, source, epoch, sample], …]}`, in the order of
reading. k is the sample's number in the run; the rest says where it lies in the data. An iteration whose samples were
passed over (training/bad_iterations.py) has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megatron_ext.data.loader import Loader
from megatron_ext.errors import DataError, TrainingError
from megatron_ext.parallel import groups
from megatron_ext.parallel.groups import Place
from megatron_ext.training.state import TrainState

SAMPLES = "samples"
_FILE = "data_rank_{:04d}.jsonl"


class SamplesLog:
    """Writes this data-parallel rank's file. Every rank holds one and calls it alike; one rank of each writes."""

    def __init__(self, directory: Path, loader: Loader, place: Place, *, enabled: bool) -> None:
        """Take what is read from, and where its record goes; nothing is written before `begin`."""
        self._directory = directory / SAMPLES
        self._loader = loader
        self._place = place
        self._enabled = enabled
        self._writes = enabled and not (place.tensor_rank or place.pipeline_rank or place.context_rank)
        self._start = ""
        self._stream: TextIO | None = None
        self._error: OSError | None = None

    @property
    def path(self) -> Path:
        """This rank's file."""
        return self._directory / _FILE.format(self._place.data_rank)

    @property
    def trouble(self) -> str | None:
        """Why this rank's record is not whole, once it is not: time to stop, and to have `flush` tell it everywhere."""
        return None if self._error is None else f"{self.path}: cannot be written ({self._error.strerror})"

    def begin(self, state: TrainState) -> None:
        """Note that a start goes on from this state. Every rank calls it."""
        if not self._enabled:
            return
        self._start = groups.broadcast_object(uuid.uuid4().hex[:12])
        with groups.together():
            if self._writes:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._stream = self.path.open("a", buffering=1)
                # A line that a crash cut short must not swallow this one.
                self._stream.write("\n")
                self._stream.write(self._line(state, data_size=self._place.data_size, sources=self._sources()))

    def record(self, state: TrainState, *, trained: bool = True) -> None:
        """Write down what the iteration that has just finished was trained on: nothing, where it made no update."""
        if self._stream is None or self._error is not None:
            return
        draws = self._loader.samples.blend
        given = [(k, *draws[k]) for k in self._loader.delivered] if trained else []
        try:
            self._stream.write(self._line(state, samples=given))
        except OSError as error:  # the other ranks are on their way to the next iteration, where Stop tells them
            self._error = error

    def flush(self) -> None:
        """Bring all to the disk. Every rank calls it before a save: what a checkpoint covers is on record.

        Raises:
            TrainingError: a rank could not write; on every rank.
        """
        if not self._enabled:
            return
        with groups.together():
            if self._stream is not None and self._error is None:
                try:
                    os.fsync(self._stream.fileno())
                except OSError as error:
                    self._error = error
            if self._error is not None:
                raise TrainingError(
                    f"{self.trouble}, and log.samples asks for a whole record; nothing was saved since the last "
                    "checkpoint. Make room, or switch it off, and resume."
                )

    def close(self) -> None:
        """Close the file. Harmless when called twice."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # it would try once more to write what could not be written
                self._stream.close()
            self._stream = None

    def _sources(self) -> list[str]:
        return list(self._loader.samples.prefixes)

    def _line(self, state: TrainState, **fields: Any) -> str:
        return json.dumps({"start": self._start, "iteration": state.iteration, **fields}, separators=(",", ":")) + "\n"


class Given(NamedTuple):
    """A sample that an iteration was trained on."""

    k: int
    """Its number in the run."""
    source: str
    """Prefix of the file that it lies in."""
    epoch: int
    """Completed passes over that source."""
    sample: int
    """Sample of that source."""


class Iteration(NamedTuple):
    """What one iteration was trained on, over all data-parallel ranks."""

    iteration: int
    samples: tuple[Given, ...]
    """By k; one that was given twice is there twice."""


class _Record(NamedTuple):
    """One line of a file."""

    start: str
    iteration: int
    fields: dict[str, Any]


def read_history(run: Path) -> list[Iteration]:
    """Put together what a run was trained on, in order, from the files of all its data-parallel ranks.

    What a start did again, after it went back to a checkpoint, replaces what earlier ones had done from there on. The
    number of ranks may differ from start to start. An iteration that not all of its ranks had written down when the run
    was killed is left out if nothing was trained after it.

    Raises:
        DataError: a file is missing or damaged, or lacks an iteration.
    """
    first, *others = _existing_files(run / SAMPLES)
    starts, history = _follow(first)
    lines = [{(r.start, r.iteration): r for r in _read(path) if "samples" in r.fields} for path in others]
    iterations: list[Iteration] = []
    for place, record in enumerate(history):
        start = starts[record.start]
        parts = [record]
        for path, found in zip(others, lines, strict=True):
            if len(parts) == start["data_size"]:
                break
            if (record.start, record.iteration) not in found:
                if place == len(history) - 1:
                    return iterations
                raise DataError(f"{path}: has nothing of iteration {record.iteration}; a part of the record is lost.")
            parts.append(found[record.start, record.iteration])
        if len(parts) != start["data_size"]:
            raise DataError(f"{run / SAMPLES}: {start['data_size']} ranks trained, and {len(parts)} files are there.")
        given = [
            Given(k, start["sources"][source], epoch, sample)
            for part in parts
            for k, source, epoch, sample in part.fields["samples"]
        ]
        iterations.append(Iteration(record.iteration, tuple(sorted(given))))
    return iterations


def _existing_files(directory: Path) -> list[Path]:
    """List the ranks' files, in order and without a gap."""
    found = sorted(directory.glob(_FILE.replace("{:04d}", "*")))
    expected = [directory / _FILE.format(rank) for rank in range(max(len(found), 1))]
    for path in expected:
        if path not in found:
            raise DataError(f"{path}: not there; was the run started with log.samples?")
    return expected


def _follow(path: Path) -> tuple[dict[str, dict[str, Any]], list[_Record]]:
    """Read the first rank's file, which knows every start: the starts, and the iterations that still count."""
    starts: dict[str, dict[str, Any]] = {}
    history: list[_Record] = []
    for record in _read(path):
        begins = "samples" not in record.fields
        standing = record.iteration if begins else record.iteration - 1
        while history and history[-1].iteration > standing:
            history.pop()
        if begins:
            starts[record.start] = record.fields
        elif history and history[-1].iteration != standing:
            raise DataError(f"{path}: iteration {record.iteration} comes after {history[-1].iteration}.")
        else:
            history.append(record)
    return starts, history


def _read(path: Path) -> Iterator[_Record]:
    """Read the lines of a file; one that a crash cut short is left out, be it the last or the last before a start."""
    cut: int | None = None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            fields = json.loads(line)
            record = _Record(fields["start"], int(fields["iteration"]), fields)
        except (ValueError, KeyError, TypeError):
            if cut is not None:
                raise DataError(f"{path}: lines {cut} and {number} are damaged.") from None
            cut = number
            continue
        if cut is not None and "samples" in record.fields:
            raise DataError(f"{path}: line {cut} is damaged.")
        cut = None
        yield record
