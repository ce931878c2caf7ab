"""slurm/*.sbatch on a real Slurm of two nodes: runs that are ended early come back, and lose nothing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_ext.training.samples_log import Iteration, read_history
from tests.conftest import ROOT, Trainer
from tests.slurm.conftest import Job, Slurm

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/pretrain.sbatch"
SLOW_RUN = ROOT / "tests" / "slurm" / "slow_run.py"
TP2 = ("--parallel.tensor_model_parallel_size", "2")
DP2 = ()
# Long enough that a run is still under way when a test ends it; saves in between, as a run has them.
ITERS = 60
LENGTH = (
    "--train.train_iters", str(ITERS), "--train.eval_interval", "1000",
    "--checkpoint.save_interval", "10", "--checkpoint.keep_last", "2", "--log.samples", "true",
)  # fmt: skip
FIGURES = ("iteration", "loss", "grad_norm", "lr", "consumed_samples", "consumed_tokens")


class Straight(NamedTuple):
    """A run that nothing interrupted."""

    metrics: list[tuple[float, ...]]
    samples: list[Iteration]


class Layout(NamedTuple):
    """How the ranks of both nodes share the work, and what a run of theirs is without interruption."""

    name: str
    words: tuple[str, ...]
    straight: Straight


class Interrupted:
    """A training job under way."""

    def __init__(
        self, slurm: Slurm, trainer: Trainer, name: str, layout: tuple[str, ...], *,
        options: tuple[str, ...] = (), slow_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """Submit it with options of sbatch; its first start may take longer for each iteration after the twentieth."""
        self.slurm, self.run_dir, self.log = slurm, trainer.work / name, trainer.work / f"{name}.log"
        variables = {"MEGAPINTS_PYTHON": sys.executable}
        if slow_seconds:
            python = trainer.work / f"python_of_{name}"
            python.write_text(f'#!/bin/sh\nexec {sys.executable} {SLOW_RUN} "$@"\n')
            python.chmod(0o755)
            variables = {"MEGAPINTS_PYTHON": str(python), "SLOW_FROM": "20", "SLOW_SECONDS": str(slow_seconds)}
        self.number = slurm.start(
            "--nodes=2", *options, SCRIPT, str(trainer.config(name)), *LENGTH, *layout, log=self.log, **variables
        )

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["kind"] == kind]

    def wait_until_it_has_saved(self) -> None:
        self.slurm.wait_until(lambda: bool(self.rows("checkpoint")), log=self.log)

    def finish(self) -> Job:
        job = self.slurm.finish(self.number, log=self.log)
        assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
        return job

    def samples(self) -> list[Iteration]:
        """What each iteration that counts was trained on, by the ranks' own record."""
        return read_history(self.run_dir)

    def metrics(self) -> list[tuple[float, ...]]:
        """The figures of each iteration; one that ran twice must have them twice."""
        return sorted({tuple(row[name] for name in FIGURES) for row in self.rows()})


@pytest.fixture(scope="module")
def straight_tp2(slurm, module_trainer) -> Straight:
    return run_straight(slurm, module_trainer, "straight_tp2", TP2)


@pytest.fixture(scope="module")
def straight_dp2(slurm, module_trainer) -> Straight:
    return run_straight(slurm, module_trainer, "straight_dp2", DP2)


@pytest.fixture(params=["tp2", "dp2"])
def layout(request) -> Layout:
    """Each layout across the two nodes."""
    words = {"tp2": TP2, "dp2": DP2}[request.param]
    return Layout(request.param, words, request.getfixturevalue(f"straight_{request.param}"))


def run_straight(slurm: Slurm, trainer: Trainer, name: str, layout: tuple[str, ...]) -> Straight:
    """Run a layout without interruption."""
    run = Interrupted(slurm, trainer, name, layout)
    assert run.finish().restarts == 0
    straight = Straight(run.metrics(), run.samples())
    assert [given.k for iteration in straight.samples for given in iteration.samples] == list(range(8 * ITERS))
    assert len(straight.metrics) == ITERS
    return straight


@pytest.mark.slow
def test_run_requeued_by_an_administrator_ends_as_an_uninterrupted_one(slurm, module_trainer, layout):
    run = Interrupted(slurm, module_trainer, f"requeued_{layout.name}", layout.words)
    run.wait_until_it_has_saved()
    assert slurm.run("scontrol", "requeue", run.number).returncode == 0
    assert run.finish().restarts == 1
    assert len(run.rows("start")) == 2
    assert run.metrics() == layout.straight.metrics
    assert run.samples() == layout.straight.samples


