"""One start of a run in a fault campaign: its processes, what it is doing at a moment, and what outlives a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from megatron_ext.checkpoint import layout
from megatron_ext.parallel.launch import free_port

SCRIPT = Path(__file__).resolve().parents[1] / "pretrain_pints.py"
# Every process that a start leads to, however far down, inherits it: so those that outlive the ranks are found.
MARK = "MEGAPINTS_FAULT_CAMPAIGN"
# A look at the run costs some 0.1 ms; a save of the campaign's model takes some 100 ms, its publication some 10.
LOOK_SECONDS = 0.001

Launcher = Literal["plain", "torchrun"]
Phase = Literal["in start", "in iteration", "in save", "publishing"]


class Look(NamedTuple):
    """What a run's directory shows of a start."""

    resumed: int | None
    """The iteration that its loop went on from; None: it has not begun."""
    iteration: int | None
    """The newest iteration that this start has logged."""
    phase: Phase


class Start:
    """A start of a run, of several ranks on this machine."""

    def __init__(
        self, number: int, run_dir: Path, arguments: Sequence[str], *, ranks: int, launcher: Launcher, log: Path
    ) -> None:
        """Start the processes.

        Args:
            number: of this start, to tell its processes from others'.
            run_dir: the run's directory.
            arguments: of pretrain_pints.py.
            ranks: processes to train with.
            launcher: plain: nobody ends the ranks that a dead one leaves alone; torchrun does.
            log: file that their output is added to.
        """
        self.number, self.launcher = number, launcher
        self._mark = f"{run_dir}:{number}"
        self._directory = run_dir / layout.CHECKPOINTS
        self._metrics = run_dir / "metrics.jsonl"
        self._offset = self._metrics.stat().st_size if self._metrics.exists() else 0
        self._resumed: int | None = None
        self._iteration: int | None = None
        self._size = ranks
        self._found = {name: _changed(self._directory / name) for name in _names(self._directory)}
        with log.open("a") as stream:
            stream.write(f"--- start {number}, {launcher}\n")
            stream.flush()
            self.processes = [
                subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
                for command, environment in self._commands(arguments)
            ]

    def _commands(self, arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
        python, script = sys.executable, [str(SCRIPT), *arguments]
        environment = _clean_environment() | {MARK: self._mark, "OMP_NUM_THREADS": "1"}
        port = str(free_port())
        if self.launcher == "torchrun":
            options = ["--nproc-per-node", str(self._size), "--master-port", port]
            return [([python, "-m", "torch.distributed.run", *options, *script], environment)]
        shared = {"WORLD_SIZE": str(self._size), "LOCAL_WORLD_SIZE": str(self._size), "MASTER_ADDR": "127.0.0.1"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port} for rank in range(self._size)]
        return [([python, *script], environment | shared | rank) for rank in ranks]

    # --- looking --------------------------------------------------------------------------------------------------

    def ended(self) -> bool:
        """Say whether all processes that were started here are over."""
        return all(process.poll() is not None for process in self.processes)

    def exit_codes(self) -> list[int | None]:
        """How they ended; negative: by a signal."""
        return [process.poll() for process in self.processes]

    def look(self) -> Look:
        """See what the start is doing."""
        self._read_metrics()
        phase: Phase = "in start" if self._resumed is None else "in iteration"
        paths = [self._directory / name for name in _names(self._directory) if name.startswith("iter_")]
        # What is as this start found it is none of its doing.
        paths = [path for path in paths if self._found.get(path.name) != _changed(path)]
        whole = [path.name for path in paths if layout.iteration_of(path) is not None]
        if whole and self._latest() < max(whole):
            phase = "publishing"
        for path in paths:
            if path.name not in whole:
                phase = "publishing" if (path / layout.DESCRIPTION).exists() else "in save"
        return Look(self._resumed, self._iteration, phase)

    def _latest(self) -> str:
        with contextlib.suppress(OSError):
            return (self._directory / layout.LATEST).read_text().strip()
        return ""

    def _read_metrics(self) -> None:
        with contextlib.suppress(FileNotFoundError), self._metrics.open("rb") as stream:
            stream.seek(self._offset)
            added = stream.read()
            whole, newline, _ = added.rpartition(b"\n")
            self._offset += len(whole) + len(newline)
            for line in whole.splitlines():
                row = _parsed(line)
                if row.get("kind") == "start":
                    self._resumed = row["iteration"]
                if row.get("kind") == "train":
                    self._iteration = row["iteration"]

    def wait_until(self, condition: Callable[[Look], bool], *, seconds: float) -> bool:
        """Look until something is so; False: the start ended before, or the time passed."""
        deadline = time.monotonic() + seconds
        while not condition(self.look()):
            if self.ended() or time.monotonic() > deadline:
                return False
            time.sleep(LOOK_SECONDS)
        return True

    # --- its processes --------------------------------------------------------------------------------------------

    def alive(self) -> list[psutil.Process]:
        """List every process that this start led to and that is still there, the launcher's own included."""
        mine = os.getpid()
        return [p for p in psutil.process_iter() if p.pid != mine and self._is_mine(p)]

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._mark
        except (psutil.Error, OSError):
            return False

    def ranks(self) -> dict[int, psutil.Process]:
        """Find the processes that train, by rank."""
        if self.launcher == "plain":
            pids = {rank: process.pid for rank, process in enumerate(self.processes) if process.poll() is None}
            return {rank: psutil.Process(pid) for rank, pid in pids.items()}
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.processes[0].pid).children():
                with contextlib.suppress(psutil.Error, KeyError, ValueError):
                    found[int(child.environ()["RANK"])] = child
        return found

    def wait_for_end(self, *, seconds: float) -> float | None:
        """Wait until all ranks have ended by themselves, and say how long it took; None: they had not."""
        begin = time.monotonic()
        while not self.ended():
            if time.monotonic() - begin > seconds:
                return None
            time.sleep(0.02)
        return time.monotonic() - begin

    def wait_for_leftovers(self, *, seconds: float) -> tuple[float, list[psutil.Process]]:
        """Wait until nothing of this start is left; how long that took, and what is left all the same."""
        begin = time.monotonic()
        while (left := self.alive()) and time.monotonic() - begin < seconds:
            time.sleep(0.1)
        return time.monotonic() - begin, left

    def end(self) -> None:
        """End all that is left of it."""
        kill(self.alive())
        for process in self.processes:
            process.wait()


def kill(processes: Sequence[psutil.Process], number: int = signal.SIGKILL) -> None:
    """Send processes a signal; those that are gone already do not matter."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _changed(path: Path) -> int:
    """When a directory last changed, in nanoseconds; 0 where it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _parsed(line: bytes) -> dict[str, Any]:
    """Read a row; empty for a line that a crash cut short."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables."""
    foreign = ("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_", "LOCAL_", "MASTER_", "TORCHELASTIC_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
