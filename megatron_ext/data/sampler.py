"""Which sample is the k-th of a run: a pure function of (seed, k), with no memory of the past.

The order does not depend on how long the run is, how many ranks it has, or where it was resumed.
Megatron's own order changes with the number of samples asked for (gpt_dataset.py builds all epochs at
once and shuffles them together), so a run that is prolonged sees data again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Period of a weighted blend: weights are met exactly to 1/PERIOD, and within a period to one sample.
PERIOD = 1 << 20
# Places whose draws are computed together: numpy's cost per call, a few hundred microseconds in all, is shared by them.
_PAGE = 1024
_ROUNDS = 6

Places = npt.NDArray[np.int64]


class Permutation:
    """A keyed permutation of [0, size) that is computed, not stored.

    A balanced Feistel network over the next power of four, cycle-walked into range (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"). Fewer than four steps on average per look-up.
    """

    def __init__(self, size: int, key: str) -> None:
        assert 0 < size <= 1 << 62, size
        self.size = size
        self._half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        self._mask = np.uint32((1 << self._half_bits) - 1)
        digest = hashlib.sha256(key.encode()).digest()
        keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") | 1 for i in range(_ROUNDS)]
        self._keys = [(np.uint32(key), np.uint32(key ^ 0xC2B2AE35)) for key in keys]

    def __getitem__(self, indices: Places) -> Places:
        """Map indices of [0, size) to their places."""
        places = self._step(indices)
        while (outside := np.flatnonzero(places >= self.size)).size:
            places[outside] = self._step(places[outside])
        return places

    def _step(self, indices: Places) -> Places:
        left = (indices >> self._half_bits).astype(np.uint32)
        right = indices.astype(np.uint32) & self._mask
        for keys in self._keys:
            left, right = right, left ^ (_mix(right, keys) & self._mask)
        return (left.astype(np.int64) << self._half_bits) | right


def _mix(value: npt.NDArray[np.uint32], keys: tuple[np.uint32, np.uint32]) -> npt.NDArray[np.uint32]:
    # Two multiply-xorshift steps modulo 2^32, as in MurmurHash3's finaliser.
    value = (value + keys[0]) * np.uint32(0x85EBCA6B)
    value ^= value >> np.uint32(13)
    value *= keys[1]
    return value ^ (value >> np.uint32(16))


class Draw(NamedTuple):
    """Where a sample comes from."""

    source: int
    """Index of the source in the blend."""
    epoch: int
    """Completed passes over that source."""
    sample: int
    """Sample of that source, in [0, size of the source)."""


class Blend:
    """The infinite sequence of samples that a run reads from one or several sources.

    With weights, each source appears in proportion to its weight. Without, the sources are joined so that
    each of their samples is read exactly once per pass, spread evenly. Each pass over a source has an order
    of its own. Nothing is held but one page of draws, whatever the sources' sizes.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int, first_computed_pass: int
    ) -> None:
        """Take what there is to draw from.

        Args:
            sizes: samples of each source.
            weights: share of each source; None: each sample once.
            seed: of the order.
            first_computed_pass: passes from this one on are permuted here: 0, or 1 where the sources have a
                shuffled order of their own, which the first pass then follows.
        """
        assert sizes and all(size > 0 for size in sizes), sizes
        self.sizes = tuple(sizes)
        self._seed = seed
        self._first_computed_pass = first_computed_pass
        self._permutations: dict[tuple[int, int], Permutation] = {}
        self._counts = np.asarray(sizes, dtype=np.int64) if weights is None else _apportion(weights, PERIOD)
        self._period = int(self._counts.sum())
        self._page_key = (-1, -1)
        self._page: tuple[list[int], list[int], list[int]] = ([], [], [])

    def __getitem__(self, k: int) -> Draw:
        """Find the k-th sample of the run, k >= 0."""
        periods, offset = divmod(k, self._period)
        number, place = divmod(offset, _PAGE)
        if self._page_key != (periods, number):
            self._page = self._compute_page(periods, number)
            self._page_key = (periods, number)
        sources, epochs, samples = self._page
        return Draw(sources[place], epochs[place], samples[place])

    def shares(self) -> list[float]:
        """Give the share of the samples that comes from each source."""
        return [float(count) / self._period for count in self._counts]

    def epochs(self, num_samples: int) -> list[float]:
        """Count the passes over each source that a run of this many samples makes."""
        return [num_samples * share / size for share, size in zip(self.shares(), self.sizes, strict=True)]

    def _compute_page(self, periods: int, number: int) -> tuple[list[int], list[int], list[int]]:
        """Compute the sources, epochs and samples of a page of places."""
        first = number * _PAGE
        interleaved = interleave(self._counts, first, min(first + _PAGE, self._period))
        sources = interleaved.sources
        ordinals = periods * self._counts[sources] + interleaved.ordinals
        epochs, samples = np.divmod(ordinals, np.asarray(self.sizes, dtype=np.int64)[sources])
        for source in np.unique(sources):
            for epoch in np.unique(epochs[sources == source]):
                if epoch >= self._first_computed_pass:
                    places = np.flatnonzero((sources == source) & (epochs == epoch))
                    samples[places] = self._permutation(int(source), int(epoch))[samples[places]]
        return sources.tolist(), epochs.tolist(), samples.tolist()

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._permutations:
            stale = [other for other in self._permutations if other[0] == source and other[1] < epoch - 1]
            for other in stale:
                del self._permutations[other]
            self._permutations[key] = Permutation(self.sizes[source], f"{self._seed}/{source}/{epoch}")
        return self._permutations[key]


class Interleaved(NamedTuple):
    """A stretch of an interleaving."""

    sources: Places
    """Source of each place."""
    ordinals: Places
    """How many places of that source come before it."""


def interleave(counts: Places, first: int, last: int) -> Interleaved:
    """Compute the places [first, last) of an even interleaving in which source i has counts[i] places.

    Source i's j-th place belongs at (j + 1/2) / counts[i] of the whole, so that up to any moment t in [0, 1] it has
    had t counts[i] places, to within one half. Hence the place k lies within half the number of sources of
    t = k / sum(counts), and only what lies there is put in order; equal positions go by the source's number.
    """
    total, slack = int(counts.sum()), len(counts) / 2 + 1
    below = _count_before((first - slack) / total, counts)
    above = _count_before((last + slack) / total, counts)
    sources = np.repeat(np.arange(len(counts)), above - below)
    starts = np.cumsum(above - below) - (above - below)
    ordinals = np.arange(len(sources)) - starts[sources] + below[sources]
    order = np.argsort((ordinals + 0.5) / counts[sources], kind="stable")
    order = order[first - int(below.sum()) :][: last - first]
    return Interleaved(sources[order], ordinals[order])


def _count_before(moment: float, counts: Places) -> Places:
    """Count each source's places before a moment (to within one, which `interleave` has slack for)."""
    return np.clip(np.ceil(moment * counts - 0.5), 0, counts).astype(np.int64)


def _apportion(weights: Sequence[float], length: int) -> Places:
    """Split `length` into whole counts in proportion to weights (largest remainders)."""
    shares = np.asarray(weights, dtype=np.float64)
    exact = shares / shares.sum() * length
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(exact - counts, kind="stable")[::-1][: length - int(counts.sum())]:
        counts[index] += 1
    return counts
