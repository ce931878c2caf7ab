"""Encode parts: in this process, or in several that are told which part, and answer that it is done."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from megatron_ext.errors import DataError, MegapintsError
from tools.preprocessing import parts as work
from tools.preprocessing.parts import Part, PartRecord, PartWriter

if TYPE_CHECKING:
    from megatron_ext.data.fast_tokenizer import Encoder
    from megatron_ext.data.tokenizer import Tokenizer
    from tools.preprocessing.batches import Batch
    from tools.preprocessing.encode import Settings
    from tools.preprocessing.inputs import Unit

BATCH_BYTES = 512 << 10
"""Input that is encoded at once: enough to make the cost of a call small, little enough to stay in the cache."""

PUNKT_FILE = "punkt"
"""The sentence model, in the work folder."""

_REPORT_BYTES = 8 << 20
"""Progress that a worker tells at once: the parent is not to wake up, and take a core, for every batch."""

_POLL_SECONDS = 0.5

Report = Callable[[int, int], None]
"""Takes the bytes of input and the documents that are newly done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs besides its parts."""

    settings: Settings
    encoder: str
    """Name of the encoder that was chosen for the run."""
    id_key: str | None
    skip_errors: bool
    folder: Path
    """Where parts go."""


class Loaded(NamedTuple):
    """What is not loaded twice in one process."""

    tokenizer: Tokenizer
    encoder: Encoder


class Failure(NamedTuple):
    """A part that could not be made."""

    number: int
    error: Exception


class Outcome(NamedTuple):
    """What became of some parts."""

    records: list[PartRecord]
    failure: Failure | None


class PartEncoder:
    """Makes parts; loads tokenizer and sentence model once.

    Args:
        job: what to do.
        loaded: the run's tokenizer and encoder, where this process has them already.
    """

    def __init__(self, job: Job, loaded: Loaded | None = None) -> None:
        from megatron_ext.data.tokenizer import Tokenizer
        from tools.preprocessing.encode import DocumentEncoder, Split, rebuild

        self._job = job
        settings = job.settings
        if loaded is None:
            tokenizer = Tokenizer.load(settings.tokenizer)
            loaded = Loaded(tokenizer, rebuild(job.encoder, settings, tokenizer))
        split: Split | None = None
        if settings.split_sentences:
            from tools.preprocessing.sentences import Punkt, SentenceSplitter

            punkt = Punkt.read(job.folder / PUNKT_FILE)
            split = SentenceSplitter(punkt, keep_newlines=settings.keep_newlines).split
        self._encoder = DocumentEncoder(settings, *loaded, split)

    def encode(self, part: Part, report: Report) -> PartRecord:
        """Read a part's input, and write its files.

        Raises:
            DataError: a bad record (unless these are skipped), a damaged file, a full disk.
        """
        job = self._job
        sentences = job.settings.split_sentences
        with PartWriter(job.folder, part.number, num_keys=len(job.settings.keys), sentences=sentences) as writer:
            for unit in part.units:
                for batch in read_batches(job, unit):
                    try:
                        columns = [self._encoder.encode(texts) for texts in batch.texts]
                    except DataError as error:
                        raise DataError(f"{unit.file.path}: {error}") from error
                    writer.add(columns)
                    if batch.bad:
                        writer.skip(batch.bad)
                    report(batch.weight, len(batch.texts[0]))
            return writer.finish()


def read_batches(job: Job, unit: Unit) -> Iterator[Batch]:
    """Read a unit's records.

    Raises:
        DataError: a bad record (unless these are skipped), a damaged file.
    """
    from tools.preprocessing.readers import read_unit

    try:
        for batch in read_unit(unit, keys=job.settings.keys, id_key=job.id_key, batch_bytes=BATCH_BYTES):
            if batch.bad and not job.skip_errors:
                where, problem, _ = batch.bad[0]
                raise DataError(f"{where}: {problem} Mend it, or leave such records out with --on-error skip.")
            yield batch
    except OSError as error:
        raise DataError(f"{unit.file.path}: cannot be read ({error.strerror or error}).") from error


def run_parts(
    job: Job,
    parts: Sequence[Part],
    *,
    pool: Pool | None,
    report: Report,
    stopped: Callable[[], bool],
    loaded: Loaded | None = None,
) -> Outcome:
    """Make parts, on a pool of processes, or in this one.

    After a failure no further part is begun. Of several bad records in parts that are under way the first in
    the input is told.

    Args:
        report: called in this process.
        stopped: asked between parts; true ends the work early.
        loaded: the run's tokenizer and encoder, for the work in this process.
    """
    # Long files that cannot be cut go first, so that none of them is left over when all else is done.
    order = sorted(parts, key=lambda part: (-part.weight if _is_long(part) else 0, part.number))
    if pool is not None:
        return pool.run(job, order, report, stopped)
    records: list[PartRecord] = []
    here: PartEncoder | None = None
    for part in order:
        if stopped():
            break
        try:
            here = here or PartEncoder(job, loaded)
            records.append(here.encode(part, report))
        except (MegapintsError, OSError) as error:
            return Outcome(records, Failure(part.number, error))
    return Outcome(records, None)


def _is_long(part: Part) -> bool:
    return part.weight > 2 * work.PART_BYTES


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    parts: deque[Part]
    """What it was told to make: the first is under way."""


class Pool:
    """Processes that make parts, started at once, so that they load what they need while the run is planned.

    Each has a pipe on which the job and parts go out, and progress, a record or a failure comes back.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: dict[Connection, _Worker] = {}

    def __enter__(self) -> Pool:
        # Spawned, not forked: this process has threads, and a fork of those may hang.
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # it would lift the block below when it starts
        # A child is born with this block, and so is not hit by Ctrl-C before it has said that it leaves that to us.
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            for number in range(self._size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), name=f"encode-{number}", daemon=True)
                process.start()
                theirs.close()  # so that the worker's death ends the pipe
                self._workers[ours] = _Worker(process, ours, deque())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        """Kill what is still at work: a part that is not finished does not count."""
        workers = list(self._workers.values())
        self._workers = {}
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in workers:
            worker.process.join()

    def run(self, job: Job, order: Sequence[Part], report: Report, stopped: Callable[[], bool]) -> Outcome:
        """Hand out parts, collect what comes back, and end the processes."""
        waiting = list(reversed(order))
        outcome = Outcome([], None)
        try:
            for worker in self._workers.values():
                _send(worker, job)
            while True:
                if stopped() or outcome.failure:
                    waiting.clear()
                while waiting and (free := self._free_worker(len(waiting))):
                    self._hand_out(free, waiting.pop())
                if not self._has_to_wait(outcome.failure):
                    return outcome
                busy = [worker.pipe for worker in self._workers.values() if worker.parts]
                for pipe in connection.wait(busy, timeout=_POLL_SECONDS):
                    assert isinstance(pipe, Connection)
                    outcome = self._receive(pipe, outcome, report)
        finally:
            self._end()

    def _has_to_wait(self, failure: Failure | None) -> bool:
        """Say whether a part is under way whose result matters: after a failure, only one before it in the input."""
        parts = [part for worker in self._workers.values() for part in worker.parts]
        return any(failure is None or (part.number < failure.number and not _is_long(part)) for part in parts)

    def _free_worker(self, num_waiting: int) -> _Worker | None:
        """Choose who gets the next part.

        A worker has one more than it works on, so that it need not wait until this process gets a core and answers;
        but not of the last ones, or one worker might have two left where another has none.
        """
        most = 2 if num_waiting > len(self._workers) else 1
        free = [worker for worker in self._workers.values() if len(worker.parts) < most]
        return min(free, key=lambda worker: len(worker.parts), default=None)

    def _hand_out(self, worker: _Worker, part: Part) -> None:
        worker.parts.append(part)
        _send(worker, part)

    def _receive(self, pipe: Connection, outcome: Outcome, report: Report) -> Outcome:
        """Take one message of a worker."""
        worker = self._workers[pipe]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            message = Failure(worker.parts[0].number, _death(worker.process))
        if isinstance(message, tuple) and not isinstance(message, Failure):
            report(*message)
            return outcome
        if isinstance(message, PartRecord):
            worker.parts.popleft()
            outcome.records.append(message)
            return outcome
        del self._workers[pipe]
        pipe.close()
        worker.process.kill()
        worker.process.join()
        assert isinstance(message, Failure), message
        first = outcome.failure is None or message.number < outcome.failure.number
        return outcome._replace(failure=message) if first else outcome


