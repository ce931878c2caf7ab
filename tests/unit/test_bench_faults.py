"""What a fault campaign compares, and what it must not let pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.fault_report import Comparison, compare, held, report
from megatron_ext.checkpoint.dcp import TensorInfo, WriteRequest, write_checkpoint
from tests.conftest import ROOT

LAST = 3
SAME = Comparison(3, 6, 1, [], [], [], [])
KILL = {
    "number": 1, "launcher": "plain", "async_save": True, "aim": "save", "killed": "rank 0", "phase": "in save",
    "iteration": 7, "ended_seconds": 0.25, "left_over": 0, "leftover_seconds": 0.5, "resumes_from": 6,
    "redone_iterations": 1, "problems": [],
}  # fmt: skip
RESULT = {"seed": 1, "ranks": 2, "seconds": 60.0, "kills": [KILL], "problems": [], "comparison": SAME._asdict()}


def write_run(folder: Path, *, samples=(0, 1, 2, 3, 4, 5), losses=(3.0, 2.0, 1.0), weight=1.0) -> Path:
    """Write what a run of three iterations with two samples each leaves behind."""
    lines = [{"start": "A", "iteration": 0, "data_size": 1, "sources": ["data/a"]}]
    rows = []
    for index in range(LAST):
        given = samples[2 * index : 2 * index + 2]
        lines.append({"start": "A", "iteration": index + 1, "samples": [[k, 0, 0, k] for k in given]})
        figures = {"grad_norm": 1.0, "lr": 0.1, "consumed_samples": 2 * index, "consumed_tokens": 8 * index}
        rows.append({"kind": "train", "iteration": index + 1, "loss": losses[index], **figures})
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "data_rank_0000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = folder / "checkpoints" / "iter_0000003"
    directory.mkdir(parents=True)
    write_checkpoint(
        directory,
        {"weight": TensorInfo((4,), torch.float32)},
        [WriteRequest("weight", None)],
        lambda _: torch.full((4,), weight),
        common={},
    )
    return folder


@pytest.fixture
def undisturbed(tmp_path):
    return write_run(tmp_path / "undisturbed")


def test_run_that_did_the_same_is_equal(undisturbed, tmp_path):
    assert compare(write_run(tmp_path / "run"), undisturbed, last=LAST) == SAME


def test_sample_in_place_of_another_is_found(undisturbed, tmp_path):
    found = compare(write_run(tmp_path / "run", samples=(0, 1, 2, 4, 4, 5)), undisturbed, last=LAST)
    assert (found.differing_iterations, found.out_of_order) == ([2], [3])


def test_lost_samples_are_found(undisturbed, tmp_path):
    found = compare(write_run(tmp_path / "run", samples=(0, 1, 4, 5, 6, 7)), undisturbed, last=LAST)
    assert (found.differing_iterations, found.out_of_order) == ([2, 3], [2, 3, 4, 5])


def test_iteration_that_was_never_made_is_found(undisturbed, tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("samples/data_rank_0000.jsonl", "metrics.jsonl"):
        (run / name).write_text("".join((run / name).read_text().splitlines(keepends=True)[:-1]))
    found = compare(run, undisturbed, last=LAST)
    assert (found.differing_iterations, found.differing_metrics) == ([3], [3])


def test_loss_that_differs_in_the_last_bit_is_found(undisturbed, tmp_path):
    found = compare(write_run(tmp_path / "run", losses=(3.0, 2.0000000000000004, 1.0)), undisturbed, last=LAST)
    assert found.differing_metrics == [2]


def test_iteration_that_came_out_otherwise_once_is_found(undisturbed, tmp_path):
    run = write_run(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows.splitlines()[0].replace("3.0", "3.5") + "\n" + rows)
    assert compare(run, undisturbed, last=LAST).differing_metrics == [1]


def test_parameter_that_differs_in_the_last_bit_is_found(undisturbed, tmp_path):
    found = compare(write_run(tmp_path / "run", weight=1.0000001192092896), undisturbed, last=LAST)
    assert found.differing_tensors == ["weight"]


def test_campaign_in_which_nothing_differs_holds():
    assert held(RESULT)


@pytest.mark.parametrize(
    "change",
    [
        {"kills": [KILL | {"problems": ["resumed from 3, and 6 was whole"]}]},
        {"problems": ["the last start failed (exit codes [1, 1])"]},
        {"comparison": None},
        {"comparison": SAME._replace(differing_tensors=["weight"])._asdict()},
        {"comparison": SAME._replace(out_of_order=[4])._asdict()},
    ],
)
def test_campaign_with_a_flaw_does_not_hold_and_says_so(change):
    assert not held(RESULT | change)
    assert report(RESULT | change).endswith("It did NOT hold.")


def test_report_has_a_line_for_each_kill():
    lines = report(RESULT).splitlines()
    assert "| 1 | plain | async | rank 0 | in save | 7 | 0.8 s | 6 | 1 | ok |" in lines
    assert lines[-1] == "Everything held."


def test_folder_that_is_there_already_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "faults.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path} is there already; name a new folder.\n")
