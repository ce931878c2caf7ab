#!/usr/bin/env python3
"""JSON Lines to .bin/.idx, end to end: tools/preprocess_data.py against Megatron-LM's method and datatrove.

Text is collected from this machine (bench/real_text.py), so no cache has seen it; every run is a process of its own,
from start to end. What counts is CPU time: user and system, of the process and all those it started. The three take
turns A B C C B A on the same documents (--part-mb of them, for the slow ones' sake), and their files must be equal
byte for byte. Rates are MB of input file per CPU second, that is per core.

    compare   the three at one worker; start-up (the same command on one small document) is measured too
    scaling   ours on an input of --scaling-gb, in turns: all of a run with one worker bound to one core (its parent's
              threads, which hash the input and join the output, too); one worker with both cores at hand; and two
              workers on two cores, and then back again. By the clock, so nobody else may use the machine; and by CPU
              times, as if nothing ever waited: two cores then take the start-up, and half of all the rest
    stages    where ours spends its time on all documents, by a profile of a run in one process
    memory    the most memory of all processes together (PSS) on an input of --memory-gb at 2 workers

Inputs of gigabytes are the documents again and again, each time with the vowels in another order: the words are new,
and take more tokens than real ones.

--tokenizers takes folders, and two words for tokenizers that are trained here on documents that are not measured:
llama-style (no pre-tokenizer, byte fallback, 32,000 tokens) and gpt2-style (byte-level, 50,257).

    python bench/preprocess.py
    python bench/preprocess.py --tokenizers tokenizers/pints llama-style gpt2-style --parts compare memory
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from bench.preprocess_tokenizers import TRAINED, tokenizer_folder
from bench.real_text import collect
from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError

ROOT = Path(__file__).resolve().parents[1]
OURS, MEGATRON, DATATROVE = "ours", "megatron", "datatrove"
BARS = {MEGATRON: 10.0, DATATROVE: 8.0}
"""Least ratios of our rate to theirs."""
PRIZE = 25.0
SCALING_BAR = 1.8
MEMORY_BAR_MB = 600
PARTS = ("compare", "scaling", "stages", "memory")
TRAINING_BYTES = 16_000_000
SAMPLING_SECONDS = 0.1
BOUND, FREE, TWO = "1 worker, 1 core", "1 worker, 2 cores", "2 workers, 2 cores"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Cost(NamedTuple):
    """What a command took."""

    cpu_seconds: float
    """User and system, of the process and its children."""
    wall_seconds: float
    largest_mb: float
    """Most resident memory of any one of its processes."""


class Work(NamedTuple):
    """The inputs of a bench, and the folder that everything is written into."""

    folder: Path
    corpus: Path
    """All documents."""
    part: Path
    """The first of them, for all three."""
    training: Path
    """Others, for tokenizers."""
    tiny: Path
    """One small document, for the start-up."""


def make_work(folder: Path, *, mb: float, part_mb: float) -> Work:
    """Collect the text and cut it."""
    work = Work(folder, *(folder / f"{name}.jsonl" for name in ("corpus", "part", "training", "tiny")))
    everything = folder / "collected.jsonl"
    if not everything.is_file():
        found = collect(everything, max_bytes=int(mb * 1e6) + TRAINING_BYTES)
        print(f"text      {found.documents:,} documents, {found.text_bytes / 1e6:.1f} MB, "
              f"{found.code_bytes / found.text_bytes:.0%} code")  # fmt: skip
    with everything.open("rb") as lines:
        cut(lines, work.training, TRAINING_BYTES)
        cut(lines, work.corpus, int(mb * 1e6))
    with work.corpus.open("rb") as lines:
        cut(lines, work.part, int(part_mb * 1e6))
    work.tiny.write_text(json.dumps({"text": "A small document.\n"}) + "\n")
    return work


def cut(lines: Iterator[bytes], target: Path, size: int) -> None:
    """Write the next lines into a file, until it holds `size` bytes or there are no more."""
    written = 0
    with target.open("wb") as file:
        for line in lines:
            written += file.write(line)
            if written >= size:
                return


def command(which: str, source: Path, tokenizer: Path, prefix: Path, *, workers: int = 1) -> list[str]:
    """Give the command line of one of the three."""
    files = ["--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    if which != OURS:
        return [sys.executable, str(ROOT / "bench" / "preprocess_peers.py"), which, *files]
    tool = str(ROOT / "tools" / "preprocess_data.py")
    return [sys.executable, tool, *files, "--append-eod", "--workers", str(workers), "--restart"]


def pair(which: str, prefix: Path) -> tuple[Path, Path]:
    """Name the files that a command writes."""
    stem = f"{prefix}_text_document" if which == OURS else str(prefix)
    return Path(f"{stem}.bin"), Path(f"{stem}.idx")


def measure(words: Sequence[str], *, cores: Collection[int] | None = None) -> Cost:
    """Run a command to its end, with all that it starts on these cores.

    Raises:
        DataError: it failed; with the last of what it printed.
    """
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace")[-2000:]
            raise DataError(f"{' '.join(words)}: ended with exit code {process.returncode}:\n{said}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024 / 1e6)


def compare(work: Work, tokenizer: Path, *, rounds: int) -> None:
    """Let the three take turns on the same documents; print rates, ratios and whether the bytes are equal."""
    names = (OURS, MEGATRON, DATATROVE)
    prefixes = {name: work.folder / f"out_{name}" for name in names}
    # Ours may build its kernel in the very first run; the least of three is a start as all later ones are.
    startup = {
        name: min(measure(command(name, work.tiny, tokenizer, prefixes[name])).cpu_seconds for _ in range(3))
        for name in names
    }
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in (*names, *reversed(names)):
            costs[name].append(measure(command(name, work.part, tokenizer, prefixes[name])))
    size = work.part.stat().st_size / 1e6
    print(f"  compare   {size:.1f} MB of JSON Lines, one worker, {2 * rounds} runs each; MB per CPU second")
    print("            end to end: median (best)   without start-up   start-up   largest process")
    whole, net = {}, {}
    for name in names:
        seconds = [cost.cpu_seconds for cost in costs[name]]
        whole[name] = size / statistics.median(seconds)
        net[name] = size / (statistics.median(seconds) - startup[name])
        memory = max(cost.largest_mb for cost in costs[name])
        print(f"    {name:9} {whole[name]:13.2f} ({size / min(seconds):.2f}) {net[name]:21.2f} {startup[name]:12.2f} s "
              f"{memory:12,.0f} MB")  # fmt: skip
    for name, bar in BARS.items():
        end_to_end, without = whole[OURS] / whole[name], net[OURS] / net[name]
        print(f"    ours / {name:10} {end_to_end:5.2f} end to end, {without:5.2f} without start-up; "
              f"bar {bar:g}: {verdict(end_to_end >= bar)}"
              + (f"; prize {PRIZE:g}: {verdict(without >= PRIZE)}" if name == MEGATRON else ""))  # fmt: skip
    digests = {name: [file_digest(path) for path in pair(name, prefixes[name])] for name in names}
    equal = [name for name in names if digests[name] == digests[MEGATRON]]
    print(f"    bytes equal to the reference's: {', '.join(equal)}" + ("" if OURS in equal else "; OURS DIFFER"))


def verdict(reached: bool) -> str:
    """Say whether a bar was reached."""
    return "reached" if reached else "MISSED"


def file_digest(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scaling(work: Work, tokenizer: Path, *, rounds: int, gigabytes: float) -> None:
    """Run ours with one worker and with two, in turns.

    Raises:
        DataError: there are not two cores.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise DataError("--parts scaling: needs two cores; leave it out on this machine.")
    ways = {BOUND: (1, cores[:1]), FREE: (1, cores), TWO: (2, cores)}
    source, prefix = work.folder / "large.jsonl", work.folder / "out_scaling"

    def run(way: str) -> Cost:
        workers, chosen = ways[way]
        return measure(command(OURS, source, tokenizer, prefix, workers=workers), cores=chosen)

    start = min(measure(command(OURS, work.tiny, tokenizer, prefix)).cpu_seconds for _ in range(3))
    turns: list[dict[str, list[Cost]]] = []
    try:
        size = write_large(work.corpus, source, int(gigabytes * 1e9)) / 1e6
        run(TWO)  # the first run finds neither the input nor its own memory where later ones do
        for _ in range(rounds):
            turns.append({way: [] for way in ways})
            for way in (*ways, *reversed(ways)):
                turns[-1][way].append(run(way))
    finally:
        source.unlink(missing_ok=True)
    report_scaling(turns, size_mb=size, start_seconds=start)


