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

# Period of a weighted blend: weights are met exactly to 1/PERIOD, and within a period to one sample.
PERIOD = 1 << 20
_ROUNDS = 6


class Permutation:
    """A keyed permutation of [0, size) that is computed, not stored.

    A balanced Feistel network over the next power of four, cycle-walked into range (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains"). Fewer than four steps on average per look-up.
    """

    def __init__(self, size: int, key: str) -> None:
        assert size > 0, size
        self.size = size
        self._half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.sha256(key.encode()).digest()
        self._keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") | 1 for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Map an index of [0, size) to its place."""
        assert 0 <= index < self.size, (index, self.size)
        while True:
            left, right = index >> self._half_bits, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right, key) & self._mask)
            index = (left << self._half_bits) | right
            if index < self.size:
                return index


def _mix(value: int, key: int) -> int:
    # Two multiply-xorshift steps, as in MurmurHash3's finaliser.
    value = ((value + key) * 0x85EBCA6B) & 0xFFFFFFFF
    value ^= value >> 13
    value = (value * (key ^ 0xC2B2AE35)) & 0xFFFFFFFF
    return value ^ (value >> 16)


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
    each of their samples is read exactly once per pass, spread evenly. In the first pass over a source its
    samples come in the source's own (shuffled) order; in each later pass in a new order. The interleaving is held as
    arrays: 10 bytes a place, 2^20 places with weights, one per sample of a pass without.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, seed: int) -> None:
        assert sizes and all(size > 0 for size in sizes), sizes
        self.sizes = tuple(sizes)
        self._seed = seed
        self._permutations: dict[tuple[int, int], Permutation] = {}
        if len(sizes) == 1:
            self._sources = np.zeros(1, dtype=np.int16)
        elif weights is None:
            self._sources = _interleave(np.asarray(sizes, dtype=np.float64), sum(sizes), exact=self.sizes)
        else:
            shares = np.asarray(weights, dtype=np.float64)
            self._sources = _interleave(shares, PERIOD, exact=None)
        self._period = len(self._sources)
        self._ordinals, self._per_period = _ordinals(self._sources, len(sizes))

    def __getitem__(self, k: int) -> Draw:
        """Find the k-th sample of the run, k >= 0."""
        periods, offset = divmod(k, self._period)
        source = int(self._sources[offset])
        ordinal = periods * int(self._per_period[source]) + int(self._ordinals[offset])
        epoch, index = divmod(ordinal, self.sizes[source])
        if epoch > 0:
            index = self._permutation(source, epoch)[index]
        return Draw(source, epoch, index)

    def epochs(self, num_samples: int) -> list[float]:
        """Count the passes over each source that a run of this many samples makes."""
        share = self._per_period / self._period
        return [num_samples * float(s) / size for s, size in zip(share, self.sizes, strict=True)]

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._permutations:
            stale = [other for other in self._permutations if other[0] == source and other[1] < epoch - 1]
            for other in stale:
                del self._permutations[other]
            self._permutations[key] = Permutation(self.sizes[source], f"{self._seed}/{source}/{epoch}")
        return self._permutations[key]


def _interleave(shares: np.ndarray, length: int, exact: Sequence[int] | None) -> np.ndarray:
    """Spread sources evenly over `length` places: source i's j-th sample belongs at (j + 1/2) / count_i.

    Returns:
        [length] int16, the source of each place.
    """
    counts = np.asarray(exact) if exact is not None else _apportion(shares, length)
    positions = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    sources = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return sources[np.argsort(positions, kind="stable")]


def _apportion(shares: np.ndarray, length: int) -> np.ndarray:
    """Split `length` into whole counts in proportion to shares (largest remainders)."""
    exact = shares / shares.sum() * length
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(exact - counts, kind="stable")[::-1][: length - int(counts.sum())]:
        counts[index] += 1
    return counts


def _ordinals(sources: np.ndarray, num_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """Number each source's places within a period; also count them."""
    ordinals = np.empty(len(sources), dtype=np.int64)
    counts = np.zeros(num_sources, dtype=np.int64)
    for source in range(num_sources):
        places = np.flatnonzero(sources == source)
        ordinals[places] = np.arange(len(places))
        counts[source] = len(places)
    return ordinals, counts
