#!/usr/bin/env python3
"""Turn JSON Lines text into Megatron's memory-mapped token format.

The input is cut into chunks of whole lines. Workers tokenise chunks and write the ids into part files; the
parent joins the parts in input order, so the output does not depend on the number of workers. Between the
processes go only paths and counts, and at most `4 x workers` chunks are under way, so memory stays small
whatever the size of the input.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.progress import Progress

if TYPE_CHECKING:
    from concurrent.futures import Future

    from megatron_ext.data.indexed import IndexedTotals, IndexedWriter
    from megatron_ext.data.manifest import InputRecord, Manifest
    from megatron_ext.data.tokenizer import Tokenizer

CHUNK_BYTES = 4 << 20
"""Input per task: large enough to hide a task's cost, small enough to keep all workers busy to the end."""

SHOWN_SKIPS = 10
"""Skipped records that are reported one by one; the rest are counted."""

EPILOG = """\
Each input line is a JSON object with a text under every key of --json-keys. For each key the tool writes
  OUTPUT_PREFIX_KEY_document.bin / .idx        token ids and index, in Megatron's format
  OUTPUT_PREFIX_KEY_document.manifest.json     tokenizer, inputs (sha256), counts; written last
and training takes the path without ending:  data.train_data = ["OUTPUT_PREFIX_KEY_document"].

Ids are exactly those of the folder's tokenizer.json: no BOS unless --prepend-bos, and special tokens spelt
out in the text become theirs. Blank lines are no documents. An empty text is an empty document: it holds no
token, not even the end-of-document token, but keeps its place (with --prepend-bos it is BOS and the end, as
in Megatron's own tool).

examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
      --tokenizer tokenizers/pints --append-eod --workers 8
  python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix data/ab \\
      --tokenizer tokenizers/pints --json-keys text title --append-eod --on-error skip
"""


class Settings(NamedTuple):
    """What a worker needs besides its chunk."""

    tokenizer: str
    keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool
    skip_errors: bool


class Chunk(NamedTuple):
    """Some whole lines of an input file."""

    number: int
    path: str
    start: int
    """First byte."""
    end: int
    """Byte after the last."""
    first_line: int
    """Line number of the first line, from 1."""


class ChunkResult(NamedTuple):
    """What a worker reports of a chunk; the ids and lengths are in its part files."""

    chunk: Chunk
    documents: int
    problems: tuple[str, ...]
    """Bad records in order, `file:line: what`: those skipped, or the one that ends the run."""


class Plan(NamedTuple):
    """A checked command line."""

    inputs: tuple[str, ...]
    output_prefix: str
    settings: Settings
    workers: int
    log_interval: int

    def prefix(self, key: str) -> Path:
        """Name the pair of a key."""
        return Path(f"{self.output_prefix}_{key}_document")


class Written(NamedTuple):
    """One finished pair."""

    prefix: Path
    totals: IndexedTotals


def split_into_chunks(paths: Sequence[str], inputs: list[InputRecord]) -> Iterator[Chunk]:
    """Cut files into chunks of whole lines, about `CHUNK_BYTES` each.

    The one pass that finds the line ends also counts lines and hashes the file; each file's record is
    appended to `inputs` once it has been read.
    """
    from megatron_ext.data.manifest import InputRecord

    number = 0
    for path in paths:
        digest = hashlib.sha256()
        start, position, line = 0, 0, 1
        with open(path, "rb") as file:
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
                # A block without a line end is part of a long line, which a later block ends.
                if cut := block.rfind(b"\n") + 1:
                    yield Chunk(number, path, start, position + cut, line)
                    number, start, line = number + 1, position + cut, line + block.count(b"\n")
                position += len(block)
        if start < position:
            yield Chunk(number, path, start, position, line)
            number += 1
        inputs.append(InputRecord(path=path, size=position, sha256=digest.hexdigest()))


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    """Load the tokenizer once per process."""
    from megatron_ext.data.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def part_path(parts: Path, chunk: Chunk, key_number: int, ending: str) -> Path:
    """Name a part file of a chunk and key."""
    return parts / f"{chunk.number:08d}.{key_number}.{ending}"


