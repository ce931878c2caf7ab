"""A run in which one rank hangs, stops or dies ends by itself, and says which rank it was. Faults: planted_fault.py."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.parallel.launch import free_port
from tests.conftest import Trainer, child_environment

PLANTED = str(Path(__file__).with_name("planted_fault.py"))
TP2 = ("--parallel.tensor_model_parallel_size", "2")
BASIC = (
    "--parallel.distributed_timeout_minutes", "0.05", "--train.eval_interval", "100000", "--reliability.preflight",
    "false",
)  # fmt: skip
LONG = ("--train.train_iters", "400")


@dataclass
class Ended:
    """Two ranks that ended, or, where one was frozen, were ended."""

    codes: list[int]
    outputs: list[str]
    run_dir: Path

    @property
    def output(self) -> str:
        return "".join(self.outputs)

    def report(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "hang-report.json").read_text())

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["kind"] == kind]


def start(trainer: Trainer, *arguments: str, **variables: str) -> list[subprocess.Popen]:
    """Start two ranks as torchrun would, but without it, so that nothing else ends them; each with more variables."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *arguments], cwd=trainer.work, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment() | {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            } | variables,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def finish(trainer: Trainer, ranks: list[subprocess.Popen], *, frozen: int | None = None) -> Ended:
    """Wait until the ranks have ended by themselves; one that is frozen is killed once the others have."""
    try:
        outputs = {}
        for number in sorted(range(len(ranks)), key=lambda number: number == frozen):
            if number == frozen:
                ranks[number].kill()
            outputs[number], _ = ranks[number].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.returncode for rank in ranks]
    return Ended(codes, [outputs[number] for number in range(len(ranks))], trainer.work / "run")


def run_with_fault(trainer: Trainer, fault: str, rank: int, *overrides: str, **variables: str) -> Ended:
    """Train on two ranks, one of them with a fault at iteration 4."""
    config = str(trainer.config("run"))
    ranks = start(trainer, PLANTED, fault, str(rank), "4", config, *BASIC, *overrides, **variables)
    return finish(trainer, ranks, frozen=rank if fault == "be_stopped" else None)


def test_rank_that_hangs_in_the_loader_is_named_and_every_rank_ends(trainer):
    ended = run_with_fault(trainer, "hang_in_the_loader", 1, *LONG)
    assert all(code > 0 for code in ended.codes), ended.output
    report = ended.report()
    assert report["culprits"] == [1]
    zero, one = report["ranks"]
    assert (zero["iteration"], one["iteration"]) == (4, 4)
    assert zero["waits"] and "all_reduce" in zero["where"]
    assert not one["waits"] and one["where"].startswith("iteration_that_hangs (")
    line = next(line for line in ended.output.splitlines() if "hung" in line and "ERROR" in line)
    assert re.search(r"rank 1 \(.*, pid \d+\) is in iteration 4 for \d+ s: iteration_that_hangs", line)
    assert "rank 0 waits in" in line
    assert "iteration_that_hangs" in (ended.run_dir / "hang-rank1.txt").read_text()
    assert "start_grad_sync" in (ended.run_dir / "hang-rank0.txt").read_text()
    assert "hung" in ended.rows("stop")[-1]["reason"]
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_rank_0_that_is_frozen_is_named_by_the_other(trainer):
    ended = run_with_fault(trainer, "be_stopped", 0, *LONG)
    assert ended.codes[1] > 0, ended.output
    assert re.search(r"rank 0 \(.*\) has not been heard of for \d+ s", ended.outputs[1])
    assert ended.report()["culprits"] == [0]


@pytest.mark.slow
def test_rank_that_is_frozen_is_named_by_rank_0(trainer):
    ended = run_with_fault(trainer, "be_stopped", 1, *LONG)
    assert ended.codes[0] > 0, ended.output
    assert re.search(r"rank 1 \(.*\) has not been heard of for \d+ s", ended.outputs[0])
    assert ended.report()["culprits"] == [1]


@pytest.mark.slow
def test_ranks_in_different_collectives_are_both_named(trainer):
    ended = run_with_fault(trainer, "leave_out_a_collective", 1, *LONG)
    assert all(code > 0 for code in ended.codes), ended.output
    zero, one = ended.report()["ranks"]
    assert "all_reduce" in zero["where"] and "all_gather_object, called by gather_objects" in one["where"]


