"""End a run that hangs, and say which rank the others wait for.

A thread on every rank looks at the main thread's Python stack some times a second, and tells rank 0 once a second where
it stands (parallel/heartbeat.py). A rank hangs when its main thread stands at one and the same instruction, in one and
the same iteration, for as long as a collective may wait. Then rank 0, or each rank for itself where rank 0 does not
answer, writes down who waits for whom, and every rank ends with an exit code that makes the launcher end the others,
and the scheduler start the run again.

RUN/hang-report.json   where each rank was
RUN/hang-rankN.txt     the whole stack of every thread of rank N
RUN/hang-traces/       the newest collectives of each rank, from torch's flight recorder

Time is counted in looks: while a process is stopped (suspended job, sleeping laptop), it does not look, and the time
does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from megatron_ext.config.tree import Config
from megatron_ext.durable import write_whole
from megatron_ext.errors import LostRankError
from megatron_ext.parallel import device, flight_recorder
from megatron_ext.parallel.groups import LONG_PHASE_FACTOR, Place
from megatron_ext.parallel.heartbeat import Heartbeat, Peer
from megatron_ext.parallel.launch import Launch
from megatron_ext.parallel.probe import node_name
from megatron_ext.training import restarts
from megatron_ext.training.hang_report import HangReport, RankReport, diagnose
from megatron_ext.training.position import Fingerprint, Position, observe

_LOG = logging.getLogger(__name__)
REPORT = "hang-report.json"
EXIT_CODE_HANG = 1
ITERATION = "iteration"
# Reading an index that nobody has read yet, loading, saving: a rank may do them for all, and the others wait.
_LONG_PHASES = ("start", "save", "rewind", "end")
_LOOK_SECONDS = 0.1
_BEAT_SECONDS = 1.0
_LONGEST_LOOK = 1.0
"""Of the time between two looks, this much counts; the process was stopped, or had no processor, for the rest."""
_PATIENCE_SECONDS = 5.0
"""How long the ranks are given to say where they stand, once one hangs."""
_LOST_SECONDS = 30.0
"""How long a collective may wait once a rank is known to be gone; the launcher mostly ends the run before."""
_WRITING_SECONDS = 10.0
"""How long the report may take: the file system may be what hangs."""
_CONNECTION = re.compile(r"gloo|NCCL|c10d|[Cc]onnection|[Ss]ocket|Broken pipe|Timed out waiting")


@dataclass(slots=True)
class OwnTime:
    """Where a rank's main thread was during iterations."""

    own_seconds: float = 0.0
    """With work of its own."""
    waiting_seconds: float = 0.0
    """In collectives, or waiting for the device."""
    functions: Counter[str] = field(default_factory=Counter)
    """Looks that found it at own work, by function."""

    def __add__(self, other: OwnTime) -> OwnTime:
        return OwnTime(
            self.own_seconds + other.own_seconds,
            self.waiting_seconds + other.waiting_seconds,
            self.functions + other.functions,
        )


