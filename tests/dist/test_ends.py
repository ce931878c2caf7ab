"""How a run of several ranks says that it failed: on the console, and in its metrics."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import Finished, child_environment

HERE = Path(__file__).parent
QUICK = ("--reliability.preflight", "false", "--train.eval_interval", "100000")

REFUSED_ON_RANK_1 = """
import os, sys
sys.path.insert(0, {root!r})
import pretrain_pints
from megatron_ext.errors import LaunchError

def set_runtime_environment(**_):
    if os.environ["RANK"] == "1":
        raise LaunchError("environment: this GPU is not what it should be")

pretrain_pints.set_runtime_environment = set_runtime_environment
if __name__ == "__main__":
    if code := pretrain_pints.main():
        pretrain_pints.leave(code)
"""


def run_script(trainer, script: Path, *arguments: str, overrides: tuple[str, ...] = ()) -> Finished:
    *launch, _, config = trainer.command("run", ranks=2)
    done = subprocess.run(
        [*launch, str(script), *arguments, config, *QUICK, *overrides],
        capture_output=True, text=True, timeout=120, env=child_environment(), cwd=trainer.work,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout + done.stderr, trainer.work / "run")


@pytest.mark.slow
def test_mistake_that_only_a_second_rank_of_a_node_meets_is_told_once(trainer):
    script = trainer.work / "refused.py"
    script.write_text(REFUSED_ON_RANK_1.format(root=str(HERE.parents[1])))
    finished = run_script(trainer, script)
    assert finished.returncode != 0
    assert finished.output.count("error: environment: this GPU is not what it should be") == 1
    assert "megatron_ext" not in finished.output  # torchrun tells a traceback of its own, but none is ours


def test_start_that_is_refused_tells_one_line_and_leaves_no_metrics(trainer):
    finished = trainer.train("run", "--checkpoint.init_from", str(trainer.data), fails=True)
    assert finished.returncode == 2
    assert not (finished.run_dir / "metrics.jsonl").exists()
    (line,) = finished.output.split("error: ")[1:]
    assert line.startswith(str(trainer.data))


@pytest.mark.slow
def test_killed_run_starts_again_and_says_what_it_cost(trainer):
    killed = run_script(
        trainer, HERE / "planted_fault.py", "die", "0", "4", overrides=("--checkpoint.save_interval", "2")
    )
    assert not killed.rows("stop")
    again = trainer.train("run", "--checkpoint.save_interval", "2", *QUICK, ranks=2)
    (_, start) = again.rows("start")
    assert (start["restart"], start["redone_iterations"]) == (1, 1)
    assert start["reason"] == "ended without a word (killed or crashed)"
    said = f"restart 1 (after: {start['reason']}; 1 iterations are trained again; {start['lost_seconds']:.0f} s lost)"
    assert said in again.output and said in (again.run_dir / "log.txt").read_text()