@pytest.mark.slow
def test_run_that_comes_to_its_time_limit_saves_and_is_requeued(slurm, module_trainer, layout):
    # One minute is the shortest that Slurm gives; in the first start, the iterations from 20 on take longer than that.
    name = f"limited_{layout.name}"
    run = Interrupted(slurm, module_trainer, name, layout.words, options=("--time=1",), slow_seconds=2.0)
    job = run.finish()
    assert job.restarts == 1
    first, second = run.rows("stop")
    assert first["reason"].startswith("the job ends in ") and first["iteration"] < ITERS
    assert second["reason"] == f"finished: {ITERS} iterations"
    assert f"stopped at iteration {first['iteration']}" in job.log
    assert len(run.rows()) == ITERS  # no iteration ran twice
    assert run.metrics() == layout.straight.metrics
    assert run.samples() == layout.straight.samples


def lose_a_node(slurm: Slurm, run: Interrupted, node: str, *, wait_for: str) -> None:
    """End a node amid the run, and start its daemon again when Slurm sees the node in that state."""
    slurm.wait_until(lambda: any(row["iteration"] > 20 for row in run.rows()), log=run.log)
    slurm.kill_node(node)
    slurm.wait_until(lambda: slurm.state_of(node) == wait_for, log=run.log)
    slurm.start_node(node)
    assert run.finish().restarts >= 1
    begin = run.rows("start")[-1]
    assert (begin["iteration"], begin["restart"]) == (20, 1)


@pytest.mark.slow
def test_run_that_loses_the_node_of_its_first_rank_is_started_again(slurm, module_trainer, straight_tp2):
    # The batch script's node, too: nobody is left to say anything, and Slurm requeues the job.
    run = Interrupted(slurm, module_trainer, "lost_first_node", TP2, slow_seconds=2.0)
    lose_a_node(slurm, run, slurm.nodes[0], wait_for="down")
    assert run.rows("start")[-1]["reason"] == "Slurm killed the job, or lost the node of the batch script"
    assert run.metrics() == straight_tp2.metrics
    assert run.samples() == straight_tp2.samples


@pytest.mark.slow
def test_run_that_loses_another_node_that_is_back_at_once_is_started_again(slurm, module_trainer, straight_dp2):
    # Slurm never sees it down, and srun waits for its tasks for ever.
    run = Interrupted(slurm, module_trainer, "lost_second_node", DP2, slow_seconds=2.0)
    lose_a_node(slurm, run, slurm.nodes[1], wait_for="allocated")
    assert run.rows("start")[-1]["reason"].startswith("failed: rank 1 ")
    assert run.metrics() == straight_dp2.metrics
    assert run.samples() == straight_dp2.samples


@pytest.mark.slow
def test_run_that_was_stopped_on_two_nodes_goes_on_on_one(slurm, module_trainer, straight_dp2):
    run = Interrupted(slurm, module_trainer, "shrunk", DP2, slow_seconds=2.0)
    slurm.wait_until(lambda: any(row["iteration"] > 20 for row in run.rows()), log=run.log)
    assert slurm.run("scontrol", "update", f"JobId={run.number}", "Requeue=0").returncode == 0
    assert slurm.run("scancel", "--signal=TERM", run.number).returncode == 0
    job = slurm.finish(run.number, log=run.log)
    assert (job.state, job.restarts) == ("FAILED", 0), job.log  # no job that depends on it must start
    again = Interrupted(slurm, module_trainer, "shrunk", DP2, options=("--nodes=1",))
    again.finish()
    assert len(again.rows()) == ITERS  # no iteration ran twice
    assert [row["world_size"] for row in again.rows("start")] == [2, 1]
    assert again.samples() == straight_dp2.samples
    assert again.metrics() == [pytest.approx(figures, rel=1e-6) for figures in straight_dp2.metrics]


@pytest.mark.slow
def test_run_that_gets_a_signal_saves_and_is_requeued(slurm, module_trainer, straight_dp2):
    # Slurm sends it to all processes of the tasks, those that the first save has left too.
    run = Interrupted(slurm, module_trainer, "signalled", DP2)
    run.wait_until_it_has_saved()
    assert slurm.run("scancel", "--signal=TERM", run.number).returncode == 0
    assert run.finish().restarts == 1
    assert run.rows("stop")[0]["reason"] == "asked by SIGTERM"
    assert len(run.rows()) == ITERS
    assert run.metrics() == straight_dp2.metrics
    assert run.samples() == straight_dp2.samples


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_signal_to_the_batch_script_alone_reaches_the_tasks(name, slurm, module_trainer):
    up, python = module_trainer.work / f"up_{name}", module_trainer.work / f"python_for_{name}"
    python.write_text(
        "#!/bin/bash\n"
        '[ -z "$SLURM_RESTART_COUNT" ] || exit 0\n'
        "trap 'echo stopped 0 5 5 asked by SIGUSR1 >$MEGAPINTS_JOB_RECORD; kill $!; exit 0' USR1\n"
        f"sleep 200 & touch {shlex.quote(str(up))}; wait\n"
    )
    python.chmod(0o755)
    log = module_trainer.work / f"batch_{name}.log"
    number = slurm.start(SCRIPT, "a.toml", log=log, MEGAPINTS_PYTHON=str(python))
    slurm.wait_until(up.exists, log=log)
    assert slurm.run("scancel", "--batch", f"--signal={name}", number).returncode == 0
    job = slurm.finish(number, log=log)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.log


