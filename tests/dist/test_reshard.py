"""convert_checkpoint.py reshard: a dp_reshardable checkpoint goes on in another layout, and bit for bit in its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, child_environment
from tests.dist.test_resume import RESHARDABLE, TP2, TWENTY, metrics, read_tensors

PP2 = ("--parallel.pipeline_model_parallel_size", "2")


def reshard(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "reshard", *words],
        capture_output=True, text=True, timeout=200, env=child_environment(), cwd=cwd,
    )  # fmt: skip


@pytest.fixture(scope="module")
def resharded(module_trainer):
    """Ten iterations at TP2, saved as dp_reshardable, and the same resharded."""
    module_trainer.train("tp2", *TWENTY, *TP2, "--train.exit_iters", "10", ranks=2)
    done = reshard("--load", "tp2", "--save", "moved", cwd=module_trainer.work)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def unmoved(resharded, module_trainer):
    """The run that was resharded, continued in its own layout from the old checkpoint."""
    copied(module_trainer, "tp2", "unmoved")
    return module_trainer.train("unmoved", *TWENTY, *RESHARDABLE, *TP2, ranks=2)


def copied(trainer, source: str, name: str) -> None:
    shutil.copytree(trainer.work / source / "checkpoints", trainer.work / name / "checkpoints")


def test_resharded_checkpoint_says_its_format(resharded, module_trainer):
    body = json.loads((module_trainer.work / "moved" / "checkpoints" / "iter_0000010" / "megapints.json").read_text())
    assert (body["optimizer_format"], body["iteration"]) == ("fully_reshardable", 10)


def test_resharding_shows_its_progress_and_where_to_go_on(resharded):
    assert "2 processes" in resharded.stdout and "start from it with run_dir" in resharded.stdout


def test_resharded_run_brings_its_tokenizer_along(resharded, module_trainer):
    assert (module_trainer.work / "moved" / "tokenizer" / "tokenizer.json").is_file()


def test_resharded_checkpoint_goes_on_bit_for_bit_at_its_own_layout(unmoved, module_trainer):
    copied(module_trainer, "moved", "own")
    finished = module_trainer.train("own", *TWENTY, *RESHARDABLE, *TP2, ranks=2)
    assert metrics(finished) == metrics(unmoved)
    expected, found = (read_tensors(run.run_dir / "checkpoints" / "iter_0000020") for run in (unmoved, finished))
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]


@pytest.mark.parametrize(
    ("name", "ranks", "overrides"), [("to_one", 1, ()), pytest.param("to_pp2", 2, PP2, marks=pytest.mark.slow)]
)
def test_resharded_checkpoint_goes_on_in_another_layout(name, ranks, overrides, unmoved, module_trainer):
    copied(module_trainer, "moved", name)
    finished = module_trainer.train(name, *TWENTY, *overrides, ranks=ranks)
    assert "continuing after iteration 10 of 20" in finished.output
    # Sums in another order from there on.
    expected = [row["loss"] for row in unmoved.rows()]
    assert [row["loss"] for row in finished.rows()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_resharded_back_goes_on_bit_for_bit(unmoved, module_trainer):
    done = reshard("--load", "moved", "--save", "back", "--optimizer-format", "dp_reshardable", cwd=module_trainer.work)
    assert done.returncode == 0, done.stderr
    assert metrics(module_trainer.train("back", *TWENTY, *TP2, ranks=2)) == metrics(unmoved)


def test_resharding_what_is_reshardable_already_is_refused(resharded, module_trainer):
    done = reshard("--load", "moved", "--save", "again", cwd=module_trainer.work)
    assert done.returncode == 2
    assert "its optimizer's state is fully_reshardable already" in done.stderr
    assert "Traceback" not in done.stderr and not (module_trainer.work / "again").exists()


@pytest.mark.slow
def test_resharding_a_damaged_checkpoint_is_refused_and_leaves_nothing(resharded, module_trainer):
    copied(module_trainer, "tp2", "damaged")
    (shard,) = (module_trainer.work / "damaged").rglob("__1_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = reshard("--load", "damaged", "--save", "nothing", cwd=module_trainer.work)
    assert done.returncode == 2
    assert done.stderr.count("__1_0.distcp is damaged") == 1 and "Traceback" not in done.stderr
    assert not list(module_trainer.work.glob("nothing*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_rank_alone_is_told_by_that_rank(rank, tmp_path):
    # The checkpoint is not there for it, as where a node lacks a mount: it fails before it meets the others.
    words = {"load": tmp_path / "iter_0000010", "save": tmp_path, "optimizer-format": "fully_reshardable"}
    words |= {"rank": rank, "world-size": 2, "port": 1, "building": 0}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reshard_rank.py"), *(f"--{name}={words[name]}" for name in words)],
        capture_output=True, text=True, timeout=100, env=child_environment(),
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'iter_0000010'}: not a megapints checkpoint")
