"""SDPAttention against Megatron's own unfused attention, and against softmax written out.

Shapes: s sequence, b micro batch, n query heads, g query groups, r = n/g, d kv_channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megatron_ext.model.spec import SDPAttention
from megatron_ext.model.transformer_config import build_transformer_config

pytestmark = pytest.mark.usefixtures("one_process")
S, B, HEADS, WIDTH = 12, 3, 4, 6  # 4 heads of 6 are not the hidden size of 32
GROUPS = {"mha": 4, "gqa": 2, "mqa": 1}
# Sums of 12 products of order one in fp32, taken in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Inputs(NamedTuple):
    """Query [s, b, n, d], key and value [s, b, g, d]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@pytest.fixture(params=GROUPS, ids=list(GROUPS))
def groups(request) -> int:
    return GROUPS[request.param]


@pytest.fixture
def transformer(groups, tiny_config):
    return build_transformer_config(
        tiny_config("--model.num_query_groups", str(groups), "--model.kv_channels", str(WIDTH))
    )


@pytest.fixture
def inputs(groups) -> Inputs:
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, groups, groups)
    # Scores of order three, so that the softmax is far from uniform.
    return Inputs(*(torch.randn(S, B, n, WIDTH, generator=generator).mul_(1.7).requires_grad_() for n in heads))


def attend(kind: type, transformer, inputs: Inputs, **changes) -> torch.Tensor:
    module = kind(
        config=transformer, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", **changes
    )
    return module(*inputs, attention_mask=None, attn_mask_type=AttnMaskType.causal)


def written_out(inputs: Inputs, scale: float = 1 / math.sqrt(WIDTH)) -> torch.Tensor:
    """Attend in float64, one position at a time; returns [s, b, n d]."""
    query, key, value = (t.detach().double() for t in inputs)
    repeats = HEADS // key.size(2)
    out = torch.zeros(S, B, HEADS, WIDTH, dtype=torch.float64)
    for batch in range(B):
        for head in range(HEADS):
            group = head // repeats
            for place in range(S):
                scores = key[: place + 1, batch, group] @ query[place, batch, head] * scale
                shares = torch.exp(scores) / torch.exp(scores).sum()
                out[place, batch, head] = shares @ value[: place + 1, batch, group]
    return out.flatten(2)


def test_sdpa_gives_what_megatrons_unfused_attention_gives(transformer, inputs):
    torch.testing.assert_close(
        attend(SDPAttention, transformer, inputs), attend(DotProductAttention, transformer, inputs), **TOLERANCE
    )


@pytest.mark.parametrize("which", Inputs._fields)
def test_sdpa_gives_the_gradient_of_megatrons_unfused_attention(which, transformer, inputs):
    weights = torch.randn(S, B, HEADS * WIDTH, generator=torch.Generator().manual_seed(4))
    found, expected = (
        torch.autograd.grad((attend(kind, transformer, inputs) * weights).sum(), getattr(inputs, which))[0]
        for kind in (SDPAttention, DotProductAttention)
    )
    # Gradients of order ten, summed over heads and places; a wrong head or place differs by their own size.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sdpa_gives_the_causal_softmax_written_out(transformer, inputs):
    found = attend(SDPAttention, transformer, inputs)
    torch.testing.assert_close(found.double(), written_out(inputs), **TOLERANCE)


def test_sdpa_takes_the_scale_given(transformer, inputs):
    found = attend(SDPAttention, transformer, inputs, softmax_scale=0.1)
    torch.testing.assert_close(found.double(), written_out(inputs, scale=0.1), **TOLERANCE)


def test_sdpa_looks_at_no_later_position(transformer, inputs):
    before = attend(SDPAttention, transformer, inputs)
    with torch.no_grad():
        inputs.key[7:] += 5
        inputs.value[7:] -= 5
    after = attend(SDPAttention, transformer, inputs)
    assert torch.equal(after[:7], before[:7]) and not torch.equal(after[7:], before[7:])


# Documents of 36 packed tokens: of one token each, of different lengths, and all in one.
PACKINGS = {"single_tokens": [1] * 36, "uneven": [5, 1, 17, 3, 10], "one": [36]}


def attend_packed(transformer, inputs: Inputs, lengths: list[int]) -> torch.Tensor:
    """Attend to the [s, b, ...] inputs as s b packed tokens; returns [t, n d]."""
    module = SDPAttention(transformer, 1, AttnMaskType.causal, "self")
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    return module(*(t.flatten(0, 1) for t in inputs), attention_mask=None, packed_seq_params=packed)


def attend_masked(inputs: Inputs, lengths: list[int]) -> torch.Tensor:
    """Attend under a block-causal mask, with softmax over all packed tokens in float64; returns [t, n d]."""
    query, key, value = (t.flatten(0, 1).double() for t in inputs)
    key, value = (t.repeat_interleave(HEADS // t.size(1), dim=1) for t in (key, value))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.arange(len(document))
    seen = (document[:, None] == document) & (places[:, None] >= places)
    scores = torch.einsum("tnd,und->ntu", query, key) / math.sqrt(WIDTH)
    shares = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("ntu,und->tnd", shares, value).flatten(1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_sdpa_over_packed_documents_gives_the_block_causal_softmax(packing, transformer, inputs):
    found = attend_packed(transformer, inputs, PACKINGS[packing])
    torch.testing.assert_close(found.double(), attend_masked(inputs, PACKINGS[packing]), **TOLERANCE)


@pytest.mark.parametrize("which", Inputs._fields)
def test_sdpa_over_packed_documents_gives_the_gradient_of_the_block_causal_softmax(which, transformer, inputs):
    lengths = PACKINGS["uneven"]
    weights = torch.randn(S * B, HEADS * WIDTH, generator=torch.Generator().manual_seed(4))
    found, expected = (
        torch.autograd.grad((attended * weights).sum(), getattr(inputs, which))[0]
        for attended in (attend_packed(transformer, inputs, lengths), attend_masked(inputs, lengths))
    )
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_sdpa_over_packed_documents_leaves_a_document_alone_when_another_changes(transformer, inputs):
    lengths = PACKINGS["uneven"]  # the third one begins at 6 and ends at 23
    before = attend_packed(transformer, inputs, lengths)
    with torch.no_grad():
        inputs.key.flatten(0, 1)[6:23] += 5
    after = attend_packed(transformer, inputs, lengths)
    changed = (after != before).any(1)
    assert not changed[:6].any() and changed[7:23].all() and not changed[23:].any()


def test_sdpa_returns_heads_side_by_side(transformer, inputs):
    assert attend(SDPAttention, transformer, inputs).shape == (S, B, HEADS * WIDTH)


@pytest.mark.parametrize("groups", [2], indirect=False)
def test_sdpa_with_a_mask_of_its_own_is_an_error_of_ours(groups, transformer, inputs):
    module = SDPAttention(transformer, 1, AttnMaskType.causal, "self")
    with pytest.raises(AssertionError):
        module(*inputs, attention_mask=torch.ones(1))
