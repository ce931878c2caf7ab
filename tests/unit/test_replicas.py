"""Which replica differs, and where, from the sums of all ranks."""

from __future__ import annotations

from megatron_ext.training.replicas import Weights, describe_difference

NAMES = ["a", "b", "c", "d", "e"]


def describe(*sums: list[int], shares: list[tuple[int, int]] | None = None) -> str | None:
    shares = shares or [(0, 0)] * len(sums)
    found = [Weights(shares[rank], f"n{rank}", hash(tuple(values))) for rank, values in enumerate(sums)]
    return describe_difference(found, sums, [NAMES] * len(sums))


def test_equal_replicas_have_no_difference():
    assert describe([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) is None


def test_odd_one_of_three_is_named_with_its_node_and_the_parameters():
    text = describe([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 9, 3, 4, 5])
    assert text == "rank 2 (n2) differs from ranks 0-1, in 1 of 5 parameters (b)"


def test_two_that_differ_cannot_be_told_apart():
    assert "which of them is right cannot be told" in (describe([1, 2, 3, 4, 5], [1, 2, 3, 4, 6]) or "")


def test_only_the_first_differing_parameters_are_named():
    text = describe([0] * 5, [0] * 5, [1] * 5) or ""
    assert "in 5 of 5 parameters (a, b, c, …)" in text


def test_ranks_of_other_shares_are_not_compared():
    assert describe([1] * 5, [2] * 5, shares=[(0, 0), (0, 1)]) is None


def test_difference_within_a_share_names_its_ranks_only():
    shares = [(0, 0), (0, 1), (0, 0), (0, 1), (0, 0), (0, 1)]
    text = describe([1] * 5, [2] * 5, [1] * 5, [2, 2, 7, 2, 2], [1] * 5, [2] * 5, shares=shares)
    assert text == "rank 3 (n3) differs from ranks 1, 5, in 1 of 5 parameters (c)"
