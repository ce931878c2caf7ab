"""The loss of a fresh model, against its closed form.

With untied weights drawn from N(0, std) and a final RMSNorm, a logit is N(0, h std^2) over the vocabulary, so the
expected cross-entropy is ln V + h std^2 / 2. 1.5-Pints' std = sqrt(2/(5h)) makes that ln V + 0.2 at every width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_ext.config.load import find_config, load_config
from megatron_ext.config.tree import ModelConfig, PrecisionConfig


def initial_loss(model: ModelConfig) -> float:
    """Build the model in fp32 and score random tokens."""
    from megatron_ext.model.gpt import build_model

    config = load_config(find_config("pints_1.5b_2k"))
    config = replace(config, model=replace(model, transformer_impl="local"), precision=PrecisionConfig(dtype="fp32"))
    (gpt,) = build_model(config)
    text = torch.randint(model.vocab_size, (1, 257), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = gpt(text[:, :-1], torch.arange(256).unsqueeze(0), None, labels=text[:, 1:])
    return float(losses.mean())


# 256 tokens: the mean's standard error is sqrt(h std^2 / 256) = 0.04 for 1.5-Pints' std, so 0.1 is 2.5 of them.
@pytest.mark.parametrize(("std", "excess"), [(None, 0.2), (1e-3, 128 * 1e-6 / 2)])
def test_initial_loss_of_a_small_model_is_its_closed_form(std, excess, one_process):
    model = ModelConfig(
        num_layers=2, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2,
        vocab_size=8192, max_position_embeddings=256, init_method_std=std,
    )  # fmt: skip
    assert initial_loss(model) == pytest.approx(math.log(8192) + excess, abs=0.1)


@pytest.mark.slow  # 6.3 GB of fp32 weights are drawn
def test_initial_loss_of_pints_is_its_closed_form(one_process):
    loss = initial_loss(load_config(find_config("pints_1.5b_2k")).model)
    print(f"initial loss {loss:.4f}, ln(vocabulary) {math.log(32064):.4f}")
    assert loss == pytest.approx(math.log(32064) + 0.2, abs=0.1)