def encode_chunk(settings: Settings, parts: Path, chunk: Chunk) -> ChunkResult:
    """Tokenise one chunk into part files: per key raw ids (bin), and int32 lengths per document (len)."""
    import numpy as np

    from megatron_ext.data.indexed import token_dtype
    from megatron_ext.data.records import parse_record

    tokenizer = _tokenizer(settings.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    ids: list[list[np.ndarray[Any, np.dtype[Any]]]] = [[] for _ in settings.keys]
    problems: list[str] = []
    for number, line in enumerate(_read_lines(chunk), start=chunk.first_line):
        if not line.strip():
            continue
        try:
            texts = parse_record(line, settings.keys, path=chunk.path, number=number)
        except DataError as error:
            problems.append(str(error))
            if settings.skip_errors:
                continue
            return ChunkResult(chunk, 0, tuple(problems))
        for documents, text in zip(ids, texts, strict=True):
            documents.append(np.array(_encode(tokenizer, text, settings), dtype=dtype))
    for key_number, documents in enumerate(ids):
        lengths = np.array([document.size for document in documents], dtype=np.int32)
        np.concatenate([np.zeros(0, dtype), *documents]).tofile(part_path(parts, chunk, key_number, "bin"))
        lengths.tofile(part_path(parts, chunk, key_number, "len"))
    return ChunkResult(chunk, len(ids[0]), tuple(problems))


def _encode(tokenizer: Tokenizer, text: str, settings: Settings) -> list[int]:
    """Give the ids of one document."""
    # One text at a time keeps the tokenizers library on one core: the workers are the parallelism. Its
    # batch call is about a quarter faster than `encode`, because it keeps no character offsets.
    ids = tokenizer.encode_batch([text])[0]
    if settings.prepend_bos:
        assert tokenizer.bos is not None
        ids.insert(0, tokenizer.bos)
    if settings.append_eod and ids:
        ids.append(tokenizer.eod)
    return ids


def _read_lines(chunk: Chunk) -> list[bytes]:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.end - chunk.start)
    if len(content) != chunk.end - chunk.start:
        raise DataError(f"{chunk.path}: became shorter while it was read; run again when nothing writes to it.")
    return content.split(b"\n")


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it is gone: a pool's workers would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_all(
    chunks: Iterator[Chunk], settings: Settings, parts: Path, workers: int
) -> Generator[ChunkResult, None, None]:
    """Tokenise chunks on several processes; results come in input order, with few chunks under way."""
    if workers == 1:
        yield from (encode_chunk(settings, parts, chunk) for chunk in chunks)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(
        workers,
        # Spawned, not forked: the parent has threads, and a fork of those may hang.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
    )
    pending: deque[Future[ChunkResult]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(encode_chunk, settings, parts, chunk))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise MegapintsError(
            "a worker process was killed, most often for want of memory; run again with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Joiner(NamedTuple):
    """Where the parts come together: one writer per key."""

    parts: Path
    writers: tuple[IndexedWriter, ...]
    skip_errors: bool
    progress: Progress

    def join(self, results: Iterable[ChunkResult]) -> int:
        """Append each chunk's part files to the writers; returns the number of skipped records.

        Raises:
            DataError: the first bad record of the input, unless bad records are to be skipped.
        """
        skipped = 0
        for result in results:
            if result.problems and not self.skip_errors:
                raise DataError(f"{result.problems[0]} Mend it, or leave such records out with --on-error skip.")
            for problem in result.problems[: max(SHOWN_SKIPS - skipped, 0)]:
                self.progress.note(f"skipped: {problem}")
            skipped += len(result.problems)
            self._append(result.chunk)
            self.progress.update(result.chunk.end - result.chunk.start, result.documents)
        if skipped > SHOWN_SKIPS:
            self.progress.note(f"skipped: {skipped - SHOWN_SKIPS:,} more")
        return skipped

    def _append(self, chunk: Chunk) -> None:
        import numpy as np

        for key_number, writer in enumerate(self.writers):
            ids = part_path(self.parts, chunk, key_number, "bin")
            lengths = part_path(self.parts, chunk, key_number, "len")
            writer.add_part(ids, np.fromfile(lengths, dtype=np.int32))
            ids.unlink()
            lengths.unlink()


def preprocess(plan: Plan, stream: TextIO) -> list[Written]:
    """Run the plan; returns the pair written for each key.

    Raises:
        DataError: a bad record (unless skipped) or input file; no output has been touched.
    """
    from megatron_ext.data.indexed import IndexedWriter, token_dtype
    from megatron_ext.data.manifest import write_manifest

    dtype = token_dtype(_tokenizer(plan.settings.tokenizer).vocab_size)
    prefixes = [plan.prefix(key) for key in plan.settings.keys]
    inputs: list[InputRecord] = []
    total_bytes = sum(Path(path).stat().st_size for path in plan.inputs)
    progress = Progress(total_bytes, stream=stream, interval_documents=plan.log_interval)
    aside = Path(plan.output_prefix)
    aside.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix=f"{aside.name}.partial-", dir=aside.parent)
        parts = Path(stack.enter_context(folder))
        writers = tuple(stack.enter_context(IndexedWriter(prefix, dtype=dtype)) for prefix in prefixes)
        results = encode_all(split_into_chunks(plan.inputs, inputs), plan.settings, parts, plan.workers)
        stack.callback(results.close)  # whatever happens, the workers stop before their folder goes
        stack.callback(progress.close)
        skipped = Joiner(parts, writers, plan.settings.skip_errors, progress).join(results)
        written = list(map(Written, prefixes, (writer.publish() for writer in writers)))
    for key, pair in zip(plan.settings.keys, written, strict=True):
        write_manifest(pair.prefix, make_manifest(plan, key, pair.totals, inputs=inputs, skipped=skipped))
    return written


