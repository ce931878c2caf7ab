"""What a run says of itself before it starts, and when it refuses to."""

from __future__ import annotations

import logging

import pytest

from megatron_ext.data.blend import DataSplits, Samples
from megatron_ext.data.sampler import Blend
from megatron_ext.errors import ConfigError
from megatron_ext.training.report import report_start
from megatron_ext.training.state import TrainState


@pytest.fixture
def data() -> DataSplits:
    # 5 iterations of 8 samples: 20 of each source, so 2 passes over a and 0.5 over b.
    return DataSplits(
        Samples(["data/a", "data/b"], [None, None], Blend([10, 40], [1.0, 1.0], seed=1, first_computed_pass=1)), None
    )


@pytest.fixture
def lines(tiny_config, data, one_process, caplog):
    caplog.set_level(logging.INFO)

    def report(*overrides: str, state: TrainState | None = None) -> str:
        report_start(tiny_config(*overrides), one_process, data, state or TrainState())
        return caplog.text

    return report


def test_report_names_the_passes_over_each_source(lines):
    rows = [line.split() for line in lines().splitlines()]
    a, b = (next(row[row.index(prefix) :] for row in rows if prefix in row) for prefix in ("data/a", "data/b"))
    # tokens and samples of one pass; tokens, share and passes of the run
    assert a == ["data/a", "160", "10", "320", "50.00%", "2.00"]
    assert b == ["data/b", "640", "40", "320", "50.00%", "0.50"]


def test_report_warns_of_a_source_that_is_read_many_times(lines):
    assert "data/a is read 10.0 times: beyond about 4 passes" in lines("--train.train_iters", "25")


def test_report_of_few_passes_warns_of_nothing(lines):
    assert "beyond about" not in lines()


def test_report_of_the_tiny_model_counts_its_parameters(lines):
    # Embedding and output, without padding; per layer the norms, q with k and v, the projection, the MLP; a norm.
    expected = 2 * 97 * 32 + 4 * (32 * 64 + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert f"model: {expected:,} parameters" in lines()


def test_report_of_a_resumed_run_says_where_it_continues(lines):
    assert "continuing after iteration 3 of 5, at sample 24" in lines(state=TrainState(3, 24, 384))


def test_report_of_a_new_run_says_nothing_of_continuing(lines):
    assert "continuing" not in lines()


def test_passes_within_the_limit_are_allowed(lines):
    assert "data/a" in lines("--data.max_epochs", "2")


def test_passes_above_the_limit_are_refused_naming_the_source(lines):
    with pytest.raises(ConfigError) as caught:
        lines("--data.max_epochs", "1.5")
    assert caught.value.problems == (
        "data.max_epochs (1.5) would be passed: data/a is read 2.00 times in 5 iterations; "
        "train for fewer, or add data.",
    )
