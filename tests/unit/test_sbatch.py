"""slurm/pretrain.sbatch under a Slurm of stubs: `srun` and `scontrol` that write down their calls."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the entry point, and stubs first in the PATH."""
    (tmp_path / "pretrain_pints.py").write_text("")
    stubs = {
        "scontrol": 'echo "$@" >>"$CALLS/scontrol"; printf "n1\\nn2\\n"',
        "srun": 'printf "%s\\n" "$@" >"$CALLS/srun"; echo "$MASTER_ADDR $MASTER_PORT" >"$CALLS/master"',
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()
    for name, body in stubs.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def submit(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm does: a copy of it, elsewhere, with the job's variables."""
    copy = checkout / "calls" / "slurm_script"
    shutil.copy(SCRIPT, copy)
    environment = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(checkout / "calls"),
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    return subprocess.run(
        ["bash", str(copy), *arguments],
        env=environment | JOB | variables,
        cwd="/",
        capture_output=True,
        text=True,
    )


def srun_arguments(checkout: Path) -> list[str]:
    return (checkout / "calls" / "srun").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_satisfies_shellcheck(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_holds_no_training_flag(script):
    code = [line for line in script.read_text().splitlines() if not line.startswith("# ")]
    sections = "model|precision|parallel|data|train|optimizer|checkpoint|log"
    assert not re.search(rf"--({sections})\.", "\n".join(code))


def test_gpus_of_the_node_give_the_tasks(checkout):
    assert submit(checkout, "a.toml", SLURM_GPUS_ON_NODE="8").returncode == 0
    options = srun_arguments(checkout)
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"} <= set(options)


def test_node_without_gpus_gets_one_task_with_all_cores(checkout):
    assert submit(checkout, "a.toml").returncode == 0
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"} <= set(srun_arguments(checkout))


def test_config_and_overrides_pass_through_as_they_are(checkout):
    submit(checkout, "a b.toml", "--name", "it's $HOME", "--train.train_iters", "5")
    arguments = srun_arguments(checkout)
    entry = arguments.index("pretrain_pints.py")
    assert arguments[entry + 1 :] == ["a b.toml", "--name", "it's $HOME", "--train.train_iters", "5"]


def test_rank_zero_is_sought_on_the_first_node(checkout):
    submit(checkout, "a.toml")
    # 12000 + 17 * 101 mod 20000, by hand
    assert (checkout / "calls" / "master").read_text() == "n1 13717\n"
    assert (checkout / "calls" / "scontrol").read_text() == "show hostnames n[1-2]\n"


def test_given_master_address_wins(checkout):
    submit(checkout, "a.toml", MASTER_ADDR="10.0.0.1")
    assert (checkout / "calls" / "master").read_text().startswith("10.0.0.1 ")


def test_port_fits_the_one_that_srun_tasks_derive(checkout):
    from megatron_ext.parallel.launch import slurm_port

    submit(checkout, "a.toml", SLURM_JOB_ID="123456")
    port = int((checkout / "calls" / "master").read_text().split()[1])
    assert port == slurm_port(123456, 0)


def test_venv_of_the_checkout_is_used(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    submit(checkout, "a.toml")
    assert ".venv/bin/python" in srun_arguments(checkout)


def test_named_python_wins(checkout):
    submit(checkout, "a.toml", MEGAPINTS_PYTHON="/opt/python")
    assert "/opt/python" in srun_arguments(checkout)


def test_failing_srun_fails_the_job(checkout):
    (checkout / "bin" / "srun").write_text("#!/bin/sh\nexit 7\n")
    assert submit(checkout, "a.toml").returncode == 7


def test_missing_config_is_told(checkout):
    done = submit(checkout)
    assert done.returncode == 2 and done.stderr.startswith("error: no CONFIG")


def test_submission_from_elsewhere_is_told(checkout):
    done = submit(checkout, "a.toml", SLURM_SUBMIT_DIR=str(checkout / "calls"))
    assert done.returncode == 2 and "call sbatch from the top of the checkout" in done.stderr


def test_call_outside_slurm_is_told(checkout):
    done = submit(checkout, "a.toml", SLURM_JOB_ID="")
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr
