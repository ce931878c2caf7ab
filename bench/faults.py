#!/usr/bin/env python3
"""Kill a run many times, at random moments, and prove that it lost nothing and repeated nothing.

A small model trains on several ranks. Each start is ended by SIGKILL: a rank, all of them, or all its processes; while
it starts, in an iteration, in a save, at the moment of publication; under torchrun and with plain processes, with
synchronous and asynchronous saves. Now and then a rank is frozen in a save instead, like one whose node is cut off:
the others are killed, the run is started again, and in a save of the next start the frozen one goes on. What the run
trained on (log.samples), its metrics and its last checkpoint are then compared with those of a run that nobody
disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from bench.fault_report import compare, held, line, report
from bench.fault_start import Launcher, Look, Start, kill
from megatron_ext.checkpoint import layout
from megatron_ext.durable import write_whole
from megatron_ext.errors import EXIT_CODE

EPILOG = """\
examples:
  the campaign of docs/RELIABILITY.md
    python bench/faults.py --kills 50 --seed 1 --json build/faults.json
  a short one, with tensor-parallel ranks
    python bench/faults.py --kills 4 --overrides --parallel.tensor_model_parallel_size 2
The exit code is 0 only if every start came up, every kill was survived, and nothing differs.
"""
CONFIG = """\
name = "faults"
run_dir = "{run_dir}"

[model]
num_layers = 2
hidden_size = 128
ffn_hidden_size = 1024
num_attention_heads = 4
num_query_groups = 2
vocab_size = 2048
max_position_embeddings = 32

[precision]
dtype = "fp32"

[parallel]
distributed_timeout_minutes = 0.5

[data]
tokenizer = "{data}/tokenizer"
train_data = ["{data}/a", "{data}/b"]
split = "1,0"

[train]
seq_length = 32
micro_batch_size = 1
global_batch_size = 8
train_iters = 100000
eval_interval = "none"

[optimizer]
lr = 1e-3
lr_decay_style = "constant"

[checkpoint]
save_interval = {save_interval}
keep_last = 2

[reliability]
preflight = false

