"""Where tools/preprocess_data.py spends its CPU time: a profile of a run in one process, added up by stage.

    python bench/preprocess_stages.py --input X.jsonl --tokenizer FOLDER --output-prefix P

The profiler sees the calls of the tool itself, not a model of it. What runs inside a library counts for the stage
that called it. The profiler's own cost falls on short calls, so the shares are a little unfair to code in Python.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

START = "start-up, rest"
STAGES_BY_FILE = {
    "preprocessing/inputs.py": "read, JSON",
    "preprocessing/readers.py": "read, JSON",
    "preprocessing/batches.py": "read, JSON",
    "preprocessing/compression.py": "read, JSON",
    "preprocessing/tables.py": "read, JSON",
    "preprocessing/encode.py": "encode",
    "data/fast_tokenizer.py": "encode",
    "preprocessing/parts.py": "write parts",
    "preprocessing/publishing.py": "publish",
    "data/indexed.py": "publish",
}
"""End of a file's name: what its functions do, and the library calls that they make."""

Function = tuple[str, int, str]
"""File, line and name, as the profiler has them."""


def run_profiled(source: Path, tokenizer: Path, prefix: Path) -> None:
    """Run the tool under the profiler and print the stages."""
    from tools import preprocess_data

    # Of this thread alone: the others hash the input, join parts, or wait.
    profile = cProfile.Profile(time.thread_time)
    arguments = ["--input", str(source), "--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    before = time.process_time()
    status = profile.runcall(preprocess_data.main, [*arguments, "--append-eod", "--workers", "1", "--restart"])
    total = time.process_time() - before
    if status:
        raise SystemExit(status)
    statistics: Any = pstats.Stats(profile)
    seconds = seconds_by_stage(statistics.stats)
    seconds["hash and join, in other threads"] = max(total - sum(seconds.values()), 0.0)
    size = source.stat().st_size / 1e6
    print(f"  stages    {size:.1f} MB of JSON Lines, one process, {total:.2f} CPU seconds under a profiler")
    for stage, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"    {stage:34} {spent:7.2f} s {spent / total:5.0%} {size / max(spent, 1e-9):10,.0f} MB/s by itself")


def seconds_by_stage(
    functions: Mapping[Function, tuple[int, int, float, float, Mapping[Function, Any]]],
) -> dict[str, float]:
    """Add up the profiler's own times; a function of no stage shares its time among its callers' stages."""
    shares: dict[Function, dict[str, float]] = {}

    def share(function: Function, above: tuple[Function, ...]) -> dict[str, float]:
        """Give what part of a function's time belongs to which stage; the parts add up to 1."""
        if stage := stage_of(function):
            return {stage: 1.0}
        if function in shares:
            return shares[function]
        callers = {caller: entry[3] for caller, entry in functions[function][4].items() if caller not in above}
        total = sum(callers.values())
        found: dict[str, float] = {}
        for caller, spent in callers.items():
            for stage, part in share(caller, (*above, function)).items():
                found[stage] = found.get(stage, 0.0) + part * (spent / total if total else 1 / len(callers))
        shares[function] = found or {START: 1.0}
        return shares[function]

    seconds: dict[str, float] = {}
    for function, (_, _, own, _, _) in functions.items():
        for stage, part in share(function, ()).items():
            seconds[stage] = seconds.get(stage, 0.0) + own * part
    return seconds


def stage_of(function: Function) -> str | None:
    """Name the stage of a function of the tool's; None for libraries and all else."""
    return next((stage for ending, stage in STAGES_BY_FILE.items() if function[0].endswith(ending)), None)


def main() -> int:
    """Profile one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output-prefix", type=Path, required=True)
    args = parser.parse_args()
    run_profiled(args.input, args.tokenizer, args.output_prefix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
