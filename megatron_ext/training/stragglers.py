"""Find the rank that the others wait for again and again.

Every iteration takes all ranks equally long, since they wait for each other; what tells them apart is how much of it
each spends with work of its own. The watchdog's looks at the main thread measure that, at no cost: a rank that is slow
in its data, its Python, or, on the CPU, its computation, is in no collective while the others are. On CUDA the device's
own slowness does not show there (the host waits for the device on every rank alike), so the rate of matrix products is
measured beside it. A slow link shows in neither: it is the preflight's to find.

Compared are ranks of one pipeline stage; stages have work of different size by design.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ext.config.tree import Config
from megatron_ext.parallel import device, groups, probe
from megatron_ext.parallel.groups import Place
from megatron_ext.parallel.launch import read_launch
from megatron_ext.training.watchdog import OwnTime, Watchdog

_LOG = logging.getLogger(__name__)
_LEAST_SECONDS = 5.0
"""Of iterations, before ranks are compared: some fifty looks."""
_PERSISTENCE = 3
"""Comparisons in a row that must find the same rank: a neighbour that takes a core for a moment is no straggler."""
_LEAST_SHARE = 0.1
"""Of an iteration, that a rank must keep the others waiting for: twice as long as nothing is nothing."""


class Figures(NamedTuple):
    """What one rank measured."""

    stage: int
    node: str
    own_seconds: float
    """Per iteration, outside of collectives."""
    iteration_seconds: float
    mostly: str
    """Where it was found most often at work of its own."""
    matmul_flops: float
    """Of its device, per second; 0: not measured."""


class Straggler(NamedTuple):
    """A rank that is slower than its peers."""

    rank: int
    node: str
    measure: str
    """own time (seconds per iteration), or matrix products (seconds per 1e12 FLOP)."""
    value: float
    median: float
    mostly: str

    def __str__(self) -> str:
        place = f", mostly in {self.mostly}" if self.mostly else ""
        unit = "s an iteration" if self.measure == "own time" else "s for 1e12 FLOP"
        return (
            f"rank {self.rank} ({self.node}) is slow: its {self.measure} is {self.value:.3g} {unit}, the median rank's "
            f"{self.median:.3g} ({self.value / self.median:.1f} times){place}"
        )


def find_stragglers(figures: Sequence[Figures], ratio: float) -> list[Straggler]:
    """Find the ranks whose time is `ratio` times the median of their stage's, or more. Pure; figures by rank."""
    found = []
    for stage in sorted({entry.stage for entry in figures}):
        ranks = [rank for rank, entry in enumerate(figures) if entry.stage == stage]
        median = statistics.median_low(figures[rank].own_seconds for rank in ranks)
        for rank in ranks:
            entry = figures[rank]
            excess = entry.own_seconds - median
            if median > 0 and entry.own_seconds >= ratio * median and excess >= _LEAST_SHARE * entry.iteration_seconds:
                found.append(Straggler(rank, entry.node, "own time", entry.own_seconds, median, entry.mostly))
    rated = {rank: 1e12 / entry.matmul_flops for rank, entry in enumerate(figures) if entry.matmul_flops > 0}
    if rated:
        median = statistics.median_low(rated.values())
        for rank, seconds in rated.items():
            if seconds >= ratio * median:
                found.append(Straggler(rank, figures[rank].node, "matrix products", seconds, median, ""))
    return found


class Suspicions:
    """Remembers how often in a row each rank was found slow."""

    def __init__(self) -> None:
        self._times: Counter[tuple[int, str]] = Counter()

    def add(self, found: Sequence[Straggler]) -> tuple[list[Straggler], list[Straggler]]:
        """Take the newest comparison; return those who have been slow long enough, and the new ones among them."""
        self._times = Counter({key: self._times[key] + 1 for key in ((one.rank, one.measure) for one in found)})
        lasting = [one for one in found if self._times[one.rank, one.measure] >= _PERSISTENCE]
        return lasting, [one for one in lasting if self._times[one.rank, one.measure] == _PERSISTENCE]


class Stragglers:
    """Compares the ranks now and then, and remembers who was slow before. Every rank holds one."""

    def __init__(self, config: Config, place: Place, watchdog: Watchdog) -> None:
        self._ratio = config.reliability.straggler_ratio
        self._place = place
        self._node = probe.node_name(read_launch())
        self._watchdog = watchdog
        self._since = 0
        self._begun = False
        self._spent = OwnTime()
        self._suspicions = Suspicions()

    def compare(self, iteration: int) -> list[Straggler]:
        """Return the ranks found slow in each of the last comparisons, and warn of those that were not before.

        Every rank calls it, after the same iteration; the result is the same on all.
        """
        if self._place.world_size == 1:
            return []
        spent = self._watchdog.take_own_time()
        if not self._begun:  # the first iterations compile, fill caches and make links
            self._begun, self._since = True, iteration
            return []
        self._spent = self._spent + spent
        everyone: list[Figures] = groups.gather_objects(self._figures(iteration - self._since))
        if min(entry.iteration_seconds for entry in everyone) * (iteration - self._since) < _LEAST_SECONDS:
            return []
        self._since, self._spent = iteration, OwnTime()
        lasting, new = self._suspicions.add(find_stragglers(everyone, self._ratio))
        if self._place.rank == 0:
            _tell(everyone, new)
        return lasting

    def _figures(self, iterations: int) -> Figures:
        spent, count = self._spent, max(1, iterations)
        mostly = spent.functions.most_common(1)
        return Figures(
            stage=self._place.pipeline_rank,
            node=self._node,
            own_seconds=spent.own_seconds / count,
            iteration_seconds=(spent.own_seconds + spent.waiting_seconds) / count,
            mostly=mostly[0][0] if mostly else "",
            matmul_flops=probe.matmul_rate() if device.is_cuda() else 0.0,
        )


def _tell(everyone: Sequence[Figures], new: Sequence[Straggler]) -> None:
    own = [entry.own_seconds for entry in everyone]
    _LOG.info(
        "own time of the ranks, outside of collectives: %.3g to %.3g s of %.3g s an iteration",
        min(own), max(own), statistics.median(entry.iteration_seconds for entry in everyone),
    )  # fmt: skip
    for straggler in new:
        _LOG.warning("%s", straggler)
