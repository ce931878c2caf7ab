"""Megatron's optimizer over our Adam: what is decayed, and by which rates."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from megatron_ext.model.gpt import Model, build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer, set_rates

pytestmark = pytest.mark.usefixtures("one_process")
SHARDED = pytest.mark.parametrize("sharded", ["true", "false"], ids=["distributed", "plain"])
LR, DECAY = 0.5, 0.1


class Built(NamedTuple):
    model: Model
    optimizer: object

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.bare[0].named_parameters()}

    def step(self, gradient: float = 0.0) -> tuple[bool, float, object]:
        """Update with every gradient equal to this."""
        for chunk in self.model.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for parameter in self.model.bare[0].parameters():
            parameter.main_grad.fill_(gradient)
        return self.optimizer.step()


@pytest.fixture
def build(tiny_config):
    def build(*overrides: str) -> Built:
        config = tiny_config("--optimizer.weight_decay", str(DECAY), *overrides)
        model = wrap_for_training(config, build_model(config))
        optimizer = build_optimizer(config, model.wrapped)
        set_rates(optimizer, lr=LR, weight_decay=DECAY)
        return Built(model, optimizer)

    return build


def shrunk(built: Built) -> dict[str, float]:
    """What is left of each parameter after an update without gradient: (1 - lr x decay) where it is decayed."""
    before = built.weights()
    built.step()
    # The rows that pad the vocabulary are zero, and stay so.
    return {name: (weight / before[name]).nanmean().item() for name, weight in built.weights().items()}


@SHARDED
def test_weight_decay_reaches_every_matrix(sharded, build):
    left = shrunk(build("--parallel.use_distributed_optimizer", sharded))
    matrices = [share for name, share in left.items() if "norm" not in name]
    assert len(matrices) == 4 * 4 + 2
    assert matrices == pytest.approx([1 - LR * DECAY] * len(matrices), rel=1e-5)


@SHARDED
def test_weight_decay_leaves_the_norms_alone(sharded, build):
    left = shrunk(build("--parallel.use_distributed_optimizer", sharded))
    norms = [share for name, share in left.items() if "norm" in name]
    assert norms == [1.0] * (2 * 4 + 1)


@SHARDED
def test_weight_decay_of_all_reaches_the_norms_too(sharded, build):
    built = build("--optimizer.weight_decay_scope", "all", "--parallel.use_distributed_optimizer", sharded)
    norms = [share for name, share in shrunk(built).items() if "norm" in name]
    assert norms == pytest.approx([1 - LR * DECAY] * (2 * 4 + 1), rel=1e-5)


def test_rates_set_later_replace_the_former(build):
    built = build()
    set_rates(built.optimizer, lr=0.1, weight_decay=0.2)
    left = shrunk(built)
    assert left["decoder.layers.0.mlp.linear_fc2.weight"] == pytest.approx(1 - 0.1 * 0.2, rel=1e-5)


def test_update_without_decay_is_adams(build):
    # The first step of Adam is lr x g/|g|.
    built = build()
    set_rates(built.optimizer, lr=0.01, weight_decay=0.0)
    before = built.weights()
    built.step(gradient=1.0)
    changes = torch.cat([(weight - before[name]).flatten() for name, weight in built.weights().items()])
    torch.testing.assert_close(changes, torch.full_like(changes, -0.01), rtol=1e-3, atol=0)


def test_gradient_norm_is_that_of_all_parameters(build):
    built = build()
    total = sum(weight.numel() for weight in built.weights().values())
    _, norm, _ = built.step(gradient=0.5)
    assert float(norm) == pytest.approx(0.5 * total**0.5, rel=1e-5)


def test_gradients_above_the_limit_are_scaled_to_it(build):
    # With an epsilon far above the gradients Adam's first step is lr x g / eps: their scale is seen.
    built = build("--optimizer.clip_grad", "1.0", "--optimizer.adam_eps", "1e6")
    set_rates(built.optimizer, lr=1e6, weight_decay=0.0)
    before = built.weights()
    built.step(gradient=3.0)
    changes = torch.cat([(weight - before[name]).flatten() for name, weight in built.weights().items()])
    assert changes.double().norm().item() == pytest.approx(1.0, rel=1e-3)


def test_gradients_without_a_limit_are_not_scaled(build):
    built = build("--optimizer.clip_grad", "0", "--optimizer.adam_eps", "1e6")
    set_rates(built.optimizer, lr=1e6, weight_decay=0.0)
    before = built.weights()
    built.step(gradient=3.0)
    changes = torch.cat([(weight - before[name]).flatten() for name, weight in built.weights().items()])
    torch.testing.assert_close(changes, torch.full_like(changes, -3.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("option", "key", "value"), [("adam_beta1", 0, 0.8), ("adam_beta2", 1, 0.99)])
def test_betas_are_handed_on(option, key, value, build):
    built = build(f"--optimizer.{option}", str(value))
    assert {group["betas"][key] for group in built.optimizer.param_groups} == {value}
