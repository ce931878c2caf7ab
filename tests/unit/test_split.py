"""Documents dealt to training and validation, one by one or in stretches: none twice, none lost, evenly."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from megatron_ext.data.split import sequences_of_part, stretches_of_part

SHARES = [(99.0, 1.0), (1.0, 1.0), (90.0, 10.0), (100.0, 0.0), (1.0,), (0.999, 0.001), (3.0, 97.0)]


def single_sequences(documents: int) -> np.ndarray:
    """Document index of a file whose documents are one sequence each."""
    return np.arange(documents + 1)


def members(stretches: np.ndarray) -> list[int]:
    return [document for first, last in stretches.tolist() for document in range(first, last)]


def parts_of(documents: int, shares: tuple[float, ...]) -> list[list[int]]:
    return [members(stretches_of_part(documents, part, shares)) for part in range(len(shares))]


# --- one by one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(99.0, 1.0), (1.0, 1.0), (90.0, 10.0), (100.0, 0.0)])
def test_split_gives_every_document_to_exactly_one_part(shares):
    parts = [sequences_of_part(single_sequences(5000), part, shares) for part in (0, 1)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(5000))


def test_split_gives_each_part_its_share():
    valid = sequences_of_part(single_sequences(100_000), 1, (99.0, 1.0))
    # A golden-ratio sequence strays from its share by at most a few times log(N)/N (discrepancy bound).
    assert abs(len(valid) - 1000) <= 10


def test_split_takes_validation_evenly_from_the_whole_file():
    valid = sequences_of_part(single_sequences(100_000), 1, (99.0, 1.0))
    per_stretch = np.bincount(valid // 2000, minlength=50)
    assert per_stretch.min() >= 17 and per_stretch.max() <= 23


@pytest.mark.parametrize("period", [2, 3, 5, 10, 100])
def test_split_of_a_file_that_alternates_its_sources_takes_all_alike(period):
    valid = sequences_of_part(single_sequences(100 * 1000), 1, (90.0, 10.0))
    per_source = np.bincount(valid % period, minlength=period) / (10_000 / period)
    assert per_source.min() > 0.9 and per_source.max() < 1.1


def test_split_keeps_the_sequences_of_a_document_together():
    # Document d has d % 4 sequences, some none.
    counts = np.arange(400) % 4
    index = np.concatenate([[0], np.cumsum(counts)])
    owner = np.repeat(np.arange(400), counts)
    train, valid = (set(owner[sequences_of_part(index, part, (1.0, 1.0))].tolist()) for part in (0, 1))
    assert train and valid and train.isdisjoint(valid)


# --- in stretches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("documents", [1, 2, 7, 100, 300, 13_001, 100_000])
def test_stretches_give_every_document_to_exactly_one_part(documents, shares):
    assert sorted(sum(parts_of(documents, shares), [])) == list(range(documents))


@pytest.mark.parametrize("shares", [(99.0, 1.0), (90.0, 10.0), (1.0, 1.0), (0.999, 0.001)])
def test_stretches_give_each_part_its_share(shares):
    train, _ = parts_of(1_000_000, shares)
    assert len(train) / 1_000_000 == pytest.approx(shares[0] / sum(shares), rel=0.001)


def test_stretches_take_validation_evenly_from_the_whole_file():
    _, valid = parts_of(1_000_000, (99.0, 1.0))
    per_tenth = np.bincount(np.array(valid) // 100_000, minlength=10)
    assert per_tenth.min() > 900 and per_tenth.max() < 1100


@pytest.mark.parametrize("shares", [(99.0, 1.0), (0.999, 0.001), (1.0, 1.0), (1.0, 99.0)])
def test_stretches_of_a_large_file_are_few(shares):
    for part in (0, 1):
        assert 90 <= len(stretches_of_part(1_000_000, part, shares)) <= 140


def test_stretches_of_a_file_with_few_documents_are_its_documents_dealt_one_by_one():
    for part in (0, 1):
        stretches = stretches_of_part(500, part, (99.0, 1.0))
        assert members(stretches) == sequences_of_part(single_sequences(500), part, (99.0, 1.0)).tolist()


def test_stretches_of_the_only_part_are_the_file():
    assert stretches_of_part(1000, 0, (1.0,)).tolist() == [[0, 1000]]


def test_stretches_of_a_part_without_a_share_are_none():
    assert stretches_of_part(1000, 1, (100.0, 0.0)).tolist() == []


def test_stretches_of_a_file_without_documents_are_none():
    assert stretches_of_part(0, 0, (99.0, 1.0)).tolist() == []


def test_stretches_of_billions_of_documents_are_found_without_an_array_of_them():
    tracemalloc.start()
    stretches = stretches_of_part(10**12, 1, (99.0, 1.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.diff(stretches).sum() == pytest.approx(10**10, rel=0.01)
    assert peak < 10e6