def test_cancelled_run_does_not_come_back(slurm, module_trainer):
    run = Interrupted(slurm, module_trainer, "cancelled", DP2)
    slurm.wait_until(lambda: bool(run.rows()), log=run.log)
    assert slurm.run("scancel", run.number).returncode == 0
    job = slurm.finish(run.number, log=run.log)
    (ROOT / "runs" / f".job-{run.number}.start-0").unlink(
        missing_ok=True
    )  # the last word of a rank that outlived the script
    assert (job.state, job.restarts) == ("CANCELLED", 0)


def test_stopped_run_that_may_not_be_requeued_fails(slurm, module_trainer):
    python = module_trainer.work / "stopping_python"
    python.write_text('#!/bin/sh\necho "stopped 0 5 5 asked by SIGTERM" >"$MEGAPINTS_JOB_RECORD"\n')
    python.chmod(0o755)
    log = module_trainer.work / "stopping.log"
    job = slurm.submit("--no-requeue", SCRIPT, "a.toml", log=log, MEGAPINTS_PYTHON=str(python))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", "1:0", 0), job.log


def test_run_that_fails_twice_from_the_same_iteration_is_given_up(slurm, module_trainer):
    python = module_trainer.work / "failing_python"
    python.write_text('#!/bin/sh\necho "running 20 20 20" >"$MEGAPINTS_JOB_RECORD"\nexit 9\n')
    python.chmod(0o755)
    job = slurm.submit(SCRIPT, "a.toml", log=module_trainer.work / "failing.log", MEGAPINTS_PYTHON=str(python))
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", "9:0", 1), job.log
    assert "from iteration 20; requeueing" in job.log
    assert "from iteration 20, for the second time; not requeued" in job.log


def test_dry_run_in_a_job_names_the_first_node_and_the_end_of_the_job(slurm, module_trainer):
    log = module_trainer.work / "dry_run.log"
    number = slurm.start("--nodes=2", "--time=7", SCRIPT, "a.toml", log=log, DRY_RUN="1", TZ="UTC")
    assert slurm.finish(number, log=log).state == "COMPLETED"
    words = dict(word.split("=", 1) for word in shlex.split(log.read_text()) if "=" in word)
    assert words["MASTER_ADDR"] == slurm.environment.get("MASTER_ADDR", slurm.nodes[0])
    shown = slurm.run("scontrol", "--oneliner", "show", "job", number).stdout
    started = next(word for word in shown.split() if word.startswith("StartTime=")).partition("=")[2]
    begin = int(slurm.run("date", f"--date={started}", "+%s").stdout)
    assert int(words["SLURM_JOB_END_TIME"]) == begin + 7 * 60


@pytest.mark.parametrize("script", ["pretrain.sbatch", "preprocess.sbatch", "convert.sbatch"])
def test_slurm_accepts_the_script(script, slurm):
    done = slurm.run("sbatch", "--test-only", "--mem=100", "--cpus-per-task=1", f"slurm/{script}", "a")
    assert done.returncode == 0, done.stderr


def test_preprocess_over_two_nodes_gives_the_bytes_of_one_process(slurm, module_trainer):
    work = module_trainer.work
    texts = [line for path in sorted((ROOT / "megatron_ext").rglob("*.py")) for line in path.read_text().splitlines()]
    (work / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = (
        "--input", str(work / "corpus.jsonl"), "--tokenizer", str(module_trainer.data / "tokenizer"), "--append-eod",
    )  # fmt: skip
    alone = slurm.run(sys.executable, "tools/preprocess_data.py", *arguments, "--output-prefix", str(work / "alone"))
    assert alone.returncode == 0, alone.stderr
    root = {name: "1" for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")}
    job = slurm.submit(
        "--nodes=2", "slurm/preprocess.sbatch", *arguments, "--output-prefix", str(work / "together"),
        log=work / "preprocess.log", MEGAPINTS_PYTHON=sys.executable, **root,
    )  # fmt: skip
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    for ending in ("bin", "idx"):
        made, expected = (work / f"{name}_text_document.{ending}" for name in ("together", "alone"))
        assert made.read_bytes() == expected.read_bytes()


def test_convert_writes_the_folder(slurm, module_trainer):
    module_trainer.train("to_convert")
    folder: Path = module_trainer.work / "hf"
    job = slurm.submit(
        "--cpus-per-task=1", "--mem=100", "slurm/convert.sbatch",
        "to-hf", "--load", str(module_trainer.work / "to_convert"), "--save", str(folder),
        log=module_trainer.work / "convert.log", MEGAPINTS_PYTHON=sys.executable,
    )  # fmt: skip
    assert (job.state, job.exit_code) == ("COMPLETED", "0:0"), job.log
    assert (folder / "model.safetensors").exists()
