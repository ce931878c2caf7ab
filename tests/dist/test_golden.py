"""The golden loss curves: nothing changes what is trained without a word.

`python tests/update_golden.py` records them and tells how they differ.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.update_golden import (
    CASES,
    ITERATIONS,
    TOLERANCE,
    Golden,
    Machine,
    build_data,
    compare,
    read_golden,
    this_machine,
    train,
)

HERE = Machine(cpu_model="one", cpu_capability="AVX2", torch="2.0", megatron_core="0.1")
RECORDED = Golden(data_sha256="", exact_on=(HERE,), metrics={"loss": [3.0, 2.0], "lr": [0.1, 0.2]})


@pytest.mark.parametrize("name", CASES)
def test_training_gives_the_golden_curve(name, tmp_path, capsys):
    golden = read_golden(name)
    assert build_data(tmp_path / "data") == golden.data_sha256
    machine = this_machine()
    comparison = compare(golden, train(CASES[name], tmp_path), machine)
    how = "bit for bit" if comparison.exact else f"to {TOLERANCE:g} relative, for it was not recorded on {machine}"
    with capsys.disabled():
        print(f"\ngolden {name}: compared {how}")
    assert comparison.differences == []


@pytest.mark.parametrize("name", CASES)
def test_golden_curve_has_a_value_for_every_iteration(name):
    metrics = read_golden(name).metrics
    lengths = {metric: len(values) for metric, values in metrics.items()}
    expected = dict.fromkeys(("loss", "grad_norm", "lr", "global_batch_size"), ITERATIONS)
    assert lengths == {**expected, "valid_loss": 2}


@pytest.mark.parametrize("name", CASES)
def test_golden_curve_is_of_a_run_that_learns(name):
    losses = read_golden(name).metrics["loss"]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


def test_equal_curve_has_no_differences():
    assert compare(RECORDED, dict(RECORDED.metrics), HERE) == (True, [])


def test_last_bit_is_a_difference_where_the_curve_was_recorded():
    curve = {**RECORDED.metrics, "loss": [3.0, 2.0000000000000004]}
    assert compare(RECORDED, curve, HERE) == (True, ["loss 2: 2.0000000000000004, must be 2.0"])


@pytest.mark.parametrize("field", ["cpu_model", "cpu_capability", "torch", "megatron_core"])
def test_last_bits_are_no_difference_on_another_machine(field):
    curve = {**RECORDED.metrics, "loss": [3.0, 2.00001]}
    assert compare(RECORDED, curve, replace(HERE, **{field: "another"})) == (False, [])


def test_more_than_the_last_bits_is_a_difference_on_another_machine():
    curve = {**RECORDED.metrics, "loss": [3.0, 2.0001]}
    found = compare(RECORDED, curve, replace(HERE, torch="another"))
    assert found == (False, ["loss 2: 2.0001, must be 2.0"])


def test_value_that_is_not_a_number_is_a_difference_on_another_machine():
    curve = {**RECORDED.metrics, "loss": [3.0, float("nan")]}
    assert compare(RECORDED, curve, replace(HERE, torch="another")).differences


def test_missing_metric_is_a_difference():
    assert compare(RECORDED, {"loss": [3.0, 2.0]}, HERE).differences == ["lr: 0 values, must be 2"]


def test_shorter_curve_is_a_difference():
    curve = {**RECORDED.metrics, "loss": [3.0]}
    assert compare(RECORDED, curve, HERE).differences == ["loss: 1 values, must be 2"]