class Watchdog:
    """Watches this rank's main thread. With one rank, which no other waits for, it does nothing."""

    def __init__(self, config: Config, place: Place, launch: Launch, directory: Path) -> None:
        """Open the lines between the ranks; `directory` is the run's. Every rank makes one.

        Raises:
            LaunchError: a rank cannot reach rank 0; on every rank.
        """
        self._rank = place.rank
        self._speaks_for_rank_0 = place.rank == 1 and launch.local_rank != 0  # else the entry point does, at once
        self._first_of_node = launch.local_rank == 0
        self._timeout = 60.0 * config.parallel.distributed_timeout_minutes
        self._directory = directory
        self._cuda = device.is_cuda()  # asked once: a driver that hangs may not answer later
        self._main = threading.main_thread().ident or 0
        self._note: tuple[int, str] = (0, "start")
        self._own_time = OwnTime()
        self._seen: tuple[tuple[int, str], Fingerprint] | None = None
        self._position = Position(False, "", "")
        self._still = self._since_note = 0.0
        self._since_beat = _BEAT_SECONDS  # the first at once
        self._first_iteration: int | None = None
        self._alarms = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._heartbeat: Heartbeat | None = None
        if place.world_size > 1:
            node = node_name(launch)
            self._heartbeat = Heartbeat(rank=place.rank, world_size=place.world_size, node=node, pid=os.getpid())
            self._heartbeat.connect(launch.master_addr)
            self._thread = threading.Thread(target=self._watch, args=(self._heartbeat,), name="watchdog", daemon=True)
            self._thread.start()

    def note(self, iteration: int, phase: str) -> None:
        """Say what begins now: `iteration`, or something between two. Costs nothing; no collective."""
        self._note = (iteration, phase)

    def take_own_time(self) -> OwnTime:
        """Give how this rank spent its iterations since the last call."""
        taken, self._own_time = self._own_time, OwnTime()
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the watch.

        Raises:
            LostRankError: instead of the error of a collective that another rank left.
        """
        if self._heartbeat is None:
            return
        iteration, phase = self._note
        self.note(iteration, "end")
        line = self._explain(self._heartbeat) if _is_of_a_collective(error) else ""
        if not line:
            self._stop(restarts.reason_of(error) if error is not None else "")
            return
        self._stop()
        place = f"iteration {iteration}" if phase == ITERATION else f"{phase} (iteration {iteration})"
        line += f"; rank {self._rank} ends in {place}. What was saved is good: start the run again."
        if 0 in self._heartbeat.lost:
            if self._speaks_for_rank_0:
                _LOG.error("%s", line)
            self._tell_batch_script(line)
        raise LostRankError(line) from None

    def _tell_batch_script(self, line: str) -> None:
        """Say what ended the run where rank 0 cannot: without a word srun may wait for the lost tasks for ever."""
        if self._first_of_node:
            with contextlib.suppress(OSError):
                restarts.tell_batch_script(restarts.reason_of(LostRankError(line)))

    def _stop(self, why: str = "") -> None:
        self._stopped.set()
        if self._thread is not None and self._heartbeat is not None:
            self._thread.join()
            self._heartbeat.close(why)

    # --- the main thread, after a collective failed ----------------------------------------------------------------

    def _explain(self, heartbeat: Heartbeat) -> str:
        """Wait a little for news of who is gone, and say it; empty where nobody is known to be."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not heartbeat.lost and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        lost = dict(heartbeat.lost)
        return "; ".join(f"{heartbeat.names[rank]} is gone: {lost[rank]}" for rank in sorted(lost))

    # --- the thread ------------------------------------------------------------------------------------------------

    def _watch(self, heartbeat: Heartbeat) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        last = time.monotonic()
        while not self._stopped.wait(_LOOK_SECONDS):
            now = time.monotonic()
            self._look(min(now - last, _LONGEST_LOOK))
            last = now
            heartbeat.poll()
            alarm = self._still >= self._allowed(heartbeat)
            if self._since_beat >= _BEAT_SECONDS or alarm and not self._alarms:
                heartbeat.beat(self._word(alarm=alarm))
                self._since_beat = 0.0
            if heartbeat.end is not None:
                self._leave(self._write_own, "")
            self._alarms = self._alarms + 1 if alarm or _others_alarmed(heartbeat) else 0
            if self._alarms and self._rank == 0:
                self._judge(heartbeat)
            elif alarm and (self._alarms * _LOOK_SECONDS > 2 * _PATIENCE_SECONDS or heartbeat.peers[0].state != "here"):
                self._judge_alone(heartbeat)  # rank 0 would have spoken

    def _look(self, elapsed: float) -> None:
        """See where the main thread stands, and for how long it has stood there."""
        note, observed = self._note, observe(self._main, cuda=self._cuda)
        if observed is None:
            return
        self._position, fingerprint = observed
        seen = self._seen
        self._since_beat += elapsed
        self._since_note = self._since_note + elapsed if seen is not None and note is seen[0] else 0.0
        self._still = self._still + elapsed if seen is not None and seen[0] is note and seen[1] == fingerprint else 0.0
        self._seen = note, fingerprint
        if note[1] != ITERATION:
            return
        if self._first_iteration is None:
            self._first_iteration = note[0]
        own_time = self._own_time
        if self._position.waits:
            own_time.waiting_seconds += elapsed
        else:
            own_time.own_seconds += elapsed
            own_time.functions[self._position.function] += 1

    def _allowed(self, heartbeat: Heartbeat) -> float:
        """Seconds for which the main thread may stand still."""
        iteration, phase = self._note
        first = phase == ITERATION and iteration == self._first_iteration  # kernels are compiled, links are made
        allowed = self._timeout * (LONG_PHASE_FACTOR if first or phase in _LONG_PHASES else 1)
        return min(allowed, _LOST_SECONDS) if heartbeat.lost else allowed

    def _word(self, *, alarm: bool) -> dict[str, Any]:
        iteration, phase = self._note
        position = self._position
        where = position.text
        if alarm and position.waits and (pending := flight_recorder.oldest_pending(cuda=self._cuda)):
            where += f" [{pending}]"
        return {
            "iteration": iteration, "phase": phase, "seconds": round(self._since_note, 1),
            "waits": position.waits, "where": where, "alarm": alarm,
        }  # fmt: skip

    # --- when it hangs ---------------------------------------------------------------------------------------------

    def _judge(self, heartbeat: Heartbeat) -> NoReturn:
        """Hear where every rank stands, tell all to leave, and write the report. Rank 0 does it."""
        asked = time.monotonic()
        while time.monotonic() < asked + _PATIENCE_SECONDS and any(
            peer.state == "here" and peer.heard < asked for peer in heartbeat.peers.values()
        ):
            time.sleep(_LOOK_SECONDS)
            heartbeat.poll()
        others = [_report(peer, heartbeat, silent=peer.heard < asked) for _, peer in sorted(heartbeat.peers.items())]
        report = diagnose([self._own_report(heartbeat), *others])
        heartbeat.end_all(report.verdict)
        self._leave(lambda: self._write_report(report), report.verdict)

    def _judge_alone(self, heartbeat: Heartbeat) -> NoReturn:
        """Say what this rank knows, where rank 0 does not speak."""
        report = diagnose([_report(heartbeat.peers[0], heartbeat, silent=True), self._own_report(heartbeat)])

        def write() -> None:
            self._tell_batch_script(report.verdict)
            self._write_report(report)

        self._leave(write, report.verdict)

    def _own_report(self, heartbeat: Heartbeat) -> RankReport:
        word = self._word(alarm=True)
        return RankReport(rank=self._rank, node=heartbeat.node, pid=os.getpid(), state="here", **_shown(word))

    def _leave(self, write: Callable[[], None], verdict: str) -> NoReturn:
        """Write, if that can be done, and end this process whatever its main thread does."""
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_WRITING_SECONDS)
        if writer.is_alive() and verdict:  # the log may be on what hangs
            os.write(2, f"error: hung: {verdict}\n".encode())
        os._exit(EXIT_CODE_HANG)

    def _write_report(self, report: HangReport) -> None:
        limit = f"parallel.distributed_timeout_minutes = {self._timeout / 60:g}"
        text = f"hung ({limit}): {report.verdict}"
        details = "\n".join(("", *report.table, f"stacks and more: {self._directory}/hang-*"))
        _LOG.error("%s%s", text, details)
        if self._rank == 0:
            restarts.note_stop(self._directory / restarts.METRICS, f"failed: {text}"[:300])
        found = {"time": time.time(), "timeout_seconds": self._timeout, **report.to_json()}
        write_whole(self._directory / REPORT, json.dumps(found, indent=1) + "\n")
        self._write_own()

    def _write_own(self) -> None:
        """Write this rank's stacks and collectives."""
        with (self._directory / f"hang-rank{self._rank}.txt").open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        flight_recorder.write_trace(self._directory / flight_recorder.TRACES, self._rank, cuda=self._cuda)


def _others_alarmed(heartbeat: Heartbeat) -> bool:
    return any(peer.state == "here" and '"alarm": true' in peer.word for peer in heartbeat.peers.values())


def _report(peer: Peer, heartbeat: Heartbeat, *, silent: bool) -> RankReport:
    return RankReport(
        rank=peer.rank, node=peer.node, pid=peer.pid,
        state="silent" if silent and peer.state == "here" else peer.state, silent_seconds=peer.silent_seconds,
        why=heartbeat.lost.get(peer.rank, ""), **_shown(json.loads(peer.word) or {}),
    )  # fmt: skip


def _shown(word: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in word.items() if name != "alarm"}


def _is_of_a_collective(error: BaseException | None) -> bool:
    """Say whether this is what a rank meets whose peer is gone: gloo raises plain RuntimeErrors."""
    return isinstance(error, RuntimeError) and _CONNECTION.search(str(error)) is not None