def report_scaling(turns: Sequence[Mapping[str, Sequence[Cost]]], *, size_mb: float, start_seconds: float) -> None:
    """Print rates, and the ratios of each round.

    Args:
        turns: by round and way, what its runs took.
        start_seconds: CPU time of a run on next to nothing, which a second worker does not make shorter.
    """
    print(f"  scaling   {size_mb:,.0f} MB of JSON Lines, ours, {2 * len(turns)} runs each")
    for way in (BOUND, FREE, TWO):
        costs = [cost for turn in turns for cost in turn[way]]
        cpu = statistics.median(cost.cpu_seconds for cost in costs)
        wall = statistics.median(cost.wall_seconds for cost in costs)
        in_use = statistics.median(cost.cpu_seconds / cost.wall_seconds for cost in costs)
        print(f"    {way:18} {size_mb / wall:8.1f} MB/s by the clock, {size_mb / cpu:7.1f} MB per CPU second, "
              f"{in_use:.2f} cores in use")  # fmt: skip
        if way == BOUND and in_use < 0.95:
            print(f"    noise: one worker had only {in_use:.2f} of its core: it waited, or others used the machine")

    def seconds(turn: Mapping[str, Sequence[Cost]], way: str, *, by_cpu: bool) -> float:
        return statistics.mean(cost.cpu_seconds if by_cpu else cost.wall_seconds for cost in turn[way])

    def on_two_cores(turn: Mapping[str, Sequence[Cost]]) -> float:
        return start_seconds + (seconds(turn, TWO, by_cpu=True) - start_seconds) / 2

    by_clock = {
        way: [seconds(turn, way, by_cpu=False) / seconds(turn, TWO, by_cpu=False) for turn in turns]
        for way in (BOUND, FREE)
    }
    by_cpu = [seconds(turn, BOUND, by_cpu=True) / on_two_cores(turn) for turn in turns]
    for name, ratios, judged in (
        (f"{TWO} / {BOUND}, by the clock", by_clock[BOUND], True),
        (f"{TWO} / {FREE}, by the clock", by_clock[FREE], True),
        (f"{TWO} / {BOUND}, if nothing waited", by_cpu, False),
    ):
        ratio = statistics.median(ratios)
        bar = f"; bar {SCALING_BAR}: {verdict(ratio >= SCALING_BAR)}" if judged else ""
        print(f"    {name:57} {ratio:.2f} (rounds from {min(ratios):.2f} to {max(ratios):.2f}){bar}")


