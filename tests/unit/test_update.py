"""The update in two halves against Megatron's own step, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer, set_rates
from megatron_ext.optim.update import apply_update, ready_gradients

pytestmark = pytest.mark.usefixtures("one_process")
UNSHARDED = ("--parallel.use_distributed_optimizer", "false")
BF16 = ("--precision.dtype", "bf16")


class Whole:
    """A model and its optimizer, with gradients that differ everywhere."""

    def __init__(self, config: Any) -> None:
        (self.chunk,) = wrap_for_training(config, build_model(config)).wrapped
        self.optimizer = build_optimizer(config, [self.chunk])
        set_rates(self.optimizer, lr=0.01, weight_decay=0.1)

    def draw_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))

    def state(self) -> list[Any]:
        """Parameters, fp32 copies, moments and step counts."""
        found: list[Any] = [parameter.detach().clone() for parameter in self.chunk.parameters()]
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                found.append(group.get("step", 0))
                for parameter in group["params"]:
                    found.append(parameter.detach().clone())
                    found += [value.clone() for value in part.optimizer.state[parameter].values()]
        return found


def equal(one: list[Any], other: list[Any]) -> bool:
    assert len(one) == len(other)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("clip_grad", ["0.5", "1e6", "0"])
@pytest.mark.parametrize("overrides", [(), UNSHARDED, BF16, (*BF16, *UNSHARDED)])
def test_both_halves_do_what_megatrons_step_does(overrides, clip_grad, tiny_config):
    config = tiny_config("--optimizer.clip_grad", clip_grad, *overrides)
    ours, theirs = Whole(config), Whole(config)
    for seed in (1, 2):
        ours.draw_gradients(seed)
        theirs.draw_gradients(seed)
        norm = ready_gradients(ours.optimizer)
        apply_update(ours.optimizer, norm)
        _, expected, _ = theirs.optimizer.step()
        assert float(norm) == float(expected)
    assert equal(ours.state(), theirs.state())


@pytest.mark.parametrize("overrides", [(), UNSHARDED, BF16, (*BF16, *UNSHARDED)])
def test_first_half_alone_changes_nothing(overrides, tiny_config):
    whole = Whole(tiny_config(*overrides))
    whole.draw_gradients(1)
    apply_update(whole.optimizer, ready_gradients(whole.optimizer))
    before = whole.state()
    whole.draw_gradients(2)
    ready_gradients(whole.optimizer)
    assert equal(whole.state(), before)