@pytest.mark.slow
def test_hang_under_tensor_parallelism_names_the_rank(trainer):
    ended = run_with_fault(trainer, "hang_in_the_loader", 0, *LONG, *TP2)
    assert all(code > 0 for code in ended.codes), ended.output
    assert ended.report()["culprits"] == [0]
    assert "broadcast" in ended.report()["ranks"][1]["where"]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_survivor_of_a_dead_rank_says_so_in_one_line(dead, trainer):
    ended = run_with_fault(trainer, "die", dead, *LONG)
    survivor = 1 - dead
    assert ended.codes[survivor] > 0 and ended.codes[dead] == -signal.SIGKILL, ended.output
    said = [line for line in ended.outputs[survivor].splitlines() if "is gone" in line]
    assert any(f"rank {dead} (" in line and "its process ended without a word" in line for line in said)
    assert any("iteration 4" in line for line in said)
    assert "Traceback" not in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die", "be_stopped"])
def test_other_node_tells_the_batch_script_of_a_rank_0_that_cannot(fault, trainer):
    record = trainer.work / "record"
    each_on_a_node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MEGAPINTS_JOB_RECORD": str(record)}
    ended = run_with_fault(trainer, fault, 0, *LONG, **each_on_a_node)
    assert ended.codes[1] > 0, ended.output
    assert record.read_text().startswith("failed 0 0 0 failed: rank 0 (")


@pytest.mark.slow
def test_error_of_one_rank_is_repeated_by_the_other_and_keeps_its_traceback(trainer):
    ended = run_with_fault(trainer, "fail", 1, *LONG)
    assert all(code > 0 for code in ended.codes)
    assert "ValueError: planted" in ended.outputs[1] and "Traceback" in ended.outputs[1]
    assert "rank 1 (" in ended.outputs[0] and "is gone: failed: ValueError: planted" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]
    assert "ValueError: planted" in ended.rows("stop")[-1]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_launcher_ends_with_an_error_after_a_hang(launcher, trainer):
    *launch, _, config = trainer.command("run", ranks=2)
    if launcher == "mpiexec":
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        launch = [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    command = [*launch, PLANTED, "hang_in_the_loader", "1", "4", config, *BASIC, *LONG]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=child_environment(), cwd=trainer.work
    )
    assert done.returncode > 0
    assert json.loads((trainer.work / "run" / "hang-report.json").read_text())["culprits"] == [1]


@pytest.mark.slow
def test_job_that_was_suspended_for_longer_than_the_timeout_goes_on_as_if_nothing_had_been(trainer):
    # Rank 1 is slow, so that rank 0 is found waiting in a collective when it goes on, a moment before rank 1 does.
    config = str(trainer.config("run"))
    ranks = start(trainer, PLANTED, "be_slow", "1", "4", config, *BASIC, "--train.train_iters", "30")
    metrics = trainer.work / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') > 5):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    time.sleep(0.25)  # rank 0 is through with its own part of the next iteration
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(8)  # more than twice the timeout
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
        time.sleep(1)
    ended = finish(trainer, ranks)
    assert ended.codes == [0, 0], ended.output
    assert not list(ended.run_dir.glob("hang-*"))
    assert "hung" not in ended.output and "is gone" not in ended.output


def test_replica_with_a_flipped_bit_stops_the_run_and_is_named(trainer):
    overrides = ("--reliability.replica_check_interval", "4", "--checkpoint.save_interval", "4")
    ended = run_with_fault(trainer, "flip_a_bit", 1, *overrides)
    assert ended.codes == [2, 2], ended.output
    assert "iteration 4: the weights of replicas differ: rank 1 (" in ended.outputs[0]
    assert "in 1 of 27 parameters (decoder.layers.0.self_attention.linear_qkv.weight)" in ended.outputs[0]
    assert not list((ended.run_dir / "checkpoints").glob("iter_*"))  # that iteration's save was due
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_healthy_replicas_are_only_noted(trainer):
    overlap = (
        "--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true",
        "--parallel.ddp_bucket_size", "2000",
    )  # fmt: skip
    finished = trainer.train("healthy", "--reliability.replica_check_interval", "2", *overlap, ranks=2)
    checks = finished.rows("replicas")
    assert [row["iteration"] for row in checks] == [2, 4]
    assert checks[0]["checksum"] != checks[1]["checksum"]
    assert "differ" not in finished.output


@pytest.mark.slow
def test_slow_rank_is_named_and_a_healthy_one_is_not(trainer):
    overrides = ("--train.train_iters", "70", "--reliability.straggler_interval", "5", "--reliability.straggler_ratio")
    ended = run_with_fault(trainer, "be_slow", 1, *overrides, "1.5")
    assert ended.codes == [0, 0], ended.output
    warnings = [line for line in ended.output.splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "rank 1 (" in warnings[0] and "slow_forward_step" in warnings[0]
    rows = ended.rows("straggler")
    assert {row["rank"] for row in rows} == {1} and rows[0]["measure"] == "own time"
