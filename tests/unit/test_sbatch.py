"""The batch scripts under a Slurm of stubs: `srun`, `scontrol` and `squeue` that write down their calls."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELL_FILES = [*SCRIPTS, ROOT / "slurm" / "launch.sh", ROOT / ".ci" / "run", ROOT / ".ci" / "venv.sh"]
PRETRAIN = "pretrain.sbatch"
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "96",
}
GPUS = {"SLURM_GPUS_ON_NODE": "8"}
ONE_NODE = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
PYXIS = {"MEGAPINTS_CONTAINER": "nvcr.io#nvidia/pytorch:25.06-py3", "MEGAPINTS_MOUNTS": "/data:/data,/scratch:/scratch"}
APPTAINER = {"MEGAPINTS_RUNTIME": "apptainer", "MEGAPINTS_CONTAINER": "/images/megapints.sif"}

# What the ranks of `--train.train_iters 5` get, by hand: 12000 + 17 x 101 mod 20000 is the port, 96 / 8 the cores.
ENVIRONMENT = (
    "env MASTER_ADDR=n1 MASTER_PORT=13717 NCCL_DEBUG=WARN MEGAPINTS_JOB_RECORD={checkout}/runs/.job-17.start-0 "
)
FIXED = "--kill-on-bad-exit=1 --label --export=ALL "
TRAINING = "pretrain_pints.py a\\ b.toml --train.train_iters 5"
LAUNCH_LINES = {
    "bare, 1 node without GPUs": (
        ONE_NODE,
        ENVIRONMENT + "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=96 "
        + FIXED + "python3 " + TRAINING,
    ),
    "bare, 2 nodes without GPUs": (
        {},
        ENVIRONMENT + "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 "
        + FIXED + "python3 " + TRAINING,
    ),
    "bare, 1 node": (
        GPUS | ONE_NODE,
        ENVIRONMENT + "srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=12 "
        + FIXED + "python3 " + TRAINING,
    ),
    "bare, 2 nodes": (
        GPUS,
        ENVIRONMENT + "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 "
        + FIXED + "python3 " + TRAINING,
    ),
    "activated virtual environment": (
        GPUS | {"VIRTUAL_ENV": "/home/me/env"},
        ENVIRONMENT + "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 "
        + FIXED + "/home/me/env/bin/python " + TRAINING,
    ),
    "pyxis, 1 node": (
        GPUS | ONE_NODE | PYXIS,
        ENVIRONMENT + "srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=12 " + FIXED
        + "--container-image=nvcr.io#nvidia/pytorch:25.06-py3 "
        + "--container-mounts={checkout}:{checkout}\\,/data:/data\\,/scratch:/scratch "
        + "--container-workdir={checkout} python3 " + TRAINING,
    ),
    "pyxis, 2 nodes": (
        GPUS | PYXIS,
        ENVIRONMENT + "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 " + FIXED
        + "--container-image=nvcr.io#nvidia/pytorch:25.06-py3 "
        + "--container-mounts={checkout}:{checkout}\\,/data:/data\\,/scratch:/scratch "
        + "--container-workdir={checkout} python3 " + TRAINING,
    ),
    "apptainer, 1 node without GPUs": (
        ONE_NODE | APPTAINER,
        ENVIRONMENT + "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=96 " + FIXED
        + "apptainer exec --bind {checkout}:{checkout} --pwd {checkout} /images/megapints.sif python3 " + TRAINING,
    ),
    "apptainer, 2 nodes": (
        GPUS | APPTAINER | {"MEGAPINTS_MOUNTS": "/data:/data"},
        ENVIRONMENT + "srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 " + FIXED
        + "apptainer exec --nv --bind {checkout}:{checkout}\\,/data:/data --pwd {checkout} "
        + "/images/megapints.sif python3 " + TRAINING,
    ),
}  # fmt: skip
TOOL_LINES = {
    "preprocess with mpiexec": (
        "preprocess.sbatch", {},
        "mpiexec -n 2 --map-by ppr:1:node --bind-to none python3 tools/preprocess_data.py --mpi --workers 96 "
        "--input a\\ b",
    ),
    "preprocess with srun": (
        "preprocess.sbatch", {"MEGAPINTS_MPI": "pmi2"},
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --mpi=pmi2 --kill-on-bad-exit=1 "
        "--export=ALL python3 tools/preprocess_data.py --mpi --workers 96 --input a\\ b",
    ),
    "preprocess in a container": (
        "preprocess.sbatch", {"MEGAPINTS_CONTAINER": "image"},
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --mpi=pmix --kill-on-bad-exit=1 "
        "--export=ALL --container-image=image --container-mounts={checkout}:{checkout} "
        "--container-workdir={checkout} python3 tools/preprocess_data.py --mpi --workers 96 --input a\\ b",
    ),
    "convert": (
        "convert.sbatch", ONE_NODE | {"SLURM_CPUS_ON_NODE": "4"},
        "srun --nodes=1 --ntasks=1 --cpus-per-task=4 --export=ALL python3 tools/convert_checkpoint.py --input a\\ b",
    ),
}  # fmt: skip

STUBS = {
    # Writes down what it was told, leaves the record that rank 0 would leave, and ends as it is told to.
    "srun": """
        printf "%s\\n" "$@" >"$CALLS/srun"; env >"$CALLS/environment"
        [ -z "$RECORD" ] || echo "$RECORD" >"$MEGAPINTS_JOB_RECORD"
        [ -z "$SRUN_RUNS" ] || eval "$SRUN_RUNS"
        exit ${SRUN_STATUS:-0}""",
    "scontrol": """
        echo "$@" >>"$CALLS/scontrol"
        [ "$1" = show ] && printf "n1\\nn2\\n" && exit
        [ "$(grep -c requeue "$CALLS/scontrol")" -gt "${REQUEUE_FAILS:-0}" ] || exit 1
        exit ${REQUEUE_STATUS:-0}""",
    "squeue": """
        echo "$@" >>"$CALLS/squeue"
        [ "$(wc -l <"$CALLS/squeue")" -gt "${SQUEUE_FAILS:-0}" ] || exit 1
        case "$*" in
        *%e*) echo "${JOB_END:-NONE}" ;;
        *) echo "${JOB_STATE:-RUNNING}" ;;
        esac""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the batch scripts, and stubs first in the PATH."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()
    for name, body in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    return tmp_path


