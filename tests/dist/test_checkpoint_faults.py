"""Real starts from damaged checkpoints, real saves onto a full disk, a real run killed amid a background save."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import child_environment
from tests.dist.test_resume import _wait_for

EVERY_2 = ("--checkpoint.save_interval", "2", "--train.eval_interval", "100000")
BEHIND = ("--checkpoint.async_save", "true")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_newest_checkpoint_is_passed_over_by_all_ranks(trainer):
    first = trainer.train("damaged", *EVERY_2, "--train.train_iters", "4", ranks=2)
    flip(first.run_dir / "checkpoints" / "iter_0000004" / "__1_0.distcp")
    second = trainer.train("damaged", *EVERY_2, "--train.train_iters", "6", ranks=2)
    assert "iter_0000004: __1_0.distcp is damaged" in second.output
    assert "continuing after iteration 2 of 6" in second.output
    assert [row["iteration"] for row in second.rows()] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_only_damaged_checkpoints_are_one_error_and_nothing_is_trained(trainer):
    first = trainer.train("lost", *EVERY_2, "--train.train_iters", "4")
    for shard in first.run_dir.rglob("__0_0.distcp"):
        flip(shard)
    second = trainer.train("lost", *EVERY_2, "--train.train_iters", "6", fails=True)
    assert second.returncode == 2 and "Traceback" not in second.output
    (error,) = [line for line in second.output.splitlines() if line.startswith("error:")]
    assert "none that is whole" in error and "iter_0000004" in error and "iter_0000002" in error
    assert [row["iteration"] for row in second.rows()] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "__0_1.distcp"])
@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "removed"])
def test_damaged_file_of_the_newest_checkpoint_lets_the_run_go_on_from_the_older(name, damage, trainer):
    first = trainer.train("damaged", *EVERY_2, "--train.train_iters", "4")
    damage(first.run_dir / "checkpoints" / "iter_0000004" / name)
    second = trainer.train("damaged", *EVERY_2, "--train.train_iters", "5")
    assert "continuing after iteration 2 of 5" in second.output and name in second.output


def on_full_disk(trainer, name: str, *options: str) -> tuple[int, str]:
    """Train on two ranks, with a disk that is full for the second of them from the second save on."""
    words = trainer.command(name, *EVERY_2, *options, "--train.train_iters", "60", ranks=2)
    done = subprocess.run(
        [word.replace("pretrain_pints.py", "tests/dist/full_disk.py") for word in words],
        capture_output=True, text=True, timeout=200, cwd=trainer.work,
        env={**child_environment(), "FULL_DISK_RANK": "1", "FULL_DISK_AFTER": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), pytest.param(BEHIND, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_full_disk_of_one_rank_ends_the_run_with_one_error(options, trainer):
    code, output = on_full_disk(trainer, "full", *options)
    checkpoints = trainer.work / "full" / "checkpoints"
    assert code != 0
    (error,) = {line for line in output.splitlines() if line.startswith("error:")}
    assert "iteration 4 could not be saved" in error and "rank 1: " in error and "File too large" in error
    assert f"goes on from {checkpoints / 'iter_0000002'}" in error
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000002", "latest"]
    resumed = trainer.train("full", *EVERY_2, *options, "--train.train_iters", "4", ranks=2)
    assert "continuing after iteration 2 of 4" in resumed.output


def test_run_killed_amid_a_background_save_leaves_no_process(trainer):
    running = (*BEHIND, "--train.train_iters", "100000", *EVERY_2)
    process = subprocess.Popen(
        trainer.command("killed", *running), env=child_environment(), cwd=trainer.work,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    children: list[psutil.Process] = []
    try:
        checkpoints = trainer.work / "killed" / "checkpoints"
        _wait_for(lambda: next(checkpoints.glob("iter_*/megapints.json"), None))
        _wait_for(lambda: next(checkpoints.glob("*.tmp"), None))
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _wait_for(lambda: True if not any(child.is_running() for child in children) else None, seconds=20)
    resumed = trainer.train("killed", *running, "--train.exit_iters", "3", fails=True)
    assert "resumed from" in resumed.output
