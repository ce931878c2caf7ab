"""A run that is repeated on the same layout gives the same bits: metrics, and parameters with the optimizer's state."""

from __future__ import annotations

import pytest
import torch

from tests.dist.test_resume import OVERLAP, PP2, RESHARDABLE, TP2, metrics, read_tensors

LENGTH = ("--train.train_iters", "8", "--train.eval_interval", "8", *RESHARDABLE)
LAYOUTS = {"one_process": (1, ()), "dp2_overlap": (2, OVERLAP), "tp2": (2, TP2), "pp2": (2, PP2)}


def assert_bit_equal(one, other):
    assert metrics(one) == metrics(other)
    first, second = (read_tensors(run.run_dir / "checkpoints" / "iter_0000008") for run in (one, other))
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize(
    ("layout", "deterministic", "threads"),
    [
        ("one_process", "false", 2),
        pytest.param("one_process", "true", 1, marks=pytest.mark.slow),
        pytest.param("dp2_overlap", "true", 1, marks=pytest.mark.slow),
        pytest.param("dp2_overlap", "false", 2, marks=pytest.mark.slow),
        pytest.param("tp2", "true", 2, marks=pytest.mark.slow),
        pytest.param("pp2", "false", 1, marks=pytest.mark.slow),
    ],
)
def test_repeated_run_on_the_cpu_is_bit_equal(layout, deterministic, threads, trainer):
    ranks, overrides = LAYOUTS[layout]
    overrides = (*LENGTH, *overrides, "--reliability.deterministic", deterministic)
    environment = {"OMP_NUM_THREADS": str(threads)}
    one, other = (trainer.train(name, *overrides, ranks=ranks, environment=environment) for name in ("one", "other"))
    assert_bit_equal(one, other)
