"""The order of samples: every one once per pass, weights met, and nothing but (seed, k) decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from megatron_ext.data import sampler
from megatron_ext.data.sampler import PERIOD, Blend, Draw, Permutation, interleave


def blend_of(
    sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int = 1, first_computed_pass: int = 1
) -> Blend:
    return Blend(sizes, weights, seed=seed, first_computed_pass=first_computed_pass)


def draws(blend: Blend, places: Iterable[int]) -> list[Draw]:
    return [blend[k] for k in places]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097])
def test_permutation_of_any_size_takes_every_value_once(size):
    permutation = Permutation(size, "key")
    assert sorted(permutation[np.arange(size)].tolist()) == list(range(size))


def test_permutation_of_a_quadrillion_is_computed_without_an_array():
    # An array of this size would need eight petabytes.
    size = 10**15
    permutation = Permutation(size, "key")
    found = set(permutation[np.arange(1000)].tolist())
    assert len(found) == 1000
    assert all(0 <= value < size for value in found)


def test_permutation_of_the_least_favourable_size_needs_few_steps(monkeypatch):
    calls = 0
    real = sampler._mix

    def counting(values: np.ndarray, keys: tuple[np.uint32, np.uint32]) -> np.ndarray:
        nonlocal calls
        calls += values.size
        return real(values, keys)

    monkeypatch.setattr(sampler, "_mix", counting)
    permutation = Permutation(4**6 + 1, "key")  # one more than the power of four before: a quarter of the domain
    permutation[np.arange(2000)]
    # Four walks of six rounds are expected, with a deviation of 6 sqrt(12/2000) = 0.46 of the mean of 24.
    assert calls / 2000 < 24 + 5 * 0.46


def test_permutation_of_another_key_is_another():
    first, second = Permutation(1000, "0/0/1"), Permutation(1000, "0/0/2")
    # Two independent permutations share one place on average (Poisson): ten or more have a chance of 1e-7.
    assert np.count_nonzero(first[np.arange(1000)] == second[np.arange(1000)]) < 10


def test_permutation_over_keys_sends_an_index_everywhere_alike():
    places = Counter(int(Permutation(10, f"{key}")[np.zeros(1, dtype=np.int64)][0]) for key in range(2000))
    # Binomial(2000, 1/10): 200 with a deviation of 13.4; five of them.
    assert all(abs(places[value] - 200) < 67 for value in range(10))


def test_permutation_keeps_no_trend_of_its_argument():
    permutation = Permutation(10_000, "key")
    correlation = np.corrcoef(np.arange(10_000), permutation[np.arange(10_000)])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(10_000)


def test_permutation_of_a_key_stays_what_it_was():
    # Recorded at the first release: another order would make resumed runs read samples twice.
    assert Permutation(1000, "1234/0/1")[np.arange(6)].tolist() == [582, 251, 113, 137, 267, 148]
    assert Permutation(10**12, "7/3/2")[np.array([0, 1, 10**12 - 1])].tolist() == [
        750468580031,
        749105773745,
        7531723094,
    ]


def whole_interleaving(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Sort all (source, ordinal) of a period by position, then source: the definition, without a short cut."""
    entries = [((j + 0.5) / count, source, j) for source, count in enumerate(counts) for j in range(count)]
    return [(source, j) for _, source, j in sorted(entries)]


@pytest.mark.parametrize(
    "counts", [[5], [1, 1, 1], [7, 3, 12], [4, 4], [6, 2, 2, 6], [1, 500], [333, 1000, 77, 1], [8] * 50, [3, 0, 2]]
)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_interleave_of_any_stretch_is_that_part_of_the_whole(counts, length):
    whole, total = whole_interleaving(counts), sum(counts)
    for first in range(0, total, length):
        part = interleave(np.array(counts), first, min(first + length, total))
        found = list(zip(part.sources.tolist(), part.ordinals.tolist(), strict=True))
        assert found == whole[first : first + length]


def test_interleave_of_random_counts_is_that_part_of_the_whole():
    generator = np.random.default_rng(5)
    for _ in range(50):
        counts = generator.integers(0, 60, int(generator.integers(1, 30)))
        counts[0] += 1
        first = int(generator.integers(0, counts.sum()))
        part = interleave(counts, first, int(counts.sum()))
        found = list(zip(part.sources.tolist(), part.ordinals.tolist(), strict=True))
        assert found == whole_interleaving(counts.tolist())[first:]


def test_blend_of_a_trillion_samples_is_computed_without_an_array():
    sizes = (10**12, 3 * 10**11, 10)
    around = draws(blend_of(sizes), range(650 * 10**9, 650 * 10**9 + 3000))
    for source in (0, 1):
        indices = [draw.sample for draw in around if draw.source == source]
        assert indices == list(range(indices[0], indices[0] + len(indices)))
    # Half of everything but five samples has been read.
    half = (5 * 10**11, 15 * 10**10)[around[0].source]
    assert abs(around[0].sample - half) <= 5


