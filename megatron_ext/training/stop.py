"""Why a run stops: it is done, its time is up, or somebody asked."""

from __future__ import annotations

import signal
import time
from types import FrameType

from megatron_ext.config.tree import TrainConfig
from megatron_ext.parallel import groups
from megatron_ext.training.state import TrainState

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Decides, on all ranks alike, whether the loop goes on. A signal only sets a flag, so the iteration ends first."""

    def __init__(self, train: TrainConfig) -> None:
        self._last = train.train_iters if train.exit_iters is None else train.exit_iters
        self._deadline = (
            None if train.exit_duration_minutes is None else time.monotonic() + 60.0 * train.exit_duration_minutes
        )
        self._signal: int | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    def check(self, state: TrainState) -> str | None:
        """Say why to stop before the next iteration, or None to go on. Every rank calls it."""
        if state.iteration >= self._last:
            return f"finished: {state.iteration} iterations"
        asked = self._signal is not None
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if not groups.any_rank(asked or late):
            return None
        reasons = [reason for reason in groups.gather_objects(self._reason(late)) if reason]
        return reasons[0]

    def _reason(self, late: bool) -> str | None:
        if self._signal is not None:
            return f"asked by {signal.Signals(self._signal).name}"
        return "train.exit_duration_minutes has passed" if late else None

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._signal = number
