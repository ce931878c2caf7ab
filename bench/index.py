#!/usr/bin/env python3
"""Time to the first sample of a large dataset, and time per sample: megatron-core's GPTDataset against ours.

Writes a synthetic index (log-normal document lengths, 1,000 tokens on average) beside a sparse .bin, into a temporary
folder that goes again. Then, A B B A, each turn in a process of its own, with everything imported beforehand:

    mcore   IndexedDataset and GPTDataset (document, sample and shuffle index of one epoch, written to a fresh cache)
    lazy    data.sample_index = "lazy": IndexedFile, the split 99,1, windows, the order

from opening the files to the first sample: CPU and wall seconds, and by how much the process grew at its peak. The
reading of samples is compared on a small dataset that lies in memory, through both implementations' own shuffled
order. Wall time on a shared machine says little; --cold drops the index from the page cache before each turn.

    python bench/index.py --docs 50e6                   # about 1.2 GB of disk, 3 GB of memory, two minutes
    python bench/index.py --docs 1e6 --impl lazy --cold
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import statistics
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

import numpy as np

from bench.interleave import compare

START_BAR, READ_BAR = 50.0, 4.0
"""Ratios to reach: megatron-core's cost over ours, for the first sample and for each further one."""
MEAN_TOKENS = 1000
SEED, VOCAB_SIZE, EOD = 1234, 32064, 2
READ_DOCS = 20_000
_BLOCK = 1_000_000


class Turn(NamedTuple):
    """What one start cost."""

    cpu_seconds: float
    wall_seconds: float
    grown_mib: float
    """Highest memory of the process beyond what it had before, mapped files included."""
    samples: int
    """In one pass."""


def write_pair(prefix: Path, documents: int, *, dense: bool) -> int:
    """Write an index of random document lengths, block by block, and its .bin; returns the tokens.

    Args:
        prefix: path without ending.
        documents: how many, one sequence each.
        dense: fill .bin with random ids; else it is one hole, which takes no space on the disk.
    """
    generator = np.random.default_rng(SEED)
    pointers_at, documents_at = 34 + 4 * documents, 34 + 12 * documents
    tokens = 0
    with prefix.with_suffix(".idx").open("wb") as index, prefix.with_suffix(".bin").open("wb") as ids:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        for first in range(0, documents, _BLOCK):
            count = min(_BLOCK, documents - first)
            lengths = generator.lognormal(np.log(MEAN_TOKENS) - 0.5, 1.0, count).astype("<i4") + 1
            ends = tokens + np.cumsum(lengths, dtype="<i8")
            for place, values in (
                (34 + 4 * first, lengths),
                (pointers_at + 8 * first, 2 * (ends - lengths)),
                (documents_at + 8 * first, np.arange(first, first + count + 1, dtype="<i8")),
            ):
                index.seek(place)
                index.write(values.tobytes())
            if dense:
                ids.write(generator.integers(0, VOCAB_SIZE, int(lengths.sum()), dtype="<u2").tobytes())
            tokens = int(ends[-1])
        ids.truncate(2 * tokens)
        index.flush()
        os.fsync(index.fileno())
    return tokens


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad = VOCAB_SIZE, EOD, -1
    unique_identifiers = {"class": "bench"}  # noqa: RUF012


