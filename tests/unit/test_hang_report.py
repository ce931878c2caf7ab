"""From what each rank said last to the rank that the others wait for."""

from __future__ import annotations

import json

from megatron_ext.training.hang_report import RankReport, diagnose, name_ranks

REDUCE = "all_reduce, called by _reduce (megatron/core/tensor_parallel/mappings.py:36)"
GATHER = "all_gather, called by gather (x.py:1)"


def rank(number: int, **values) -> RankReport:
    usual = {
        "node": f"n{number // 2}", "pid": 100 + number, "state": "here", "iteration": 42, "phase": "iteration",
        "seconds": 600.0, "waits": True, "where": REDUCE,
    }  # fmt: skip
    return RankReport(rank=number, **{**usual, **values})


def test_rank_outside_of_a_collective_is_the_one_waited_for():
    loader = "_read (megatron_ext/data/loader.py:84)"
    report = diagnose([rank(0), rank(1), rank(2), rank(3, waits=False, where=loader)])
    assert report.culprits == (3,)
    assert report.verdict == (
        f"rank 3 (n1, pid 103) is in iteration 42 for 600 s: {loader}; ranks 0-2 wait in {REDUCE}"
    )


def test_rank_behind_the_others_is_the_one_waited_for():
    report = diagnose([rank(0), rank(1, iteration=41), rank(2)])
    assert report.culprits == (1,)
    assert "rank 1 (n0, pid 101) is in iteration 41" in report.verdict


def test_silent_rank_is_named_with_its_silence_and_its_last_place():
    report = diagnose([rank(0), rank(1, state="silent", silent_seconds=14.2, waits=False, where="f (a.py:1)")])
    assert report.culprits == (1,)
    assert "rank 1 (n0, pid 101) has not been heard of for 14 s" in report.verdict
    assert "last seen in iteration 42: f (a.py:1)" in report.verdict


def test_rank_that_is_gone_comes_before_one_that_is_busy():
    report = diagnose(
        [rank(0), rank(1, state="lost", why="its process ended"), rank(2, waits=False, where="f (a.py:1)")]
    )
    assert report.culprits == (1,)
    assert "rank 1 (n0, pid 101) is gone: its process ended" in report.verdict


def test_single_rank_in_another_collective_is_the_one_waited_for():
    assert diagnose([rank(0), rank(1), rank(2, where=GATHER)]).culprits == (2,)


def test_halves_in_different_collectives_accuse_nobody_and_name_both():
    report = diagnose([rank(0), rank(1), rank(2, where=GATHER), rank(3, where=GATHER)])
    assert report.culprits == ()
    assert f"ranks 0-1 wait in {REDUCE}" in report.verdict and f"ranks 2-3 wait in {GATHER}" in report.verdict


def test_all_in_the_same_collective_accuse_nobody():
    report = diagnose([rank(0), rank(1)])
    assert report.culprits == () and "a link has failed" in report.verdict


def test_rank_that_has_left_in_order_is_not_accused():
    assert diagnose([rank(0), rank(1, state="left", phase="end"), rank(2, waits=False)]).culprits == (2,)


def test_many_ranks_alike_take_one_line_of_the_table():
    report = diagnose([rank(0), rank(1), rank(2, seconds=601.0), rank(3, waits=False, where="f (a.py:1)")])
    assert report.table == (f"ranks 0-2: iteration 42, 601.0 s: {REDUCE}", "rank 3: iteration 42, 600.0 s: f (a.py:1)")


def test_report_survives_json():
    report = diagnose([rank(0), rank(1, waits=False)])
    found = json.loads(json.dumps(report.to_json()))
    assert found["culprits"] == [1]
    assert found["ranks"][1]["pid"] == 101 and found["ranks"][1]["iteration"] == 42


def test_ranks_are_written_as_spans():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([5, 0, 1, 2, 7, 8]) == "ranks 0-2, 5, 7-8"
