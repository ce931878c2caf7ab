"""Stopping and resuming changes nothing: parameters, optimizer and metrics, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.conftest import child_environment

TP2 = ("--parallel.tensor_model_parallel_size", "2")
PP2 = ("--parallel.pipeline_model_parallel_size", "2")
RESHARDABLE = ("--checkpoint.optimizer_format", "fully_reshardable")
TWENTY = ("--train.train_iters", "20")
OVERLAP = (
    "--parallel.overlap_grad_reduce", "true", "--parallel.overlap_param_gather", "true",
    "--parallel.ddp_bucket_size", "2000",
)  # fmt: skip
LAYOUTS = {"one_process": (1, ()), "tp2": (2, TP2), "pp2": (2, PP2), "dp2": (2, ()), "dp2_overlap": (2, OVERLAP)}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint, model and optimizer, with torch's own reader."""
    reader = dcp.FileSystemReader(str(path))
    entries = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert any("optimizer" in key for key in state) and any(key.startswith("decoder") for key in state)
    return state


def metrics(finished):
    names = ("iteration", "loss", "grad_norm", "lr", "consumed_samples")
    return [tuple(row[name] for name in names) for row in finished.rows()]


QUICK = {("one_process", False), ("dp2_overlap", True)}
"""What `make test` runs of the cases below; .ci/run runs them all."""