def stages(work: Work, tokenizer: Path) -> None:
    """Profile ours on all documents, in a process of its own."""
    script = str(ROOT / "bench" / "preprocess_stages.py")
    files = ["--input", str(work.corpus), "--tokenizer", str(tokenizer)]
    words = [sys.executable, script, *files, "--output-prefix", str(work.folder / "out_stages")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    if done.returncode:
        raise DataError(f"{' '.join(words)}: ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    print(done.stdout[done.stdout.index("  stages") :], end="")


def memory(work: Work, tokenizer: Path, *, gigabytes: float) -> None:
    """Watch the memory of all processes of a run on a large input."""
    source = work.folder / "large.jsonl"
    size = write_large(work.corpus, source, int(gigabytes * 1e9))
    try:
        words = command(OURS, source, tokenizer, work.folder / "out_memory", workers=2)
        with Watch() as watch:
            cost = measure(words)
    finally:
        source.unlink()
    print(f"  memory    {size / 1e9:.2f} GB of JSON Lines, ours, 2 workers: at most {watch.peak_mb:,.0f} MB in all "
          f"processes together (PSS), bar {MEMORY_BAR_MB}: {verdict(watch.peak_mb < MEMORY_BAR_MB)}; "
          f"{size / 1e6 / cost.cpu_seconds:.1f} MB per CPU second")  # fmt: skip


def write_large(source: Path, target: Path, size: int) -> int:
    """Write the documents again and again, each time with the vowels in another order, so that words are new."""
    import orjson

    written = 0
    with target.open("wb") as file:
        for order in itertools.permutations("aeiou"):
            table = str.maketrans("aeiouAEIOU", "".join(order) + "".join(order).upper())
            with source.open("rb") as lines:
                for line in lines:
                    record = orjson.loads(line)
                    record["text"] = record["text"].translate(table)
                    written += file.write(orjson.dumps(record) + b"\n")
                    if written >= size:
                        return written
    return written


class Watch:
    """Samples the memory of all processes under this one, together, while a block runs."""

    def __init__(self) -> None:
        self.peak_mb = 0.0

    def __enter__(self) -> Watch:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(SAMPLING_SECONDS):
            total = 0
            for process in me.children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has ended
            self.peak_mb = max(self.peak_mb, total / 1e6)


def main() -> int:
    """Run the parts asked for, for each tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=list(TRAINED), metavar="FOLDER")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]), help="what to measure")
    parser.add_argument("--mb", type=float, default=200, help="text to collect, in 10^6 bytes (200)")
    parser.add_argument("--part-mb", type=float, default=50, help="of it for the comparison (50)")
    parser.add_argument("--scaling-gb", type=float, default=2.0, help="input of the scaling part, in 10^9 bytes (2)")
    parser.add_argument("--memory-gb", type=float, default=2.0, help="input of the memory part, in 10^9 bytes (2)")
    parser.add_argument("--rounds", type=int, default=2, help="times that the turns are taken (2)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep texts and tokenizers here for another run")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.work or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            run(make_work(folder, mb=args.mb, part_mb=args.part_mb), args)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def run(work: Work, args: argparse.Namespace) -> None:
    """Measure every tokenizer."""
    for name in args.tokenizers:
        tokenizer = tokenizer_folder(name, training=work.training, folder=work.folder)
        print(f"tokenizer {name}")
        if "compare" in args.parts:
            compare(work, tokenizer, rounds=args.rounds)
        if "scaling" in args.parts:
            scaling(work, tokenizer, rounds=args.rounds, gigabytes=args.scaling_gb)
        if "stages" in args.parts:
            stages(work, tokenizer)
        if "memory" in args.parts:
            memory(work, tokenizer, gigabytes=args.memory_gb)


if __name__ == "__main__":
    sys.exit(main())
