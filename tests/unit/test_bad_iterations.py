"""What counts as a bad iteration."""

from __future__ import annotations

import math
import statistics

import pytest

from megatron_ext.config.tree import ReliabilityConfig
from megatron_ext.training.bad_iterations import find_fault

LOSSES = [3.0, 3.1, 2.9, 3.05, 2.95, 3.2, 2.8, 3.0, 3.1, 2.9]
LIMIT = statistics.mean(LOSSES) + 4 * statistics.stdev(LOSSES)
LOOKING = ReliabilityConfig(spike_deviations=4.0, spike_window_iters=10)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_bad(loss):
    assert find_fault(loss, 1.0, [], ReliabilityConfig()) == f"the loss is {loss}"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_gradient_norm_that_is_not_finite_is_bad(norm):
    assert find_fault(3.0, norm, [], ReliabilityConfig()) == f"the gradient norm is {norm}"


def test_loss_just_below_the_limit_is_none():
    assert find_fault(LIMIT - 1e-9, 1.0, LOSSES, LOOKING) is None


def test_loss_just_above_the_limit_is_a_spike():
    fault = find_fault(LIMIT + 1e-9, 1.0, LOSSES, LOOKING)
    assert fault == "the loss is 3.4714, 4.0 standard deviations above 3.0000, the mean of the last 10"


def test_loss_far_below_the_mean_is_none():
    assert find_fault(0.0, 1.0, LOSSES, LOOKING) is None


def test_loss_is_no_spike_before_the_window_is_full():
    assert find_fault(1000.0, 1.0, LOSSES[:-1], LOOKING) is None


def test_loss_is_no_spike_where_none_is_looked_for():
    assert find_fault(1000.0, 1.0, LOSSES, ReliabilityConfig()) is None


def test_loss_that_never_varied_is_measured_against_nothing():
    assert find_fault(3.1, 1.0, [3.0] * 10, LOOKING) is None
