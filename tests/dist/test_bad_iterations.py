"""Several ranks do the same about a bad iteration, in every layout, and through kills."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Finished, Trainer, child_environment
from tests.dist.test_resume import LAYOUTS, metrics, read_tensors

ITERATIONS = 15
COMMON = ("--train.train_iters", str(ITERATIONS), "--train.eval_interval", "100", "--checkpoint.save_interval", "5",
          "--reliability.preflight", "false")  # fmt: skip
ASYNC = ("--checkpoint.async_save", "true")
# Sample 100 is in iteration 13; the losses of 12 iterations come before it.
FAULTS = {"nan": {"nan": [100]}, "inf": {"inf": [100]}, "spike": {"spike": [100]}}
SPIKES = ("--reliability.spike_deviations", "6", "--reliability.spike_window_iters", "10")
POLICIES = {
    "skip": ("--reliability.bad_iteration_policy", "skip"),
    "rewind": ("--reliability.bad_iteration_policy", "rewind", "--reliability.rewind_skip_iters", "1"),
}
PASSED_OVER = {"skip": (13, 13), "rewind": (12, 13)}


def train(
    trainer: Trainer, run: str, faults: dict[str, Any], *overrides: str, ranks: int, dies: bool = False
) -> Finished:
    """Run tests/dist/faulty.py in place of pretrain_pints.py."""
    command = trainer.command(run, *overrides, ranks=ranks)
    script = command.index(str(ROOT / "pretrain_pints.py"))
    command[script : script + 1] = [str(ROOT / "tests" / "dist" / "faulty.py"), json.dumps(faults)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=child_environment(), cwd=trainer.work
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) is dies, output[-6000:]
    return Finished(done.returncode, output, trainer.work / run)


def reference(trainer: Trainer, policy: str, *overrides: str, ranks: int) -> Finished:
    """Train without faults, told by hand which samples to pass over."""
    first, last = PASSED_OVER[policy]
    bad = {
        "iteration": last, "reason": "", "policy": policy, "first_iteration": first, "last_iteration": last,
        "first_sample": 8 * (first - 1), "last_sample": 8 * last - 1, "source": "",
    }  # fmt: skip
    (trainer.work / "reference").mkdir()
    (trainer.work / "reference" / "skipped.json").write_text(json.dumps({"format": 1, "bad_iterations": [bad]}))
    return trainer.train("reference", *overrides, ranks=ranks)


def as_it_went_on(finished: Finished) -> list[tuple[float, ...]]:
    """The metrics of each iteration, those that a rewind took back left out."""
    newest = {row[0]: row for row in metrics(finished)}
    first, last = finished.rows("rewind")[-1]["iterations"] if finished.rows("rewind") else (0, 0)
    return [row for iteration, row in sorted(newest.items()) if not first <= iteration <= last]


def model_weights(finished: Finished) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint; the optimizer's state has gaps there, which hold whatever memory held."""
    tensors = read_tensors(finished.run_dir / "checkpoints" / f"iter_{ITERATIONS:07d}")
    return {key: value for key, value in tensors.items() if "optimizer" not in key}


CASES = [
    ("tp2", "rewind", "spike", ASYNC),
    ("pp2", "skip", "inf", ASYNC),
    ("dp2", "skip", "nan", ()),
    ("dp2_overlap", "skip", "inf", ASYNC),
    ("dp2_overlap", "rewind", "spike", ASYNC),
]
"""One process is in tests/unit/test_loop.py, with each fault and policy."""
QUICK = {("dp2_overlap", "rewind", "spike")}
"""What `make test` runs of them; .ci/run runs them all."""


@pytest.mark.parametrize(
    ("layout", "policy", "fault", "saving"),
    [pytest.param(*case, marks=() if case[:3] in QUICK else pytest.mark.slow, id="-".join(case[:3])) for case in CASES],
)
def test_bad_iteration_leaves_no_trace(layout, policy, fault, saving, trainer):
    ranks, overrides = LAYOUTS[layout]
    overrides = (*COMMON, *overrides, *saving)
    found = train(trainer, "faulty", FAULTS[fault], *overrides, *POLICIES[policy], *SPIKES, ranks=ranks)
    expected = reference(trainer, policy, *overrides, ranks=ranks)
    assert [tuple(row["iterations"]) for row in found.rows(policy)] == [PASSED_OVER[policy]]
    assert as_it_went_on(found) == metrics(expected)
    weights = [model_weights(run) for run in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    assert not [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "policy", "die"), [("dp2_overlap", "rewind", "before record"), ("tp2", "skip", "after record")]
)
def test_kill_around_the_record_neither_forgets_nor_counts_twice(layout, policy, die, trainer):
    ranks, overrides = LAYOUTS[layout]
    overrides = (*COMMON, *overrides, *ASYNC)
    train(trainer, "killed", {**FAULTS["nan"], "die": die}, *overrides, *POLICIES[policy], ranks=ranks, dies=True)
    found = train(trainer, "killed", FAULTS["nan"], *overrides, *POLICIES[policy], ranks=ranks)
    assert len(json.loads((found.run_dir / "skipped.json").read_text())["bad_iterations"]) == 1
    expected = reference(trainer, policy, *overrides, ranks=ranks)
    first, last = PASSED_OVER[policy]
    newest = {row[0]: row for row in metrics(found) if not first <= row[0] <= last}
    assert [newest[iteration] for iteration in sorted(newest)] == metrics(expected)


@pytest.mark.slow
def test_damaged_record_stops_every_rank(trainer):
    (trainer.work / "damaged").mkdir()
    (trainer.work / "damaged" / "skipped.json").write_text("{")
    finished = train(trainer, "damaged", {}, *COMMON, ranks=2, dies=True)
    assert "skipped.json: damaged" in finished.output and "megatron_ext" not in finished.output
