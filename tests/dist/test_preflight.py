"""Preflight over several real ranks: what it tells of a healthy run, and what it refuses; faults come from outside."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.config.load import load_config
from megatron_ext.training.preflight import checkpoint_bytes
from tests.conftest import ROOT, Finished, child_environment

FAULTS = Path(__file__).with_name("preflight_faults.py")
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def healthy(module_trainer):
    return module_trainer.train("healthy", ranks=2)


def seen(finished: Finished) -> dict:
    return json.loads((finished.run_dir / "preflight.json").read_text())


def test_healthy_run_tells_what_it_stands_on(healthy):
    told = [
        line.partition("preflight: ")[2].split("  ")[0] for line in healthy.output.splitlines() if "preflight" in line
    ]
    assert told == ["ranks", "versions", "matmul", "all-reduce", "pairs", "run directory", "disk", "data"]


def test_healthy_run_records_every_rank(healthy):
    ranks = seen(healthy)["ranks"]
    assert [(rank["rank"], rank["node"]) for rank in ranks] == [(0, HOST), (1, HOST)]
    assert all(rank["matmul_flops"] > 0 and set(rank["all_reduce"]) == {"world", "data"} for rank in ranks)
    assert [list(rank["pairs"]["within nodes"]) for rank in ranks] == [["1"], ["0"]]


def test_healthy_run_leaves_no_token_behind(healthy):
    assert not list(healthy.run_dir.glob(".preflight*"))


def test_estimated_checkpoint_is_that_of_its_tensors(module_trainer, healthy):
    folder = healthy.run_dir / "checkpoints" / "iter_0000005"
    stored = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata.values()
    real = sum(
        tensor.size.numel() * tensor.properties.dtype.itemsize
        for tensor in stored
        if isinstance(tensor, TensorStorageMetadata)
    )
    # The optimizer's buffers are padded, here by 288 of 44,320 numbers.
    assert checkpoint_bytes(load_config(module_trainer.config("healthy"))) == pytest.approx(real, rel=0.01)


def with_faults(trainer, faults: str, command: list[str], program: str) -> subprocess.CompletedProcess:
    script = next(i for i, word in enumerate(command) if word.endswith("pretrain_pints.py"))
    command[script : script + 1] = [str(FAULTS), faults, program]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=child_environment(), cwd=trainer.work
    )


@pytest.fixture(scope="module")
def refused(module_trainer):
    """Two ranks, of which rank 1 does not have the run directory, on a disk that is nearly full."""
    command = module_trainer.command("refused", "--run_dir", "relative", ranks=2)
    return with_faults(module_trainer, "elsewhere,small_disk", command, "pretrain_pints")


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_run_whose_directory_a_rank_does_not_see_is_refused(refused, module_trainer):
    (line,) = [line for line in errors(refused) if "run directory" in line]
    assert line.startswith(f"error: preflight: node {HOST} (rank 1): run directory ")
    assert "what rank 0 wrote there is not seen" in line


def test_run_with_too_little_disk_is_refused_before_the_first_iteration(refused, module_trainer):
    (line,) = [line for line in errors(refused) if "free" in line]
    run_dir = module_trainer.work / "relative"
    assert line.startswith(f"error: preflight: node {HOST}: {run_dir} has 0.1 MiB free, and a checkpoint takes ")
    assert refused.returncode != 0 and Finished(0, "", run_dir).rows("train") == []


def test_refused_run_tells_each_failure_once_and_no_traceback(refused):
    assert len(errors(refused)) == 2
    assert "megatron_ext" not in refused.stderr  # torchrun tells a traceback of its own, but none is ours


@pytest.fixture(scope="module")
def findings(module_trainer):
    """What tools/preflight.py finds on three ranks with one fault each and more."""
    command = module_trainer.command("tool", ranks=3)[:-1]
    faults = "own_nodes,slow_device,slow_card,fast_clock,other_torch"
    done = with_faults(module_trainer, faults, [*command, "--json"], "tools.preflight")
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)["findings"]


@pytest.mark.parametrize(
    ("level", "where", "what"),
    [
        ("error", "node n2 (rank 2)", "torch is 1.0, on the other ranks "),
        ("warning", "node n1", "its clock is 100.0 s ahead of that of node n0"),
        ("warning", "node n1 (rank 1)", "matmul at "),
        ("warning", "node n2 (rank 2)", "exchanges between nodes at "),
    ],
)
def test_planted_fault_is_found_with_its_node(level, where, what, findings):
    (found,) = [finding for finding in findings if finding["what"].startswith(what)]
    assert (found["level"], found["where"]) == (level, where)


def test_planted_faults_are_all_that_is_found(findings):
    assert len(findings) == 4


def test_tool_without_a_config_passes_on_one_process(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "preflight.py"), "--strict"],
        capture_output=True, text=True, timeout=120, env=child_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"1 on 1 node ({HOST})" in done.stdout and not list(tmp_path.iterdir())
