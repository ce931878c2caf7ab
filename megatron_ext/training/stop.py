"""Why a run stops: it is done, its time is up, its job's time is up, or somebody asked."""

from __future__ import annotations

import logging
import signal
import time
from multiprocessing import resource_tracker
from types import FrameType
from typing import Literal, NamedTuple

from megatron_ext.config.tree import TrainConfig
from megatron_ext.durable import write_whole
from megatron_ext.parallel import groups
from megatron_ext.parallel.launch import Job
from megatron_ext.training.state import TrainState

_LOG = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Time kept free for the last save while no save has been measured: this share of what the job has left at the start,
# so that a job of five minutes trains too, and at most this much.
_LEAD_SHARE, _LEAD_SECONDS = 0.05, 600.0
# From the end of the last save to that of the process, and of srun: 4 s were too few on a machine with seven times as
# much to do as it has cores.
_LEAVING_SECONDS = 10.0


class Reason(NamedTuple):
    """Why to stop, and whether that is the end."""

    outcome: Literal["finished", "stopped"]
    """finished: this is as far as the configuration goes; stopped: the run is to be continued."""
    text: str


class Stop:
    """Decides, on all ranks alike, whether the loop goes on. A signal is only noted, so the iteration ends first."""

    def __init__(self, train: TrainConfig, job: Job | None = None) -> None:
        """Note when to stop, and begin to catch signals.

        SIGTERM and SIGUSR1 stay blocked, here and in every process started from now on: Slurm sends them to all
        processes of a task, and one that the run still needs would die of them.
        """
        job = Job() if job is None else job
        self._last = train.train_iters if train.exit_iters is None else train.exit_iters
        begin = time.monotonic()
        self._deadline = None if train.exit_duration_minutes is None else begin + 60.0 * train.exit_duration_minutes
        left = None if job.end_time is None else job.end_time - time.time()
        self._job_end = None if left is None else begin + left
        self._lead = 0.0 if left is None else min(_LEAD_SHARE * max(left, 0.0), _LEAD_SECONDS)
        self._slowest_round = self._slowest_save = 0.0
        self._last_check: float | None = None
        self._record = job.record
        self._first: int | None = None
        self._saved = 0
        self._told: tuple[str, int, str] = ("running", 0, "")
        self._signal: int | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)
        resource_tracker.ensure_running()  # where it starts later, it leaves SIGTERM unblocked (Python 3.11, 3.12)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def check(self, state: TrainState, save_seconds: float | None = None) -> str | None:
        """Say why to stop before the next iteration, or None to go on. Every rank calls it.

        `save_seconds` is how long the last save took until it was whole, in the background or not. The first call and
        the last also go into the job's record, as do saves.
        """
        self._time_round()
        self._slowest_save = max(self._slowest_save, save_seconds or 0.0)
        reason = self._find(state)
        if self._first is None:
            self._first = self._saved = state.iteration
            self._tell("running", state.iteration)
        if reason is None:
            return None
        self._tell(reason.outcome, state.iteration, reason.text)
        return reason.text

    def note_saved(self, iteration: int) -> None:
        """Write down that a checkpoint is whole: the job's next start begins there. Every rank may call it."""
        self._saved = iteration
        self._tell(*self._told)

    def _find(self, state: TrainState) -> Reason | None:
        if state.iteration >= self._last:
            return Reason("finished", f"finished: {state.iteration} iterations")
        mine = self._own_reason()
        if not groups.any_rank(mine is not None):
            return None
        found: list[Reason | None] = groups.gather_objects(mine)
        return next(reason for reason in found if reason is not None)

    def _own_reason(self) -> Reason | None:
        asked = self._signal or max(signal.sigpending().intersection(_SIGNALS), default=None)
        if asked is not None:
            return Reason("stopped", f"asked by {signal.Signals(asked).name}")
        now = time.monotonic()
        if self._job_end is not None and now >= self._job_end - self._needed():
            return Reason("stopped", f"the job ends in {self._job_end - now:.0f} s")
        if self._deadline is not None and now >= self._deadline:
            return Reason("finished", "train.exit_duration_minutes has passed")
        return None

    def _needed(self) -> float:
        """Seconds before the job's end at which another iteration is one too many.

        Twice the longest time that an iteration took, with the validation and the save that went with it: one for the
        iteration, one for the last save. A save in the background takes longer than it holds up the iteration, and
        the last one begins when the one before it is whole.
        """
        saving = max(self._slowest_round, 2 * self._slowest_save)
        return max(self._lead, self._slowest_round + saving + _LEAVING_SECONDS)

    def _time_round(self) -> None:
        now = time.monotonic()
        if self._last_check is not None:
            self._slowest_round = max(self._slowest_round, now - self._last_check)
        self._last_check = now

    def _tell(self, outcome: str, iteration: int, why: str = "") -> None:
        """Write one line for the batch script: outcome, iteration at the start, of the newest checkpoint, now, why."""
        self._told = outcome, iteration, why
        if self._record is None or groups.where_am_i().rank != 0:
            return
        try:
            write_whole(self._record, f"{outcome} {self._first} {self._saved} {iteration} {why}".rstrip() + "\n")
        except OSError as error:
            # No reason to lose what was trained: the job will only not be requeued.
            _LOG.warning("%s: cannot be written (%s); the job will not go on by itself", self._record, error.strerror)

    def _remember(self, number: int, _: FrameType | None) -> None:
        # Reached through a thread older than this object, in which the signal is not blocked.
        self._signal = number
