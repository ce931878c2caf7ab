"""The loss over the true vocabulary: the rows that pad it are as if they were not there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.model.gpt import build_model

SEQ_LENGTH, VOCAB = 16, 97


def score(gpt, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    return gpt(tokens, positions, None, labels=labels)


@pytest.fixture
def build(tiny_config, one_process):
    def build(divisor: int, *overrides: str):
        option = ("--model.make_vocab_size_divisible_by", str(divisor))
        (gpt,) = build_model(tiny_config(*option, *overrides))
        return gpt

    return build


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(VOCAB, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1))


def test_loss_is_the_cross_entropy_over_the_true_vocabulary(build, text):
    gpt = build(16)  # 97 rows padded to 112
    with torch.no_grad():
        logits = score(gpt, text[:, :-1])[..., :VOCAB].double()
        losses = score(gpt, text[:, :-1], text[:, 1:])
    expected = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", ["false", "true"])
def test_loss_does_not_depend_on_the_padding(tied, build, text):
    options = ("--model.share_embeddings_and_output_weights", tied)
    none, some, many = (score(build(divisor, *options), text[:, :-1], text[:, 1:]).detach() for divisor in (1, 16, 512))
    # Matrix products of other widths may sum in another order.
    torch.testing.assert_close(some, none, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many, none, rtol=1e-6, atol=1e-6)


def test_gradient_does_not_depend_on_the_padding(build, text):
    found = []
    for divisor in (1, 512):
        gpt = build(divisor)
        score(gpt, text[:, :-1], text[:, 1:]).sum().backward()
        found.append(gpt.output_layer.weight.grad[:VOCAB])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_rows_that_pad_the_vocabulary_get_no_gradient(build, text):
    gpt = build(16)
    score(gpt, text[:, :-1], text[:, 1:]).sum().backward()
    assert gpt.output_layer.weight.grad[VOCAB:].abs().max() == 0
    assert gpt.output_layer.weight.grad[:VOCAB].abs().max() > 0


def test_logits_without_labels_are_left_as_they_are(build, text):
    with torch.no_grad():
        logits = score(build(16), text[:, :-1])
    assert logits.size(-1) == 112 and bool((logits[..., VOCAB:] == 0).all())
