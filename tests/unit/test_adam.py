"""Our Adam against torch's own and against the published update in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron_ext.optim.adam import FusedAdam

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 6


def start() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 7), (3,), (1, 1))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    # Of sizes from 1e-4 to 1e1, so that both moments and epsilon count.
    return [torch.randn(p.shape, generator=generator) * 10.0 ** (step % 6 - 4) for p in start()]


def run(optimizer: torch.optim.Optimizer, parameters, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.to(parameter.dtype).clone()
        optimizer.step()


def close(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        # The same few fp32 operations in another order, over six steps.
        torch.testing.assert_close(a.detach().double(), b.detach().double(), rtol=1e-6, atol=1e-7)


def written_out() -> list[torch.Tensor]:
    """Loshchilov & Hutter, algorithm 2, in float64, element by element."""
    weights = [p.detach().double() for p in start()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    beta1, beta2 = SETTINGS["betas"]
    for step in range(STEPS):
        for i, gradient in enumerate(g.double() for g in gradients(step)):
            first[i] = beta1 * first[i] + (1 - beta1) * gradient
            second[i] = beta2 * second[i] + (1 - beta2) * gradient**2
            mean, variance = first[i] / (1 - beta1 ** (step + 1)), second[i] / (1 - beta2 ** (step + 1))
            update = mean / (variance.sqrt() + SETTINGS["eps"]) + SETTINGS["weight_decay"] * weights[i]
            weights[i] = weights[i] - SETTINGS["lr"] * update
    return weights


def test_adam_gives_what_torchs_own_gives():
    parameters, theirs = start(), start()
    run(FusedAdam(parameters, **SETTINGS), parameters, range(STEPS))
    run(torch.optim.AdamW(theirs, **SETTINGS, foreach=False, fused=False), theirs, range(STEPS))
    close(parameters, theirs)


def test_adam_gives_the_published_update():
    parameters = start()
    run(FusedAdam(parameters, **SETTINGS), parameters, range(STEPS))
    close(parameters, written_out())


def test_first_step_of_a_large_gradient_is_the_learning_rate():
    # Both corrections cancel: g / |g|, whatever its size.
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = FusedAdam([parameter], lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    parameter.grad = torch.tensor([1e3, -1e-3])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.5, 0.5], rel=1e-4)


def test_weight_decay_is_apart_from_the_gradient():
    # Decay within the gradient would be divided by its own size, and come to the learning rate.
    parameter = torch.nn.Parameter(torch.full((2,), 4.0))
    optimizer = FusedAdam([parameter], lr=0.5, weight_decay=0.1)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([4.0 * (1 - 0.5 * 0.1)] * 2)


def test_step_is_an_int_of_the_group():
    parameters = start()
    optimizer = FusedAdam(parameters, **SETTINGS)
    run(optimizer, parameters, range(3))
    assert type(optimizer.param_groups[0]["step"]) is int and optimizer.param_groups[0]["step"] == 3


def test_state_of_a_parameter_holds_the_moments_alone():
    parameters = start()
    optimizer = FusedAdam(parameters, **SETTINGS)
    run(optimizer, parameters, range(1))
    assert {key for state in optimizer.state.values() for key in state} == {"exp_avg", "exp_avg_sq"}


def test_state_loaded_into_another_optimizer_goes_on_bit_for_bit():
    straight, parted = start(), start()
    run(FusedAdam(straight, **SETTINGS), straight, range(STEPS))
    first = FusedAdam(parted, **SETTINGS)
    run(first, parted, range(3))
    saved = copy.deepcopy(first.state_dict())
    second = FusedAdam(parted, lr=1.0)
    second.load_state_dict(saved)
    run(second, parted, range(3, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(straight, parted, strict=True))


def test_parameter_without_gradient_is_left_alone():
    parameters = start()
    before = parameters[1].detach().clone()
    optimizer = FusedAdam(parameters, **SETTINGS)
    for parameter, gradient in zip(parameters, gradients(0), strict=True):
        parameter.grad = gradient
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], before) and not torch.equal(parameters[0], start()[0])


def test_step_of_a_group_without_gradients_counts_all_the_same():
    # Ranks whose shard is empty must not fall behind the others.
    parameters = start()
    optimizer = FusedAdam(parameters, **SETTINGS)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_groups_have_rates_of_their_own():
    slow, fast = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = FusedAdam([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 0.2}], weight_decay=0.0)
    slow.grad, fast.grad = torch.ones(1), torch.ones(1)
    optimizer.step()
    assert [slow.item(), fast.item()] == pytest.approx([-0.1, -0.2], rel=1e-4)


def test_adam_with_decay_in_the_gradient_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="only decoupled weight decay"):
        FusedAdam(start(), adam_w_mode=False)


def test_bias_correction_of_the_second_moment_is_exact_late_in_a_run():
    # At step 10,000 the corrections are gone; a step that was not counted would show.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = FusedAdam([parameter], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    optimizer.state[parameter] = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.ones(1)}
    optimizer.param_groups[0]["step"] = 9_999
    parameter.grad = torch.ones(1)
    optimizer.step()
    expected = -(0.1 / (1 - 0.9**10_000)) / math.sqrt(1.0 / (1 - 0.999**10_000))
    assert parameter.item() == pytest.approx(expected, rel=1e-6)