def _send(worker: _Worker, message: Job | Part) -> None:
    with suppress(OSError):  # it is dead, which is seen when its answer is read
        worker.pipe.send(message)


def _death(process: BaseProcess) -> MegapintsError:
    """Say how a worker ended that did not say so itself."""
    process.join(timeout=10)
    code = process.exitcode
    if code is not None and code < 0:
        how = f"was killed ({signal.Signals(-code).name}), most often for want of memory"
    else:
        how = f"ended by itself (exit code {code})"
    return MegapintsError(f"a worker process {how}; run again, with fewer --workers if memory was short.")


class _ProgressPipe:
    """Adds up a worker's progress, and tells the parent of it now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._size = self._documents = 0

    def report(self, size: int, documents: int) -> None:
        """Be a `Report`."""
        self._size += size
        self._documents += documents
        if self._size >= _REPORT_BYTES:
            self.send()

    def send(self) -> None:
        """Tell what has not been told."""
        self._pipe.send((self._size, self._documents))
        self._size = self._documents = 0


def _work(pipe: Connection) -> None:
    """Be a worker: take the job, and make parts until the parent closes the pipe, or is gone."""
    signals = {signal.SIGINT, signal.SIGTERM}
    for number in signals:  # the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    from tools.preprocessing import encode, readers  # noqa: F401 - while the run is planned

    encoder: PartEncoder | None = None
    try:
        job: Job = pipe.recv()
        while True:
            part: Part = pipe.recv()
            progress = _ProgressPipe(pipe)
            try:
                encoder = encoder or PartEncoder(job)
                record = encoder.encode(part, progress.report)
                progress.send()
                pipe.send(record)
            except (MegapintsError, OSError) as error:
                pipe.send(Failure(part.number, error))
            except Exception:  # a fault of ours: the parent shows where
                pipe.send(Failure(part.number, RuntimeError(traceback.format_exc())))
    except (EOFError, OSError):
        return