def test_blend_of_unshuffled_sources_shuffles_the_first_pass():
    first = [draw.sample for draw in draws(blend_of([200], first_computed_pass=0), range(200))]
    assert first != sorted(first)
    assert sorted(first) == list(range(200))


def test_blend_of_unshuffled_sources_has_another_order_in_each_pass():
    blend = blend_of([200], first_computed_pass=0)
    passes = [tuple(draw.sample for draw in draws(blend, range(200 * n, 200 * n + 200))) for n in range(3)]
    assert len(set(passes)) == 3


def test_blend_of_one_source_reads_its_first_pass_in_the_sources_own_order():
    assert draws(blend_of([5]), range(5)) == [Draw(0, 0, index) for index in range(5)]


def test_blend_without_weights_reads_every_sample_once_in_a_pass():
    sizes = (7, 3, 12)
    found = Counter((draw.source, draw.sample) for draw in draws(blend_of(sizes), range(22)))
    assert found == Counter((source, index) for source, size in enumerate(sizes) for index in range(size))


def test_blend_without_weights_spreads_each_source_evenly():
    sizes = (70, 30, 120)
    blend = blend_of(sizes)
    counts = np.zeros(3)
    for k in range(220):
        counts[blend[k].source] += 1
        # Each source is within half a sample of its line, and k within three halves of the sources' sum.
        assert np.abs(counts - (k + 1) * np.array(sizes) / 220).max() < 2


def test_blend_in_a_later_pass_reads_every_sample_once_again():
    blend = blend_of((7, 3, 12))
    found = {(draw.source, draw.sample) for draw in draws(blend, range(22, 44))}
    assert len(found) == 22


def test_blend_counts_the_passes_from_zero():
    blend = blend_of((7, 3))
    assert [blend[k].epoch for k in range(30)] == [0] * 10 + [1] * 10 + [2] * 10


def test_blend_shuffles_every_pass_anew():
    blend = blend_of([200])
    passes = [tuple(draw.sample for draw in draws(blend, range(200 * n, 200 * n + 200))) for n in range(4)]
    assert len(set(passes)) == 4


def test_blend_of_another_seed_shuffles_later_passes_otherwise():
    first, second = ([blend_of([200], None, seed=seed)[k].sample for k in range(200, 400)] for seed in (1, 2))
    assert first != second


def test_blend_shuffles_two_sources_of_equal_size_otherwise():
    blend = blend_of((100, 100))
    later = draws(blend, range(200, 400))
    first, second = ([draw.sample for draw in later if draw.source == source] for source in (0, 1))
    assert first != second


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.2, 0.6)])
def test_blend_with_weights_meets_their_proportion_at_every_moment(weights):
    blend = blend_of((10**6, 10**6), weights)
    taken = 0
    for k in range(2000):
        taken += blend[k].source == 1
        assert abs(taken - 0.75 * (k + 1)) <= 1.5


def test_blend_with_weights_meets_them_exactly_in_a_period():
    blend = blend_of((10**9, 10**9, 10**9), (0.5, 0.3, 0.2))
    # A source's draws are numbered through: the numbers at the end of a period say how many there were.
    end = draws(blend, range(PERIOD, PERIOD + 30))
    counts = np.array([min(draw.sample for draw in end if draw.source == source) for source in range(3)])
    assert counts.sum() == PERIOD
    assert np.abs(counts - np.array([0.5, 0.3, 0.2]) * PERIOD).max() < 1


def test_blend_goes_on_where_a_period_ends():
    # The ordinals must not start anew: sample numbers of a large source go on rising by one.
    blend = blend_of((10**9, 10**9), (1.0, 1.0))
    around = draws(blend, range(PERIOD - 6, PERIOD + 6))
    indices = [draw.sample for draw in around if draw.source == 0]
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    assert len(indices) == 6


def test_blend_with_weights_reads_a_small_source_whole_before_repeating_it():
    blend = blend_of((3, 10**6), (1.0, 1.0))
    indices = [draw.sample for draw in draws(blend, range(24)) if draw.source == 0]
    assert [sorted(indices[at : at + 3]) for at in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_blend_read_in_any_order_gives_the_same_samples():
    places = list(range(0, 3000, 7))
    forwards = draws(blend_of((50, 20), (0.7, 0.3), seed=5), places)
    backwards = draws(blend_of((50, 20), (0.7, 0.3), seed=5), reversed(places))
    assert forwards == backwards[::-1]


def test_blend_counts_the_passes_of_a_run_over_each_source():
    # 100 samples, half of each source: 50 of 10 and 50 of 40.
    assert blend_of((10, 40), (1.0, 1.0)).epochs(100) == pytest.approx([5.0, 1.25])


def test_blend_without_weights_counts_the_same_passes_over_every_source():
    assert blend_of((10, 40, 50)).epochs(250) == pytest.approx([2.5, 2.5, 2.5])