[log]
interval = 1
samples = true
tensorboard = false
"""
SAVE_INTERVAL = 3
VOCAB_SIZE = 512
# A start that takes longer than this for anything is hung: some 8 s are what it takes on two cores.
PATIENCE_SECONDS = 180.0
END_SECONDS = 150.0
LEFTOVER_SECONDS = 20.0

Aim = Literal["start", "iteration", "save", "publication", "frozen rank"]
# How often each is aimed at, of 20.
WEIGHTS: dict[Aim, int] = {"start": 3, "iteration": 7, "save": 4, "publication": 4, "frozen rank": 2}


@dataclass(kw_only=True)
class Kill:
    """One kill, and what came of it."""

    number: int
    launcher: Launcher
    async_save: bool
    aim: Aim
    killed: str = ""
    phase: str = ""
    """What the run was doing, as its directory showed right after the kill."""
    iteration: int | None = None
    """Newest iteration that the killed start had finished; None: none."""
    ended_seconds: float | None = None
    """What the other ranks took to end by themselves; None: they did not."""
    left_over: int = 0
    """Processes that had to be ended by hand, long after the ranks were gone."""
    leftover_seconds: float = 0.0
    """What the others took to go."""
    resumes_from: int = 0
    """Newest whole checkpoint after the kill."""
    redone_iterations: int = 0
    """Iterations that were finished and are lost."""
    problems: list[str] = field(default_factory=list)


class Campaign:
    """Starts a run, kills it, and starts it again."""

    def __init__(self, folder: Path, rng: random.Random, *, ranks: int, overrides: Sequence[str]) -> None:
        """Take where all is kept, what decides on the moments, and what the configuration is to differ in."""
        self.run_dir = folder / "run"
        self._folder = folder
        self._rng = rng
        self._ranks = ranks
        self._overrides = tuple(overrides)
        self._starts = 0
        self._start_seconds = 10.0
        self._resumes_from = 0
        self._frozen: Start | None = None

    def prepare(self) -> None:
        """Make the data and the configuration."""
        data = self._folder / "data"
        make_data(data)
        text = CONFIG.format(run_dir=self.run_dir, data=data, save_interval=SAVE_INTERVAL)
        (self._folder / "faults.toml").write_text(text)

    def start(self, *extra: str, run_dir: Path | None = None, launcher: Launcher = "plain") -> Start:
        """Start the run, or another one of the same configuration."""
        self._starts += 1
        run_dir = run_dir or self.run_dir
        arguments = [str(self._folder / "faults.toml"), "--run_dir", str(run_dir), *self._overrides, *extra]
        log = self._folder / "output.txt"
        return Start(self._starts, run_dir, arguments, ranks=self._ranks, launcher=launcher, log=log)

    def kill_one(self, number: int) -> Kill:
        """Start the run, kill it at a random moment, and see what is left."""
        aims = [aim for aim in WEIGHTS if not (self._frozen and aim in ("start", "frozen rank"))]
        (aim,) = self._rng.choices(aims, [WEIGHTS[aim] for aim in aims])
        (launcher,) = self._rng.choices(get_args(Launcher), [3, 1])
        found = Kill(number=number, launcher=launcher, async_save=self._rng.random() < 0.5, aim=aim)
        start = self.start("--checkpoint.async_save", str(found.async_save).lower(), launcher=launcher)
        try:
            self._wait_for_moment(start, found)
            self._strike(start, found)
            self._see_it_end(start, found)
            self._bury(found)
        finally:
            if self._frozen is not start:
                start.end()
        self._account(found)
        return found

    def finish(self) -> tuple[int, list[str]]:
        """Let the run go on for a little, and train as far without a disturbance.

        Returns:
            The last iteration, and what went wrong on the way.
        """
        last = self._resumes_from + 2 * SAVE_INTERVAL + 1
        # By parameter, without the gaps between parameters in Megatron's buffers, which hold whatever memory held.
        options = ("--train.exit_iters", str(last), "--checkpoint.optimizer_format", "fully_reshardable")
        problems = []
        for what, run_dir in (("the last start", self.run_dir), ("the undisturbed run", self._folder / "undisturbed")):
            start = self.start(*options, run_dir=run_dir)
            if start.wait_for_end(seconds=PATIENCE_SECONDS + 2 * last) is None or any(start.exit_codes()):
                problems.append(f"{what} failed (exit codes {start.exit_codes()})")
            start.end()
        return last, problems

    def close(self) -> None:
        """End what is left of a start that was frozen."""
        if self._frozen is not None:
            self._frozen.end()

    # --- one kill -------------------------------------------------------------------------------------------------

    def _wait_for_moment(self, start: Start, found: Kill) -> None:
        """Wait for what is aimed at."""
        begin = time.monotonic()
        if found.aim == "start":
            seconds = self._rng.uniform(0.02, 1.0) * self._start_seconds
            start.wait_until(lambda look: look.resumed is not None, seconds=seconds)
            if any(start.exit_codes()):
                found.problems.append(f"the start ended by itself (exit codes {start.exit_codes()})")
            return
        ahead = self._rng.randint(1, 2 * SAVE_INTERVAL)
        self._wait(start, found, lambda look: look.iteration is not None)
        self._start_seconds = time.monotonic() - begin
        resumed = start.look().resumed
        if resumed != self._resumes_from:
            found.problems.append(f"resumed from {resumed}, and {self._resumes_from} was whole")
        if self._frozen is not None:
            self._thaw(self._frozen, start)
            ahead += 2 * SAVE_INTERVAL  # so that what was disturbed is whole, and loaded by the next start
        self._wait(start, found, lambda look: (look.iteration or 0) >= self._resumes_from + ahead)
        if found.aim == "iteration":
            time.sleep(self._rng.uniform(0, 0.1))
        elif found.aim == "publication":
            self._wait(start, found, lambda look: look.phase == "publishing")
            time.sleep(self._rng.uniform(0, 0.003))
        else:
            self._wait(start, found, lambda look: look.phase == "in save")
            time.sleep(self._rng.uniform(0, 0.03))

    def _wait(self, start: Start, found: Kill, condition: Callable[[Look], bool]) -> None:
        if not found.problems and not start.wait_until(condition, seconds=PATIENCE_SECONDS):
            found.problems.append(f"the start ended or hung by itself (exit codes {start.exit_codes()})")

    def _strike(self, start: Start, found: Kill) -> None:
        """Kill, and see what the run was doing."""
        found.phase = start.look().phase
        ranks = start.ranks()
        one = self._rng.choice(sorted(ranks)) if ranks else 0
        scope = self._rng.choices(("one", "all", "everything"), (12, 5, 3))[0]
        if scope == "one" and found.phase == "in start" and found.launcher == "plain":
            scope = "all"  # a rank that has not met the others yet waits for them for minutes: torch's rendezvous
        if found.problems or not ranks:
            kill(start.alive())
            found.killed = "everything"
        elif found.aim == "frozen rank":
            kill([ranks[one]], signal.SIGSTOP)
            kill([process for process in start.alive() if process != ranks[one]])
            found.killed, self._frozen = f"all but rank {one} (frozen)", start
        elif scope == "everything":
            kill(start.alive())
            found.killed = "everything"
        else:
            kill(list(ranks.values()) if scope == "all" else [ranks[one]])
            found.killed = "all ranks" if scope == "all" else f"rank {one}"
        look = start.look()
        found.phase, found.iteration = look.phase, look.iteration

    def _see_it_end(self, start: Start, found: Kill) -> None:
        """Wait until the other ranks and all that they had started are gone."""
        if self._frozen is start:
            found.left_over = 1
            return
        found.ended_seconds = start.wait_for_end(seconds=END_SECONDS)
        if found.ended_seconds is None:
            found.problems.append(f"the other ranks had not ended after {END_SECONDS:.0f} s")
        found.leftover_seconds, left = start.wait_for_leftovers(seconds=LEFTOVER_SECONDS)
        found.left_over = len(left)
        if left:
            found.problems.append(f"{len(left)} processes outlived the run by {LEFTOVER_SECONDS:.0f} s")

    def _thaw(self, frozen: Start, start: Start) -> None:
        """Let the frozen rank of a dead start go on while this one is in a save."""
        processes = frozen.alive()
        start.wait_until(lambda look: look.phase == "in save", seconds=PATIENCE_SECONDS)
        time.sleep(self._rng.uniform(0, 0.05))
        kill(processes, signal.SIGCONT)

    def _bury(self, found: Kill) -> None:
        """See that a rank that was frozen and goes on has ended, being alone."""
        if self._frozen is None or self._frozen.number == self._starts:
            return
        _, left = self._frozen.wait_for_leftovers(seconds=END_SECONDS)
        if left:
            found.problems.append(f"the rank that had been frozen had not ended after {END_SECONDS:.0f} s")
        self._frozen.end()
        self._frozen = None

    def _account(self, found: Kill) -> None:
        """See what the next start will find, and what is lost."""
        newest = layout.find_newest(self.run_dir / layout.CHECKPOINTS)
        damaged = [rejected for rejected in newest.rejected if layout.iteration_of(rejected.path) is not None]
        found.problems += [f"{rejected.path.name} was published: {rejected.reason}" for rejected in damaged]
        whole = (newest.path and layout.iteration_of(newest.path)) or 0
        if whole < self._resumes_from:
            found.problems.append(f"iteration {self._resumes_from} was whole, and {whole} is the newest now")
        found.resumes_from = self._resumes_from = whole
        found.redone_iterations = max(0, (found.iteration or 0) - whole)
        most = SAVE_INTERVAL * (2 if found.async_save else 1)
        if found.redone_iterations > most:
            found.problems.append(f"{found.redone_iterations} iterations are lost, more than {most}")


def make_data(folder: Path) -> None:
    """Make a small tokenizer and two token files from the standard library's sources."""
    import numpy as np

    from megatron_ext.data.indexed import IndexedWriter
    from megatron_ext.data.tokenizer import Tokenizer
    from tools import build_tokenizer

    sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:40]
    (folder / "tokenizer").mkdir(parents=True)
    content = build_tokenizer.train_tokenizer(
        sources[:4], key="text", vocab_size=VOCAB_SIZE, limit_alphabet=64, show_progress=False
    )
    build_tokenizer.write_folder(content, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for name, paths in (("a", sources[::2]), ("b", sources[1::2])):
        with IndexedWriter(folder / name, dtype=np.dtype("<u2")) as writer:
            for path in paths:
                (ids,) = tokenizer.encode_batch([path.read_text(encoding="utf-8", errors="replace")[:4000]])
                writer.add_document([*ids, tokenizer.eod])
            writer.publish()


def run_campaign(arguments: argparse.Namespace, folder: Path, closing: contextlib.ExitStack) -> dict[str, Any]:
    """Run the whole campaign, and give its results."""
    campaign = Campaign(folder, random.Random(arguments.seed), ranks=arguments.ranks, overrides=arguments.overrides)
    campaign.prepare()
    closing.callback(campaign.close)
    kills: list[Kill] = []
    begin = time.monotonic()
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as display:
        task = display.add_task("kills", total=arguments.kills)
        for number in range(1, arguments.kills + 1):
            kills.append(campaign.kill_one(number))
            display.console.print(line(asdict(kills[-1])), markup=False, highlight=False, soft_wrap=True)
            display.advance(task)
        last, problems = campaign.finish()
    comparison = compare(campaign.run_dir, folder / "undisturbed", last=last) if not problems else None
    return {
        "seed": arguments.seed,
        "ranks": arguments.ranks,
        "overrides": arguments.overrides,
        "seconds": time.monotonic() - begin,
        "kills": [asdict(found) for found in kills],
        "problems": problems,
        "comparison": comparison and comparison._asdict(),
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the victims (default 1)")
    parser.add_argument("--ranks", type=int, default=2, help="processes to train with (default 2)")
    parser.add_argument("--json", type=Path, help="write the results into this file")
    parser.add_argument(
        "--folder", type=Path, help="new folder for the run, kept afterwards (default: a temporary one)"
    )
    parser.add_argument("--overrides", nargs=argparse.REMAINDER, default=[], help="options of pretrain_pints.py; last")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 0: everything held, 1: something did not, 2: a mistake in the command."""
    arguments = parse_arguments(argv)
    if arguments.folder is not None and arguments.folder.exists():
        print(f"error: {arguments.folder} is there already; name a new folder.", file=sys.stderr)
        return EXIT_CODE
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    with contextlib.ExitStack() as closing:
        if arguments.folder is None:
            closing.callback(shutil.rmtree, folder, ignore_errors=True)
        result = run_campaign(arguments, folder.resolve(), closing)
    print(report(result))
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0 if held(result) else 1


if __name__ == "__main__":
    sys.exit(main())
