"""Probes: rings and rounds by hand, and what one process measures of itself."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from megatron_ext.parallel import probe
from megatron_ext.parallel.launch import single_process

NODES = ("a", "a", "b", "b", "c")


def test_first_ranks_are_one_of_each_node_in_order():
    assert probe.first_ranks(NODES) == [0, 2, 4]


def test_first_ranks_of_interleaved_nodes_begin_with_rank_0():
    assert probe.first_ranks(("b", "a", "b", "a")) == [0, 1]


@pytest.mark.parametrize(
    ("rank", "rings"),
    [
        (0, {"within nodes": (0, 1), "between nodes": (0, 2, 4)}),
        (3, {"within nodes": (2, 3), "between nodes": (1, 3)}),
        (4, {"between nodes": (0, 2, 4)}),
    ],
)
def test_rings_are_the_node_and_the_ranks_of_the_same_number(rank, rings):
    assert probe.rings(NODES, rank, ()) == rings


def test_pipeline_is_a_ring_of_its_own():
    assert probe.rings(("a", "b"), 1, (0, 1))["pipeline"] == (0, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_each_pair_of_a_ring_meets_once_and_no_rank_has_two_partners_in_a_round(size):
    ring = range(10, 10 + size)
    rounds = zip(*(probe.partners(ring, rank) for rank in ring), strict=True)
    met = []
    for partners in rounds:
        pairs = {(rank, partner) for rank, partner in zip(ring, partners, strict=True) if partner is not None}
        assert pairs == {(partner, rank) for rank, partner in pairs}  # both know of it
        met += sorted(pair for pair in pairs if pair[0] < pair[1])
    neighbours = {tuple(sorted((10 + i, 10 + (i + 1) % size))) for i in range(size)}
    assert sorted(met) == sorted(neighbours)


def test_node_under_srun_is_named_as_slurm_does(monkeypatch):
    from megatron_ext.parallel import launch

    step = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
    }  # fmt: skip
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert probe.node_name(launch.read_launch()) == "gpu08"


def test_best_time_leaves_out_the_first_call_and_keeps_the_shortest(monkeypatch):
    lengths = itertools.chain([9.0, 0.002, 0.004], itertools.repeat(0.003))
    now = 0.0

    def work():
        nonlocal now
        now += next(lengths)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert probe._best_seconds(work, lambda first: first) == pytest.approx(0.003)


@pytest.mark.parametrize(("slowest", "calls"), [(10.0, 2 + 3), (1e-6, 2 + 10)])
def test_number_of_repeats_follows_the_slowest_rank(slowest, calls):
    made = []
    probe._best_seconds(lambda: made.append(1), lambda first: slowest)
    assert len(made) == calls


def test_matmul_leaves_the_random_state_alone(one_process):
    before = torch.get_rng_state()
    assert probe.matmul_rate() > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_one_process_has_no_links_and_no_clock_to_compare(one_process):
    rates = probe.rates(["here"])
    assert (rates.all_reduce, rates.pairs, probe.clock_offset(["here"])) == ({}, {}, None)


def test_directory_that_did_not_exist_is_gone_after_the_look(one_process, tmp_path):
    assert probe.shared_directory(tmp_path / "new" / "run", ["here"]) == {}
    assert list(tmp_path.iterdir()) == []


def test_directory_that_existed_is_left_as_it_was(one_process, tmp_path):
    (tmp_path / "kept").write_text("")
    assert probe.shared_directory(tmp_path, ["here"]) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_directory_that_cannot_be_written_is_told_with_the_reason(one_process, tmp_path):
    (tmp_path / "file").write_text("")
    wrong = probe.shared_directory(tmp_path / "file", ["here"])
    assert wrong == {0: f"{tmp_path / 'file'} cannot be written (File exists)"}


def test_file_that_comes_late_is_waited_for(monkeypatch, tmp_path):
    # As over NFS, whose clients learn of a new file after a moment.
    monkeypatch.setattr(time, "sleep", lambda seconds: probe._token_file(tmp_path, "t", 3).write_text("t"))
    assert probe._see(tmp_path, "t", 3) is None


def test_file_of_another_start_is_not_taken_for_this_one(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "_PATIENCE_SECONDS", 0.0)
    probe._token_file(tmp_path, "t", 0).write_text("other")
    assert probe._see(Path(tmp_path), "t", 0) == f"{tmp_path}: what rank 0 wrote there reads otherwise"


def test_bare_process_is_named_by_its_host():
    import socket

    assert probe.node_name(single_process()) == socket.gethostname()
