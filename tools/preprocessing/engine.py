"""A run from inputs to published pairs: plan it, make its parts on all ranks, join them, publish.

Rank 0 plans, joins and speaks; every rank makes its share of the parts. What the parts are, and so every byte of
the output, depends on the inputs and the settings alone.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from typing import NamedTuple, TextIO

from megatron_ext.errors import MegapintsError
from tools.preprocessing.digests import DigestThread, read_digests
from tools.preprocessing.inputs import InputFile
from tools.preprocessing.joiner import Joiner
from tools.preprocessing.parts import PartRecord, WorkFolder
from tools.preprocessing.plan import Planned, Request, Run, make_plan
from tools.preprocessing.publishing import finish_and_publish
from tools.preprocessing.ranks import Ranks, check_folder_is_shared, share_out, together
from tools.preprocessing.workers import Failure, Loaded, Outcome, Pool, run_parts
from tools.progress import Progress

_STOP_FILE = "stop.partial-0"
"""Is there once a rank has failed."""

_AFTER_ALL_PARTS = 1 << 62
"""Number of a failure that is not a part's."""


class Made(NamedTuple):
    """What all ranks have made together."""

    records: dict[int, PartRecord]
    """Of all parts, by number."""
    digests: dict[InputFile, str]


class Means(NamedTuple):
    """What a rank works with."""

    ranks: Ranks
    pool: Pool | None
    """Its workers; None where it does all by itself."""
    loaded: Loaded | None
    """The run's tokenizer and encoder, where it has them already."""


class Interrupted(Exception):
    """The run was told to stop; says what is kept."""


def preprocess(request: Request, ranks: Ranks, stream: TextIO) -> list[str]:
    """Do a run; every rank calls it. Returns a line about each pair.

    Args:
        stream: where rank 0 shows progress.

    Raises:
        DataError: an input, a setting, or the disk; nothing that looks finished has been written.
        MegapintsError: a worker has died.
        Interrupted: by Ctrl-C or a scheduler.
    """
    began = time.monotonic()
    planned: Planned | None = None
    joiner: Joiner | None = None
    with ExitStack() as stack:

        def plan() -> Run:
            nonlocal planned, joiner
            folder = stack.enter_context(WorkFolder(request.output_prefix).claimed(restart=request.restart))
            planned = make_plan(request, folder)
            joiner = stack.enter_context(Joiner(request, planned))
            return planned.run

        def publish() -> list[str]:
            assert planned is not None and joiner is not None
            return finish_and_publish(request, planned, joiner, made.records, made.digests, began=began, stream=stream)

        pool = stack.enter_context(Pool(request.workers)) if request.workers > 1 else None
        run = together(ranks, plan)
        try:
            if ranks.size > 1:
                check_folder_is_shared(ranks, run.job.folder)
            means = Means(ranks, pool, planned.loaded if planned else None)
            made = make_parts(request, run, means, stream)
            return together(ranks, publish)
        except KeyboardInterrupt:
            raise Interrupted(_kept(run) or "nothing is kept.") from None
        except MegapintsError as error:
            raise type(error)(f"{error} {_kept(run)}".rstrip()) from error


def make_parts(request: Request, run: Run, means: Means, stream: TextIO) -> Made:
    """Make this rank's share of the parts, and hash its share of the inputs; every rank calls it.

    Raises:
        MegapintsError: on every rank, the first failure in the order of the input.
    """
    ranks = means.ranks
    try:
        outcome, found = _make_share(request, run, means, stream)
    except (MegapintsError, OSError) as error:  # the other ranks must hear of it, or they would wait for ever
        outcome, found = Outcome([], Failure(_AFTER_ALL_PARTS, error)), {}
    stop_file = run.job.folder / _STOP_FILE
    if outcome.failure and ranks.size > 1:
        with suppress(OSError):  # a full disk; then the others go on to their own ends
            stop_file.touch()
    told = ranks.gather((outcome, found))
    if ranks.rank == 0:
        stop_file.unlink(missing_ok=True)
    failures = [outcome.failure for outcome, _ in told if outcome.failure]
    if failures:
        raise min(failures, key=lambda failure: failure.number).error
    records = {record.number: record for outcome, _ in told for record in outcome.records}
    digests = {file: digest for _, found in told for file, digest in found.items()}
    return Made(run.finished | records, digests)


def _make_share(request: Request, run: Run, means: Means, stream: TextIO) -> tuple[Outcome, dict[InputFile, str]]:
    """Make this rank's parts and hash its files; gives the hashes that it knows."""
    ranks, pool, loaded = means
    share = share_out(run.pending(), lambda part: part.weight, size=ranks.size)[ranks.rank]
    known = read_digests(run.job.folder, run.files)
    unhashed = [file for file in run.files if file not in known]
    to_hash = share_out(unhashed, lambda file: file.size, size=ranks.size)[ranks.rank]
    progress = _progress(request, run, ranks, stream, sum(part.weight for part in share))
    _warn_of_few_cores(request, ranks)
    stopped = (run.job.folder / _STOP_FILE).exists
    digests = DigestThread(to_hash, run.job.folder / f"digests-{ranks.rank}")
    try:
        report = progress.update if progress else lambda size, documents: None
        outcome = run_parts(run.job, share, pool=pool, report=report, stopped=stopped, loaded=loaded)
        if outcome.failure is None and not stopped():
            outcome = _wait(digests, outcome)
    finally:
        digests.stop()
        if progress:
            progress.close()
    return outcome, known | digests.found


def _wait(digests: DigestThread, outcome: Outcome) -> Outcome:
    """Wait for the hashes; what goes wrong with them is told after what goes wrong with parts."""
    try:
        digests.wait()
    except (MegapintsError, OSError) as error:
        return outcome._replace(failure=Failure(_AFTER_ALL_PARTS, error))
    return outcome


def _warn_of_few_cores(request: Request, ranks: Ranks) -> None:
    """Say so where the workers have to share cores: mpiexec binds each rank, and so its workers, to one core or few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if ranks.rank == 0 and request.workers > cores:
        hint = "; mpiexec --bind-to none lets them use all" if ranks.size > 1 else ""
        print(f"note: {request.workers} workers share {cores} cores{hint}", flush=True)


def _progress(request: Request, run: Run, ranks: Ranks, stream: TextIO, share_bytes: int) -> Progress | None:
    """Make rank 0's display: of the whole run if it is alone, of its own share among several."""
    if ranks.rank:
        return None
    done = 0
    if ranks.size == 1:
        done = sum(part.weight for part in run.parts if part.number in run.finished)
    label = f"rank 0 of {ranks.size}: " if ranks.size > 1 else ""
    interval = request.log_interval
    return Progress(share_bytes + done, stream=stream, interval_documents=interval, label=label, done_bytes=done)


def _kept(run: Run) -> str:
    """Say what a run that did not finish leaves for the next."""
    finished = sum(1 for _ in run.job.folder.glob("*.part"))
    if not finished:
        return ""
    kept = f"{finished:,} of {len(run.parts):,} parts are done and kept in {run.job.folder}"
    return f"{kept}: the same command continues from them."
