"""srun and slurm/pretrain.sbatch on a real Slurm of two nodes: the ranks are found, and train as one process does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished

pytestmark = pytest.mark.slurm

TP2 = ("--parallel.tensor_model_parallel_size", "2")
WRONG = ("--model.num_attention_heads", "3")
SCRIPT = "slurm/pretrain.sbatch"
# fp32 sums in another order, as in tests/dist.
TOLERANCE = 1e-5
SHOW_PLACE = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict
from megatron_ext.parallel.launch import find_launch
print(json.dumps(asdict(find_launch())))
"""


@pytest.fixture(scope="module")
def losses_of_one_process(module_trainer):
    return [row["loss"] for row in module_trainer.train("one_process").rows()]


def srun(slurm, trainer, name: str, *options: str, overrides: tuple[str, ...] = ()) -> Finished:
    """Train under srun, straight from a shell."""
    done = slurm.run("srun", *options, *trainer.command(name, *overrides))
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(done.returncode, done.stdout + done.stderr, trainer.work / name)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in Finished(0, "", run_dir).rows()]


def environment_of_rank_0(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / "environment.json").read_text())["environment"]


def test_srun_over_two_nodes_trains_tensor_parallel(slurm, module_trainer, losses_of_one_process):
    finished = srun(slurm, module_trainer, "srun_tp2", "-N2", "-n2", overrides=TP2)
    assert environment_of_rank_0(finished.run_dir)["SLURM_STEP_TASKS_PER_NODE"] == "1(x2)"
    assert "2 ranks: tp 2 x pp 1 x cp 1 x dp 1" in (finished.run_dir / "log.txt").read_text()
    assert losses(finished.run_dir) == pytest.approx(losses_of_one_process, rel=TOLERANCE)


def test_srun_of_a_single_task_trains_as_one_process(slurm, module_trainer, losses_of_one_process):
    finished = srun(slurm, module_trainer, "srun_single", "-n1")
    assert environment_of_rank_0(finished.run_dir)["SLURM_STEP_NUM_TASKS"] == "1"
    assert losses(finished.run_dir) == losses_of_one_process


def test_batch_script_over_two_nodes_trains_data_parallel(slurm, module_trainer, losses_of_one_process):
    config, run_dir = module_trainer.config("sbatch"), module_trainer.work / "sbatch"
    job = slurm.submit(
        "--nodes=2", SCRIPT, str(config), "--log.interval", "1",
        log=module_trainer.work / "sbatch.log", MEGAPINTS_PYTHON=sys.executable,
    )  # fmt: skip
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    # --label puts the task's number before its lines.
    assert "0: " in job.log and "stopped after iteration 5: finished: 5 iterations" in job.log
    assert "2 ranks: tp 1 x pp 1 x cp 1 x dp 2" in (run_dir / "log.txt").read_text()
    assert environment_of_rank_0(run_dir)["SLURM_STEP_TASKS_PER_NODE"] == "1(x2)"
    assert losses(run_dir) == pytest.approx(losses_of_one_process, rel=TOLERANCE)


def test_wrong_config_fails_the_batch_job_and_is_told(slurm, module_trainer):
    job = slurm.submit(
        "--nodes=2", SCRIPT, str(module_trainer.config("wrong")), *WRONG,
        log=module_trainer.work / "wrong.log", MEGAPINTS_PYTHON=sys.executable,
    )  # fmt: skip
    assert job.state == "FAILED"
    assert "error: model.num_attention_heads (3) must divide" in job.log


def test_wrong_config_is_told_though_rank_0_finds_it_last(slurm, module_trainer):
    # Slurm ends all tasks at the first that fails: unless the others let rank 0 come first, nobody says why.
    python = module_trainer.work / "late_python"
    python.write_text(f'#!/bin/sh\n[ "$SLURM_PROCID" != 0 ] || sleep 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    _, *command = module_trainer.command("wrong", *WRONG)
    done = slurm.run("srun", "-N1", "-n2", "--kill-on-bad-exit=1", str(python), *command)
    assert done.stderr.count("error: model.num_attention_heads (3) must divide") == 1, done.stderr
    assert done.returncode == 2


def test_bare_python_in_a_batch_script_is_one_process(slurm, module_trainer, losses_of_one_process):
    # Slurm gives the script of a job of two tasks SLURM_NTASKS=2 and SLURM_PROCID=0, as srun gives its tasks.
    command = " ".join(module_trainer.command("batch_step"))
    job = slurm.submit("-N2", "-n2", "--wrap", command, log=module_trainer.work / "batch_step.log")
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    run_dir = module_trainer.work / "batch_step"
    assert environment_of_rank_0(run_dir)["SLURM_NTASKS"] == "2"
    assert "1 ranks: tp 1 x pp 1 x cp 1 x dp 1" in (run_dir / "log.txt").read_text()
    assert losses(run_dir) == losses_of_one_process


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_tasks_find_their_places_on_unequal_nodes(mpi, slurm):
    # Where MPI jobs are usual, Slurm sets the variables of PMI as well.
    done = slurm.run("srun", "-N2", "-n3", f"--mpi={mpi}", sys.executable, "-c", SHOW_PLACE)
    assert done.returncode == 0, done.stderr
    places = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda place: place["rank"])
    assert [place["rank"] for place in places] == [0, 1, 2]
    assert [(place["local_rank"], place["local_world_size"]) for place in places] == [(0, 2), (1, 2), (0, 1)]
    assert {(place["launcher"], place["world_size"]) for place in places} == {("srun", 3)}
    first_node = slurm.environment.get("MASTER_ADDR", slurm.nodes[0])
    assert {place["master_addr"] for place in places} == {first_node}
    assert len({place["master_port"] for place in places}) == 1