@pytest.mark.parametrize(
    ("layout", "asynchronous"),
    [
        pytest.param(layout, asynchronous, marks=() if (layout, asynchronous) in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for asynchronous in (False, True)
    ],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(layout, asynchronous, trainer):
    ranks, overrides = LAYOUTS[layout]
    saving = ("--checkpoint.async_save", "true", "--checkpoint.save_interval", "5") if asynchronous else ()
    # No validation near the stop: it would gather what an overlapped gather still owes.
    overrides = (*overrides, *TWENTY, *saving, "--train.eval_interval", "7")
    # The stop in the middle is saved as dp_reshardable, the default. What is compared is saved as fully_reshardable:
    # by parameter, without the gaps between parameters in Megatron's buffers, which hold whatever memory held.
    straight = trainer.train("straight", *overrides, *RESHARDABLE, ranks=ranks)
    first = trainer.train("parted", *overrides, "--train.exit_iters", "10", ranks=ranks)
    assert "finished: 10 iterations" in first.output
    second = trainer.train("parted", *overrides, *RESHARDABLE, ranks=ranks)
    assert "continuing after iteration 10 of 20" in second.output
    assert metrics(second) == metrics(straight)
    expected, found = (read_tensors(run.run_dir / "checkpoints" / "iter_0000020") for run in (straight, second))
    assert expected.keys() == found.keys()
    differing = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not differing


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_rows_of_a_run_that_stopped_between_two_are_those_of_an_undisturbed_one(layout, trainer):
    ranks, overrides = LAYOUTS[layout]
    overrides = (*overrides, *TWENTY, "--log.interval", "10", "--train.eval_interval", "100")
    straight = trainer.train("straight", *overrides, ranks=ranks)
    trainer.train("parted", *overrides, "--train.exit_iters", "17", ranks=ranks)
    parted = trainer.train("parted", *overrides, ranks=ranks)
    assert "continuing after iteration 17 of 20" in parted.output
    assert metrics(parted) == metrics(straight) and [row["iteration"] for row in straight.rows()] == [10, 20]


@pytest.fixture(scope="module")
def saved_on_eight(module_trainer):
    """Ten iterations at TP2 x PP2 x DP2, and twenty straight in one process to compare with."""
    module_trainer.train("eight", *TWENTY, *RESHARDABLE, *TP2, *PP2, "--train.exit_iters", "10", ranks=8)
    return module_trainer.train("reference", *TWENTY)


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        pytest.param("to_one", 1, (), marks=pytest.mark.slow),
        pytest.param("to_tp2", 2, TP2, marks=pytest.mark.slow),
        pytest.param("to_pp2", 2, PP2, marks=pytest.mark.slow),
        pytest.param("to_dp4", 4, (), marks=pytest.mark.slow),
    ],
)
def test_reshardable_checkpoint_continues_in_another_layout(name, ranks, overrides, saved_on_eight, module_trainer):
    _copy_run(module_trainer.work / "eight", module_trainer.work / name)
    finished = module_trainer.train(name, *TWENTY, *RESHARDABLE, *overrides, ranks=ranks)
    assert "continuing after iteration 10 of 20" in finished.output
    expected = [row["loss"] for row in saved_on_eight.rows()]
    # The first ten iterations ran on eight ranks: sums in another order throughout.
    assert [row["loss"] for row in finished.rows()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_dp_reshardable_checkpoint_continues_with_more_data_parallel_ranks(saved_on_eight, trainer):
    trainer.train("grown", *TWENTY, "--train.exit_iters", "10", ranks=2)
    finished = trainer.train("grown", *TWENTY, ranks=4)
    expected = [row["loss"] for row in saved_on_eight.rows()]
    assert [row["loss"] for row in finished.rows()] == pytest.approx(expected, rel=1e-5)


def test_dp_reshardable_checkpoint_at_another_tensor_size_is_refused(trainer):
    trainer.train("moved")
    finished = trainer.train("moved", "--train.train_iters", "9", *TP2, ranks=2, fails=True)
    assert finished.returncode != 0
    assert "tensor_model_parallel_size 1 -> 2" in finished.output
    assert "fully_reshardable" in finished.output
    assert "megatron_ext" not in finished.output  # torchrun tells a traceback of its own, but none is ours


def test_dp_reshardable_checkpoint_with_other_buckets_is_refused(trainer):
    trainer.train("rebucketed")
    finished = trainer.train("rebucketed", "--train.train_iters", "9", *OVERLAP, fails=True)
    assert finished.returncode == 2
    assert "parallel.ddp_bucket_size None -> 2000" in finished.output
    assert "Traceback" not in finished.output


def test_killed_during_a_save_loses_only_the_work_since_the_last_whole_checkpoint(trainer):
    running = ("--train.train_iters", "4000", "--checkpoint.save_interval", "5", "--train.eval_interval", "100000")
    checkpoints = trainer.work / "killed" / "checkpoints"
    process = subprocess.Popen(
        trainer.command("killed", *running), env=child_environment(), cwd=trainer.work,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        half_written = _wait_for(lambda: _being_written(checkpoints, after=5))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert half_written.name.endswith(".tmp")
    whole = sorted(path.name for path in checkpoints.glob("iter_???????"))
    resumed = trainer.train("killed", *running, "--train.exit_iters", str(int(whole[-1][5:]) + 1))
    assert f"resumed from {checkpoints / whole[-1]}" in resumed.output
    assert f"ignored {half_written}" in resumed.output
    # Its space is free before preflight looks.
    removed = resumed.output.index(f"removed what earlier starts left in {checkpoints}: {half_written.name}")
    assert removed < resumed.output.index("preflight: disk") and not half_written.exists()
    assert resumed.rows()[-1]["iteration"] == int(whole[-1][5:]) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_exits_cleanly(number, trainer):
    process = subprocess.Popen(
        trainer.command("signalled", "--train.train_iters", "100000", "--train.eval_interval", "100000"),
        env=child_environment(), cwd=trainer.work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = trainer.work / "signalled" / "metrics.jsonl"
    _wait_for(lambda: log if log.exists() and log.read_text().count('"train"') > 3 else None)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"asked by {number.name}" in output
    last = [line for line in log.read_text().splitlines() if '"kind": "train"' in line][-1]
    iteration = int(last.split('"iteration": ')[1].split(",")[0])
    assert (trainer.work / "signalled" / "checkpoints" / f"iter_{iteration:07d}" / "megapints.json").exists()


def test_wall_clock_limit_saves_and_exits_cleanly(trainer):
    finished = trainer.train("limited", "--train.train_iters", "100000", "--train.exit_duration_minutes", "0.05")
    assert "train.exit_duration_minutes has passed" in finished.output
    iteration = finished.rows()[-1]["iteration"]
    assert (finished.run_dir / "checkpoints" / f"iter_{iteration:07d}" / "megapints.json").exists()


def test_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(trainer):
    trainer.train("diverging", "--train.train_iters", "3")
    before = {p.name: p.stat().st_mtime_ns for p in (trainer.work / "diverging" / "checkpoints").rglob("*")}
    finished = trainer.train(
        "diverging", "--train.train_iters", "40", "--optimizer.lr", "1e30", "--optimizer.lr_warmup_iters", "0",
        "--checkpoint.save_interval", "10", fails=True,
    )  # fmt: skip
    assert finished.returncode == 2
    assert "Traceback" not in finished.output
    message = next(line for line in finished.output.splitlines() if line.startswith("error: iteration"))
    assert "on samples" in message and "/a #" in message or "/b #" in message
    after = {p.name: p.stat().st_mtime_ns for p in (trainer.work / "diverging" / "checkpoints").rglob("*")}
    assert before == after


def _copy_run(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source / "checkpoints", target / "checkpoints")
    shutil.copy(source / "metrics.jsonl", target / "metrics.jsonl")


def _being_written(checkpoints: Path, *, after: int) -> Path | None:
    found = [p for p in checkpoints.glob("*.tmp") if int(p.name[5:12]) > after and any(p.iterdir())]
    return found[0] if found else None


def _wait_for(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found is not None:
            return found
        time.sleep(0.002)
    raise AssertionError("it did not happen")
