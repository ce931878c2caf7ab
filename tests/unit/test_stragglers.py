"""Which rank is slow, from what each measured of itself."""

from __future__ import annotations

from megatron_ext.training.stragglers import Figures, Suspicions, find_stragglers


def rank(own: float, *, stage: int = 0, node: str = "n", flops: float = 0.0) -> Figures:
    return Figures(
        stage=stage, node=node, own_seconds=own, iteration_seconds=1.0, mostly="f (a.py)", matmul_flops=flops
    )


def found(*figures: Figures, ratio: float = 1.3) -> list[tuple[int, str]]:
    return [(straggler.rank, straggler.measure) for straggler in find_stragglers(figures, ratio)]


def test_rank_above_the_ratio_is_found():
    assert found(rank(0.4), rank(0.41), rank(0.9), rank(0.39)) == [(2, "own time")]


def test_one_of_two_is_measured_by_the_other():
    assert found(rank(0.4), rank(0.6)) == [(1, "own time")]


def test_rank_below_the_ratio_is_not_found():
    assert found(rank(0.4), rank(0.41), rank(0.5)) == []


def test_ratio_of_little_is_not_found():
    assert found(rank(0.01), rank(0.01), rank(0.05)) == []  # 40 ms of an iteration of 1 s


def test_stages_are_not_compared_with_each_other():
    assert found(rank(0.2), rank(0.8, stage=1), rank(0.2), rank(0.8, stage=1)) == []


def test_slow_device_is_found_by_its_matrix_products():
    assert found(rank(0.1, flops=6e14), rank(0.1, flops=6e14), rank(0.1, flops=3e14)) == [(2, "matrix products")]


def test_warning_names_rank_node_figures_and_place():
    (straggler,) = find_stragglers([rank(0.2), rank(0.2), rank(0.5, node="n7")], 1.3)
    assert str(straggler) == (
        "rank 2 (n7) is slow: its own time is 0.5 s an iteration, the median rank's 0.2 (2.5 times), mostly in f (a.py)"
    )


def test_only_what_is_found_three_times_in_a_row_lasts_and_is_new_once():
    slow = find_stragglers([rank(0.2), rank(0.5)], 1.3)
    suspicions = Suspicions()
    told = [suspicions.add(found) for found in (slow, slow, [], slow, slow, slow, slow)]
    assert [len(lasting) for lasting, _ in told] == [0, 0, 0, 0, 0, 1, 1]
    assert [len(new) for _, new in told] == [0, 0, 0, 0, 0, 1, 0]