def make_manifest(
    plan: Plan, key: str, totals: IndexedTotals, *, inputs: Sequence[InputRecord], skipped: int
) -> Manifest:
    """Describe the pair of one key."""
    from megatron_ext.data.indexed import token_dtype
    from megatron_ext.data.manifest import Manifest, TokenizerRecord

    settings = plan.settings
    tokenizer = _tokenizer(settings.tokenizer)
    return Manifest(
        tokenizer=TokenizerRecord(
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            folder=settings.tokenizer,
        ),
        options={"json_key": key, "append_eod": settings.append_eod, "prepend_bos": settings.prepend_bos},
        inputs=tuple(inputs),
        skipped_documents=skipped,
        dtype=token_dtype(tokenizer.vocab_size).name,
        **totals._asdict(),
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Turn JSON Lines text into Megatron's memory-mapped token format (.bin and .idx).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines files, joined in this order")
    add("--output-prefix", required=True, metavar="PREFIX", help="path that the outputs' names begin with")
    add("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json and its companions")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to tokenise (default: text)")
    add("--append-eod", action="store_true", help="end every document that is not empty with eos_token")
    add("--prepend-bos", action="store_true", help="begin every document with bos_token")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default 1)")
    add("--log-interval", type=int, default=10000, metavar="N", help="documents per progress line (10000)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="what a bad record does (default fail)")
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the command line against the files that are there.

    Raises:
        DataError: the first thing that is wrong, before anything is written.
    """
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option}: is {getattr(args, name)}, must be at least 1.")
    for path in args.input:
        if not Path(path).is_file():
            raise DataError(f"--input {path}: no such file; give JSON Lines files.")
        if Path(path).suffix in (".gz", ".zst", ".bz2", ".xz", ".parquet"):
            raise DataError(f"--input {path}: is packed; unpack it to JSON Lines first.")
    for key in args.json_keys:
        if "/" in key or args.json_keys.count(key) > 1:
            raise DataError(f"--json-keys {key!r}: must be given once and hold no '/', for files are named after it.")
    if args.prepend_bos and _tokenizer(args.tokenizer).bos is None:
        raise DataError(f"--prepend-bos: {args.tokenizer} names no bos_token; leave the option out.")
    return Plan(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        settings=Settings(
            tokenizer=args.tokenizer,
            keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            prepend_bos=args.prepend_bos,
            skip_errors=args.on_error == "skip",
        ),
        workers=args.workers,
        log_interval=args.log_interval,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    began = time.monotonic()
    try:
        written = preprocess(make_plan(args), sys.stderr)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    for prefix, totals in written:
        print(
            f"{prefix}: {totals.documents:,} documents ({totals.empty_documents:,} empty), "
            f"{totals.tokens:,} tokens, {totals.bin_bytes / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s"
        )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's TERM cleans up as Ctrl-C does
    sys.exit(main())