def job_command(checkout: Path, script: str, *arguments: str) -> list[str]:
    """Copy the script elsewhere, as Slurm does, and run the copy."""
    shutil.copy(ROOT / "slurm" / script, checkout / "calls" / "slurm_script")
    return ["bash", str(checkout / "calls" / "slurm_script"), *arguments]


def job_environment(checkout: Path, **variables: str) -> dict[str, str]:
    own = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(checkout / "calls"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "TZ": "UTC",
    }
    return own | JOB | variables


def submit(
    checkout: Path, *arguments: str, script: str = PRETRAIN, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as Slurm does: a copy of it, elsewhere, with the job's variables."""
    return subprocess.run(
        job_command(checkout, script, *arguments), env=job_environment(checkout, **variables),
        cwd="/", capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def srun_arguments(checkout: Path) -> list[str]:
    return (checkout / "calls" / "srun").read_text().splitlines()


def task_environment(checkout: Path) -> dict[str, str]:
    lines = (checkout / "calls" / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def requeues(checkout: Path) -> int:
    calls = checkout / "calls" / "scontrol"
    return calls.read_text().splitlines().count("requeue 17") if calls.exists() else 0


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_script_satisfies_shellcheck(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SHELL_FILES, ids=lambda path: path.name)
def test_script_holds_no_training_flag(script):
    code = [line for line in script.read_text().splitlines() if not line.startswith("# ")]
    sections = "model|precision|parallel|data|train|optimizer|checkpoint|log"
    assert not re.search(rf"--({sections})\.", "\n".join(code))


# --- the launch line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAUNCH_LINES)
def test_dry_run_prints_the_recorded_launch_line(case, checkout):
    variables, expected = LAUNCH_LINES[case]
    done = submit(checkout, "a b.toml", "--train.train_iters", "5", DRY_RUN="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected.format(checkout=checkout) + "\n"


@pytest.mark.parametrize("case", TOOL_LINES)
def test_dry_run_of_a_tool_prints_the_recorded_launch_line(case, checkout):
    script, variables, expected = TOOL_LINES[case]
    done = submit(checkout, "--input", "a b", script=script, DRY_RUN="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected.format(checkout=checkout) + "\n"


def test_dry_run_outside_of_slurm_neither_waits_nor_complains(checkout):
    done = submit(checkout, "a.toml", DRY_RUN="1", SQUEUE_FAILS="99")
    assert (done.returncode, done.stderr) == (0, "")
    assert len((checkout / "calls" / "squeue").read_text().splitlines()) == 1


def test_end_that_squeue_never_tells_is_warned_of(checkout):
    script = checkout / "slurm" / PRETRAIN
    script.write_text((ROOT / "slurm" / PRETRAIN).read_text().replace("in 1 2 4 8 15 30 0", "in 0.1 0"))
    done = subprocess.run(
        ["bash", str(script), "a.toml"], cwd="/", capture_output=True, text=True, timeout=60,
        env=job_environment(checkout, SQUEUE_FAILS="99"),
    )  # fmt: skip
    assert done.returncode == 0 and "warning: squeue does not say when the job ends" in done.stderr


def test_dry_run_starts_nothing(checkout):
    submit(checkout, "a.toml", DRY_RUN="1")
    assert not (checkout / "calls" / "srun").exists()
    assert not (checkout / "runs").exists()


def test_line_that_runs_is_the_one_that_dry_run_prints(checkout):
    words = shlex.split(submit(checkout, "a b.toml", "it's", DRY_RUN="1", **GPUS).stdout)
    assert submit(checkout, "a b.toml", "it's", **GPUS).returncode == 0
    assert srun_arguments(checkout) == words[words.index("srun") + 1 :]
    assert set(words[1 : words.index("srun")]) <= {f"{k}={v}" for k, v in task_environment(checkout).items()}


def test_config_and_overrides_pass_through_as_they_are(checkout):
    submit(checkout, "a b.toml", "--name", "it's $HOME", "--train.train_iters", "5")
    arguments = srun_arguments(checkout)
    entry = arguments.index("pretrain_pints.py")
    assert arguments[entry + 1 :] == ["a b.toml", "--name", "it's $HOME", "--train.train_iters", "5"]


def test_given_master_address_wins(checkout):
    submit(checkout, "a.toml", MASTER_ADDR="10.0.0.1")
    assert task_environment(checkout)["MASTER_ADDR"] == "10.0.0.1"
    assert not (checkout / "calls" / "scontrol").exists()


def test_given_nccl_debug_wins(checkout):
    submit(checkout, "a.toml", NCCL_DEBUG="INFO")
    assert task_environment(checkout)["NCCL_DEBUG"] == "INFO"


def test_port_fits_the_one_that_srun_tasks_derive(checkout):
    from megatron_ext.parallel.launch import slurm_port

    submit(checkout, "a.toml", SLURM_JOB_ID="123456")
    assert int(task_environment(checkout)["MASTER_PORT"]) == slurm_port(123456, 0)


def test_venv_of_the_checkout_is_used(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    submit(checkout, "a.toml")
    assert str(python) in srun_arguments(checkout)


def test_named_python_wins(checkout):
    submit(checkout, "a.toml", MEGAPINTS_PYTHON="/opt/python", VIRTUAL_ENV="/home/me/env")
    assert "/opt/python" in srun_arguments(checkout)


def test_mpiexec_beside_the_python_is_used(checkout):
    mpiexec = checkout / "env" / "bin" / "mpiexec"
    mpiexec.parent.mkdir(parents=True)
    mpiexec.write_text("#!/bin/sh\n")
    mpiexec.chmod(0o755)
    done = submit(checkout, "--input", "a", script="preprocess.sbatch", DRY_RUN="1", VIRTUAL_ENV=str(checkout / "env"))
    assert done.stdout.startswith(f"{mpiexec} -n 2 ")


def test_end_of_the_job_that_slurm_sets_goes_to_the_tasks(checkout):
    submit(checkout, "a.toml", SLURM_JOB_END_TIME="1800000000", JOB_END="2026-01-02T03:04:05")
    assert task_environment(checkout)["SLURM_JOB_END_TIME"] == "1800000000"


def test_end_of_the_job_that_slurm_does_not_set_is_asked_of_squeue(checkout):
    submit(checkout, "a.toml", JOB_END="2026-01-02T03:04:05")
    assert task_environment(checkout)["SLURM_JOB_END_TIME"] == "1767323045"


def test_end_of_the_job_is_asked_again_where_squeue_does_not_answer(checkout):
    done = submit(checkout, "a.toml", JOB_END="2026-01-02T03:04:05", SQUEUE_FAILS="2")
    assert task_environment(checkout)["SLURM_JOB_END_TIME"] == "1767323045"
    assert "warning" not in done.stderr


def test_array_task_asks_for_itself_alone(checkout):
    submit(
        checkout, "a.toml", RECORD="stopped 0 12 12 asked by SIGTERM",
        SLURM_ARRAY_JOB_ID="15", SLURM_ARRAY_TASK_ID="2",
    )  # fmt: skip
    assert "requeue 15_2" in (checkout / "calls" / "scontrol").read_text().splitlines()
    assert all("--jobs=15_2" in line for line in (checkout / "calls" / "squeue").read_text().splitlines())


def test_job_without_a_limit_has_no_end(checkout):
    submit(checkout, "a.toml", JOB_END="NONE")
    assert "SLURM_JOB_END_TIME" not in task_environment(checkout)


# --- what follows the end of the tasks ---------------------------------------------------------------------------


def test_finished_run_is_not_requeued(checkout):
    done = submit(checkout, "a.toml", RECORD="finished 0 40 40 finished: 40 iterations")
    assert (done.returncode, requeues(checkout)) == (0, 0)
    assert not list((checkout / "runs").iterdir())


def test_stopped_run_is_requeued(checkout):
    done = submit(checkout, "a.toml", RECORD="stopped 0 12 12 asked by SIGTERM")
    assert (done.returncode, requeues(checkout)) == (0, 1)
    assert "stopped at iteration 12 (asked by SIGTERM); requeueing" in done.stdout


def test_stopped_run_that_may_not_be_requeued_fails_and_says_how_to_go_on(checkout):
    done = submit(checkout, "a.toml", RECORD="stopped 0 12 12 asked by SIGTERM", REQUEUE_STATUS="1")
    assert done.returncode == 1
    assert "not requeued" in done.stdout and "the same sbatch command goes on" in done.stdout


def test_stopped_run_is_requeued_though_slurm_does_not_answer_at_once(checkout):
    variables = {"SLURM_JOB_END_TIME": str(int(time.time()) + 9), "SQUEUE_FAILS": "2", "REQUEUE_FAILS": "1"}
    done = submit(checkout, "a.toml", RECORD="stopped 0 12 12 the job ends in 9 s", **variables)
    assert (done.returncode, requeues(checkout)) == (0, 2)  # the second one was taken


def test_stopped_run_is_requeued_though_squeue_never_answers(checkout):
    script = checkout / "slurm" / PRETRAIN
    script.write_text((ROOT / "slurm" / PRETRAIN).read_text().replace("in 1 2 4 8 15 30 0", "in 0.1 0"))
    variables = {"SLURM_JOB_END_TIME": str(int(time.time()) + 99), "SQUEUE_FAILS": "99"}
    done = subprocess.run(
        ["bash", str(script), "a.toml"], cwd="/", capture_output=True, text=True, timeout=60,
        env=job_environment(checkout, RECORD="stopped 0 12 12 the job ends in 9 s", **variables),
    )  # fmt: skip
    assert (done.returncode, requeues(checkout)) == (0, 1), done.stdout


def test_stops_with_progress_are_requeued_again_and_again(checkout):
    for first in range(0, 50, 10):
        submit(checkout, "a.toml", RECORD=f"stopped {first} {first + 10} {first + 10} the job ends in 9 s")
    assert requeues(checkout) == 5


def test_run_that_failed_is_requeued_once(checkout):
    done = submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    assert (done.returncode, requeues(checkout)) == (0, 1)


def test_run_that_fails_twice_from_the_same_iteration_is_given_up(checkout):
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    done = submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    assert (done.returncode, requeues(checkout)) == (9, 1)
    assert "failed (srun: exit 9) after a start from iteration 20, for the second time; not requeued" in done.stdout


def test_failures_between_which_the_run_saved_are_not_the_same_one_twice(checkout):
    submit(checkout, "a.toml", RECORD="running 0 0 0", SRUN_STATUS="9")
    done = submit(checkout, "a.toml", RECORD="running 0 2000 0", SRUN_STATUS="9")
    assert requeues(checkout) == 2
    assert "after a start from iteration 0 and a checkpoint of iteration 2000; requeueing" in done.stdout
    done = submit(checkout, "a.toml", RECORD="running 2000 2000 2000", SRUN_STATUS="9")
    assert (done.returncode, requeues(checkout)) == (9, 2)


def test_run_that_fails_further_on_is_requeued(checkout):
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    submit(checkout, "a.toml", RECORD="running 30 30 30", SRUN_STATUS="9")
    assert requeues(checkout) == 2


def test_stop_with_progress_forgives_an_earlier_failure(checkout):
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    submit(checkout, "a.toml", RECORD="stopped 20 30 30 asked by SIGUSR1")
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="9")
    assert requeues(checkout) == 3


def test_run_that_stops_twice_where_it_started_is_given_up(checkout):
    submit(checkout, "a.toml", RECORD="stopped 20 20 20 the job ends in 0 s")
    done = submit(checkout, "a.toml", RECORD="stopped 20 20 20 the job ends in 0 s")
    assert (done.returncode, requeues(checkout)) == (1, 1)


def test_run_that_is_asked_to_stop_where_it_started_is_requeued_each_time(checkout):
    for _ in range(3):
        done = submit(checkout, "a.toml", RECORD="stopped 20 20 20 asked by SIGTERM")
    assert (done.returncode, requeues(checkout)) == (0, 3)


@pytest.mark.parametrize("record", ["", "failed - - - asked by SIGTERM before the first iteration"])
def test_start_that_a_signal_meets_is_requeued_once(record, checkout):
    # Preemption with a time of grace: the job still runs, and Slurm does not start it again by itself.
    for restart in ("0", "1"):
        done = submit(checkout, "a.toml", RECORD=record, SRUN_STATUS="143", SLURM_RESTART_COUNT=restart)
    assert (done.returncode, requeues(checkout)) == (143, 1)


def test_run_whose_last_save_failed_counts_as_failed(checkout):
    done = submit(checkout, "a.toml", RECORD="stopped 20 30 30 asked by SIGTERM", SRUN_STATUS="2")
    assert requeues(checkout) == 1
    assert "failed (srun: exit 2) after a start from iteration 20" in done.stdout


def test_run_that_never_began_is_not_requeued(checkout):
    done = submit(checkout, "a.toml", SRUN_STATUS="2")
    assert (done.returncode, requeues(checkout)) == (2, 0)


def test_record_of_an_earlier_start_is_not_taken_for_this_one(checkout):
    (checkout / "runs").mkdir()
    (checkout / "runs" / ".job-17.start-0").write_text("stopped 0 12 12 asked by SIGTERM\n")
    submit(checkout, "a.toml", SRUN_STATUS="2")
    assert requeues(checkout) == 0


def test_restarted_run_that_never_began_is_requeued_once(checkout):
    for restart in ("3", "4"):
        done = submit(checkout, "a.toml", SRUN_STATUS="1", SLURM_RESTART_COUNT=restart)
    assert (done.returncode, requeues(checkout)) == (1, 1)
    assert "failed (srun: exit 1) before the first iteration, for the second time; not requeued" in done.stdout


def test_failure_before_the_first_iteration_that_the_run_told_of_is_one_too(checkout):
    done = submit(checkout, "a.toml", RECORD="failed - - - failed: no disk", SRUN_STATUS="1")
    assert (done.returncode, requeues(checkout)) == (1, 0)
    assert "before the first iteration; not requeued" in done.stdout


def test_failure_that_the_run_told_of_counts_from_where_it_started(checkout):
    for _ in range(2):
        done = submit(checkout, "a.toml", RECORD="failed 20 20 37 failed: no disk", SRUN_STATUS="2")
    assert (done.returncode, requeues(checkout)) == (2, 1)
    assert "after a start from iteration 20, for the second time" in done.stdout


def test_srun_that_does_not_end_after_a_failure_is_killed(checkout):
    # A minute and five seconds, but for a clock that runs sixty times as fast.
    script = checkout / "slurm" / PRETRAIN
    fast = (ROOT / "slurm" / PRETRAIN).read_text().replace("pause 5\n", "pause 0.1\n").replace("pause 60", "pause 1")
    script.write_text(fast)
    variables = {"RECORD": "failed 20 20 37 failed: no disk", "SRUN_RUNS": "read -r _ <> <(:)"}
    done = subprocess.run(
        ["bash", str(script), "a.toml"], env=job_environment(checkout, **variables), cwd="/",
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "srun waits for tasks that do not end; killing it" in done.stdout
    assert "failed (srun: signal KILL) after a start from iteration 20; requeueing" in done.stdout
    assert requeues(checkout) == 1


@pytest.mark.parametrize("record", ["", "refused - - - failed: of another model"])
def test_restarted_run_that_is_refused_is_not_requeued(record, checkout):
    done = submit(checkout, "a.toml", RECORD=record, SRUN_STATUS="2", SLURM_RESTART_COUNT="3")
    assert (done.returncode, requeues(checkout)) == (2, 0)


def test_restarted_run_that_lost_a_rank_at_its_start_is_requeued_once(checkout):
    # The ranks that are left end with the exit code of a refusal.
    record = "failed - - - failed: rank 1 (n2, pid 5) is gone"
    for restart in ("3", "4"):
        done = submit(checkout, "a.toml", RECORD=record, SRUN_STATUS="2", SLURM_RESTART_COUNT=restart)
    assert (done.returncode, requeues(checkout)) == (2, 1)


def test_signal_while_the_requeue_is_decided_does_not_end_the_script(checkout):
    squeue = checkout / "bin" / "squeue"
    squeue.write_text(squeue.read_text().replace("case ", "[[ $* != *%T* ]] || kill -TERM $PPID\ncase ", 1))
    done = submit(checkout, "a.toml", RECORD="stopped 0 12 12 asked by SIGTERM")
    assert (done.returncode, requeues(checkout)) == (0, 1)


def test_run_that_cannot_leave_word_of_its_failure_is_not_requeued(checkout):
    (checkout / "runs" / ".job-17.failed.new").mkdir(parents=True)  # as on a full disk
    done = submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="2")
    assert (done.returncode, requeues(checkout)) == (2, 0)
    assert "not requeued: " in done.stdout and "cannot be written" in done.stdout


@pytest.mark.parametrize(("status", "how"), [("137", "signal KILL"), ("9", "exit 9"), ("255", "exit 255")])
def test_start_after_a_failure_is_told_what_it_was(status, how, checkout):
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS=status)
    submit(checkout, "a.toml", RECORD="finished 20 40 40", SLURM_RESTART_COUNT="1")
    assert task_environment(checkout)["MEGAPINTS_PREVIOUS_END"] == f"srun ended with {how}"


def test_first_start_of_a_job_is_told_of_no_other(checkout):
    submit(checkout, "a.toml")
    assert "MEGAPINTS_PREVIOUS_END" not in task_environment(checkout)


def test_start_after_one_whose_batch_script_was_killed_is_told_so(checkout):
    (checkout / "runs").mkdir()
    (checkout / "runs" / ".job-17.start-0").write_text("running 20 20 20\n")
    submit(checkout, "a.toml", SLURM_RESTART_COUNT="1")
    previous = task_environment(checkout)["MEGAPINTS_PREVIOUS_END"]
    assert previous == "Slurm killed the job, or lost the node of the batch script"


def test_start_after_one_that_slurm_ended_is_told_so_though_an_earlier_one_had_failed(checkout):
    submit(checkout, "a.toml", RECORD="running 20 20 20", SRUN_STATUS="1")
    submit(
        checkout,
        "a.toml",
        RECORD="running 20 20 20",
        SRUN_STATUS="143",
        SLURM_RESTART_COUNT="1",
        JOB_STATE="COMPLETING",
    )
    submit(checkout, "a.toml", SLURM_RESTART_COUNT="2")
    assert task_environment(checkout)["MEGAPINTS_PREVIOUS_END"].startswith("Slurm ended the job: ")


def test_job_that_slurm_ended_is_left_to_slurm(checkout):
    submit(checkout, "a.toml", RECORD="stopped 0 12 12 asked by SIGTERM", JOB_STATE="COMPLETING")
    assert requeues(checkout) == 0


def test_job_that_came_to_its_limit_is_requeued_though_slurm_ended_it(checkout):
    submit(
        checkout, "a.toml",
        RECORD="stopped 0 12 12 asked by SIGTERM", JOB_STATE="COMPLETING", SLURM_JOB_END_TIME=str(int(time.time()) - 1),
    )  # fmt: skip
    assert requeues(checkout) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_script_goes_to_its_tasks_and_does_not_end_it_before_them(number, checkout):
    # The stub of srun ends when it is told to; a USR1 must have come to it by then.
    tasks = "trap 'seen=USR1' USR1; touch $CALLS/up; until [ -e $CALLS/end ]; do read -rt 0.1 <> <(:) || :; done; " + (
        'echo "$seen" >$CALLS/seen; SRUN_STATUS=7'
    )
    calls = checkout / "calls"
    process = subprocess.Popen(
        job_command(checkout, PRETRAIN, "a.toml"), cwd="/", stdout=subprocess.PIPE, text=True,
        env=job_environment(checkout, SRUN_RUNS=tasks),
    )  # fmt: skip
    _wait_for(calls / "up")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    (calls / "end").touch()
    output, _ = process.communicate(timeout=30)
    assert (calls / "seen").read_text().strip() == "USR1"
    assert process.returncode == 7, output  # srun's own status, not the signal's


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_missing_arguments_are_told(script, checkout):
    done = submit(checkout, script=script.name)
    assert done.returncode == 2 and done.stderr.startswith("error: no ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_submission_from_elsewhere_is_told(script, checkout):
    done = submit(checkout, "a.toml", script=script.name, SLURM_SUBMIT_DIR=str(checkout / "calls"))
    assert done.returncode == 2 and "call sbatch from the top of the checkout" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_call_outside_slurm_is_told(script, checkout):
    done = submit(checkout, "a.toml", script=script.name, SLURM_JOB_ID="")
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"MEGAPINTS_RUNTIME": "docker", "MEGAPINTS_CONTAINER": "a"}, "must be pyxis or apptainer"),
        ({"MEGAPINTS_RUNTIME": "apptainer"}, "set MEGAPINTS_CONTAINER"),
        ({"MEGAPINTS_MOUNTS": "/data:/data"}, "set MEGAPINTS_CONTAINER"),
    ],
)
def test_container_that_cannot_be_is_told(variables, problem, checkout):
    done = submit(checkout, "a.toml", **variables)
    assert done.returncode == 2 and problem in done.stderr


def test_mpiexec_across_containers_is_told(checkout):
    variables = {"MEGAPINTS_MPI": "mpiexec", "MEGAPINTS_CONTAINER": "a"}
    done = submit(checkout, "--input", "a", script="preprocess.sbatch", **variables)
    assert done.returncode == 2 and "use pmix" in done.stderr