def open_mcore(prefix: Path, seq_length: int, cache: Path) -> Any:
    """Open all documents as a GPTDataset of one epoch, building its arrays where `cache` has none."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=seq_length, blend=([str(prefix)], None), split="1", path_to_cache=str(cache),
        tokenizer=_Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    indexed = IndexedDataset(str(prefix))
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


def open_lazy(prefix: Path, seq_length: int, cache: Path) -> Any:
    """Open 99 of 100 documents as windows, in their shuffled order; `cache` stays empty."""
    from megatron_ext.data.blend import Samples
    from megatron_ext.data.indexed import IndexedFile
    from megatron_ext.data.sampler import Blend
    from megatron_ext.data.windows import Windows

    file = IndexedFile.open(prefix)
    windows = Windows(file, part=0, shares=(99.0, 1.0), seq_length=seq_length, masked_input=None)
    return Samples([str(prefix)], [windows], Blend([len(windows)], None, seed=SEED, first_computed_pass=0))


OPENERS: dict[str, Callable[[Path, int, Path], Any]] = {"mcore": open_mcore, "lazy": open_lazy}


def _import_all(impl: str) -> None:
    """Import what an implementation needs, and let torch and numpy set themselves up."""
    import torch

    warnings.simplefilter("ignore")  # megatron-core's imports tell that accelerators are absent
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder) / "tiny", 100, dense=True)
        OPENERS[impl](Path(folder) / "tiny", 64, Path(folder))[0]


def _memory_mib(name: str) -> float:
    """Read VmRSS (now) or VmHWM (peak) of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _start(pipe: Connection, impl: str, prefix: Path, seq_length: int, cold: bool) -> None:
    """Be one turn: open the dataset, read the first sample, say what it cost."""
    _import_all(impl)
    if cold:
        with prefix.with_suffix(".idx").open("rb") as index:
            os.posix_fadvise(index.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.TemporaryDirectory(dir=prefix.parent) as cache:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory_mib("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        samples = OPENERS[impl](prefix, seq_length, Path(cache))
        samples[0]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        size = samples.size if impl == "lazy" else len(samples)
        pipe.send(Turn(cpu, wall, _memory_mib("VmHWM") - before, size))


def time_starts(impls: Sequence[str], prefix: Path, *, seq_length: int, rounds: int, cold: bool) -> dict[str, Turn]:
    """Let the implementations take turns; returns the medians of each."""
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[Turn]] = {impl: [] for impl in impls}
    for impl in (*impls, *reversed(impls)) * rounds:
        ours, theirs = context.Pipe()
        process = context.Process(target=_start, args=(theirs, impl, prefix, seq_length, cold))
        process.start()
        theirs.close()
        turn = ours.recv()
        process.join()
        turns[impl].append(turn)
        print(f"  {impl:<6}{turn.cpu_seconds:10.4f} CPU s{turn.wall_seconds:10.4f} s{turn.grown_mib:10,.1f} MiB more")
    return {impl: Turn(*map(statistics.median, zip(*turns[impl], strict=True))) for impl in impls}


def build_reader(impl: str, prefix: Path, seq_length: int, cache: Path) -> Callable[[], None]:
    """Open the small dataset; each call reads the next sample."""
    _import_all(impl)
    samples = OPENERS[impl](prefix, seq_length, cache)
    size = samples.size if impl == "lazy" else len(samples)
    place = 0

    def read() -> None:
        nonlocal place
        samples[place]
        place = (place + 1) % size

    return read


def report_starts(medians: dict[str, Turn]) -> None:
    """Print the cost of the first sample and, of two implementations, their ratio."""
    for impl, turn in medians.items():
        print(
            f"{impl:<6} first of {turn.samples:,.0f} samples after {turn.cpu_seconds:.4f} CPU s, "
            f"{turn.wall_seconds:.4f} s, {turn.grown_mib:,.1f} MiB more"
        )
    if len(medians) == 2:
        ratio = medians["mcore"].cpu_seconds / medians["lazy"].cpu_seconds
        wall = medians["mcore"].wall_seconds / medians["lazy"].wall_seconds
        verdict = "reached" if ratio >= START_BAR else "missed"
        print(f"ratio {ratio:,.0f} in CPU time, {wall:,.0f} in wall time; bar {START_BAR:g}: {verdict}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=float, default=1e6, metavar="N", help="documents (1e6)")
    parser.add_argument("--impl", default="mcore,lazy", help="what to measure (mcore,lazy)")
    parser.add_argument("--seq_length", type=int, default=2048, metavar="N", help="tokens per sample (2048)")
    parser.add_argument("--rounds", type=int, default=1, help="times that A B B A is played (1)")
    parser.add_argument("--read_units", type=int, default=2000, metavar="N", help="samples per turn of reading (2000)")
    parser.add_argument("--read_rounds", type=int, default=5, metavar="N", help="rounds of reading (5)")
    parser.add_argument("--cold", action="store_true", help="drop the index from the page cache before each turn")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    arguments = parser.parse_args()
    arguments.impl = arguments.impl.split(",")
    if not set(arguments.impl) <= set(OPENERS) or len(set(arguments.impl)) != len(arguments.impl):
        parser.error(f"--impl: choose from {', '.join(OPENERS)}, each once")
    return arguments


def main() -> int:
    """Run the comparison and print both costs and their ratios."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="bench_index_", dir=arguments.dir) as name:
        folder = Path(name)
        documents = int(arguments.docs)
        tokens = write_pair(folder / "large", documents, dense=False)
        size = (folder / "large.idx").stat().st_size / 1e6
        temperature = "cold" if arguments.cold else "warm"
        print(f"{documents:,} documents, {tokens:,} tokens; index of {size:,.0f} MB ({temperature}); first sample:")
        report_starts(
            time_starts(
                arguments.impl,
                folder / "large",
                seq_length=arguments.seq_length,
                rounds=arguments.rounds,
                cold=arguments.cold,
            )  # fmt: skip
        )
        if len(arguments.impl) < 2:
            return 0
        write_pair(folder / "small", READ_DOCS, dense=True)
        place = (folder / "small", arguments.seq_length, folder)
        result = compare(
            functools.partial(build_reader, "lazy", *place), functools.partial(build_reader, "mcore", *place),
            rounds=arguments.read_rounds, units=arguments.read_units, warmup=500,
        )  # fmt: skip
    verdict = "reached" if result.ratio >= READ_BAR else "missed"
    print(
        f"a sample of {arguments.seq_length:,} tokens: mcore {1e6 * result.second:.1f} CPU us, "
        f"lazy {1e6 * result.first:.1f}"
    )
    print(
        f"ratio {result.ratio:.1f} (rounds from {result.lowest:.1f} to {result.highest:.1f}); "
        f"bar {READ_BAR:g}: {verdict}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
