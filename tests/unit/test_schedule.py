"""The learning rate against 1.5-Pints' printed points and Megatron's formulas, recomputed by hand."""

import math
from dataclasses import replace

import pytest

from megatron_ext.config.tree import OptimizerConfig, TrainConfig
from megatron_ext.optim.schedule import global_batch_size_at, learning_rate, samples_after, total_samples

PINTS = OptimizerConfig(lr=4e-4, min_lr=4e-5, lr_warmup_iters=2000)
TRAIN = TrainConfig(seq_length=2048, micro_batch_size=8, global_batch_size=512, train_iters=96180)


def rate(iteration: int, optimizer: OptimizerConfig = PINTS, train: TrainConfig = TRAIN) -> float:
    """Return the rate of the k-th iteration, counted from 1."""
    return learning_rate(optimizer, train, samples_after(train, iteration - 1))


@pytest.mark.parametrize(("iteration", "expected"), [(48090, 2.260e-4), (90000, 4.381e-5)])
def test_learning_rate_pints_goes_through_the_published_points(iteration: int, expected: float) -> None:
    assert rate(iteration) == pytest.approx(expected, rel=2.5e-4)  # printed with four digits


def test_learning_rate_first_iteration_is_one_step_of_the_warmup() -> None:
    assert rate(1) == pytest.approx(4e-4 / 2000)


def test_learning_rate_peak_is_at_the_end_of_the_warmup() -> None:
    assert rate(2000) == 4e-4
    assert rate(1999) < 4e-4 > rate(2001)


def test_learning_rate_without_warmup_starts_at_the_top_of_the_decay() -> None:
    optimizer = replace(PINTS, lr_warmup_iters=0, lr_decay_style="linear", min_lr=0.0)
    train = replace(TRAIN, train_iters=10)
    assert [rate(k, optimizer, train) for k in (1, 5, 10)] == pytest.approx([3.6e-4, 2e-4, 0.0])


def test_learning_rate_after_the_decay_stays_at_min_lr() -> None:
    optimizer = replace(PINTS, lr_decay_iters=50_000)
    assert rate(50_000, optimizer) == pytest.approx(4e-5)
    assert rate(50_001, optimizer) == rate(96_180, optimizer) == 4e-5


def test_learning_rate_cosine_is_half_way_at_half_time() -> None:
    assert rate(2000 + (96180 - 2000) // 2) == pytest.approx((4e-4 + 4e-5) / 2)


def test_learning_rate_constant_stays_after_the_warmup() -> None:
    optimizer = replace(PINTS, lr_decay_style="constant", min_lr=0.0)
    assert rate(1000, optimizer) == pytest.approx(2e-4)
    assert {rate(k, optimizer) for k in (2000, 50_000, 96_180, 200_000)} == {4e-4}


@pytest.mark.parametrize(
    ("style", "left"),
    [
        ("linear", 0.75),
        ("cosine", 0.5 * (1 + math.cos(math.pi / 4))),
        ("exponential", 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_learning_rate_wsd_decays_over_its_last_iterations_only(style: str, left: float) -> None:
    optimizer = replace(
        PINTS,
        lr_decay_style="wsd",
        lr_wsd_decay_iters=1000,
        lr_wsd_decay_style=style,  # type: ignore[arg-type]
    )
    assert rate(95_180, optimizer) == pytest.approx(4e-4)
    assert rate(95_430, optimizer) == pytest.approx(4e-5 + left * 3.6e-4)
    assert rate(96_180, optimizer) == pytest.approx(4e-5)


def test_global_batch_size_at_ramp_up_takes_megatrons_values() -> None:
    # megatron-core 0.16.1: [16, +16, 256 samples] to 32 gives these at 0, 128, 256 and 512 samples
    train = replace(TRAIN, global_batch_size=32, rampup_batch_size=(16, 16, 256))
    assert [global_batch_size_at(train, samples) for samples in (0, 128, 256, 512)] == [16, 16, 32, 32]


def test_total_samples_ramp_up_is_the_sum_of_the_iterations() -> None:
    train = replace(TRAIN, global_batch_size=40, rampup_batch_size=(8, 16, 100), train_iters=30)
    consumed = 0
    for _ in range(30):
        consumed += global_batch_size_at(train, consumed)
    assert total_samples(train) == consumed < 30 * 40


def test_total_samples_without_ramp_up_is_a_product() -> None:
    assert total_samples(TRAIN) == 512 * 96180


def test_learning_rate_ramp_up_still_ends_at_min_lr() -> None:
    train = replace(TRAIN, rampup_batch_size=(64, 64, 500_000))
    assert rate(96_180, train=train) == pytest.approx(4e-5)
    assert rate(96_179, train=train) > 4e-5


def test_learning_rate_ramp_up_counts_the_warmup_at_the_full_batch() -> None:
    train = replace(TRAIN, rampup_batch_size=(256, 256, 10**9))
    # at half the batch the warm-up takes twice the iterations
    assert rate(2000, train=train) == pytest.approx(2e-4)
    assert rate(4000, train=train) == pytest.approx(4e-4)
