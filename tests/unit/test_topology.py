"""Rank arithmetic against Megatron's own rule, written by hand."""

import pytest

from megatron_ext.errors import LaunchError
from megatron_ext.parallel.topology import Coordinates, Topology, layers_of_stage


def test_coordinates_tp2_pp2_dp2_follow_megatrons_order() -> None:
    # order tp-cp-ep-dp-pp: tensor-parallel neighbours first, stages last
    topology = Topology(8, 2, 2)
    assert [topology.coordinates(rank) for rank in range(8)] == [
        Coordinates(tp=0, cp=0, dp=0, pp=0),
        Coordinates(tp=1, cp=0, dp=0, pp=0),
        Coordinates(tp=0, cp=0, dp=1, pp=0),
        Coordinates(tp=1, cp=0, dp=1, pp=0),
        Coordinates(tp=0, cp=0, dp=0, pp=1),
        Coordinates(tp=1, cp=0, dp=0, pp=1),
        Coordinates(tp=0, cp=0, dp=1, pp=1),
        Coordinates(tp=1, cp=0, dp=1, pp=1),
    ]


def test_coordinates_context_parallel_varies_before_data_parallel() -> None:
    assert Topology(16, 2, 2, 2).coordinates(2) == Coordinates(tp=0, cp=1, dp=0, pp=0)
    assert Topology(16, 2, 2, 2).coordinates(4) == Coordinates(tp=0, cp=0, dp=1, pp=0)


def test_rank_is_the_inverse_of_coordinates() -> None:
    topology = Topology(48, 2, 3, 2)
    assert [topology.rank(topology.coordinates(rank)) for rank in range(48)] == list(range(48))


def test_data_parallel_size_is_what_the_other_axes_leave() -> None:
    assert Topology(64, 2, 4, 2).data_parallel_size == 4


def test_topology_degrees_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"the number of processes \(6\) must be a multiple .* = 4\)"):
        Topology(6, 2, 2)


def test_layers_of_stage_plain_pipeline_gives_one_run_each() -> None:
    assert [layers_of_stage(8, 2, 1, stage) for stage in range(2)] == [(range(0, 4),), (range(4, 8),)]


def test_layers_of_stage_interleaved_gives_a_run_for_each_chunk() -> None:
    assert layers_of_stage(8, 2, 2, 0) == (range(0, 2), range(4, 6))
    assert layers_of_stage(8, 2, 2, 1) == (range(2, 4), range(6, 8))
