"""Parameter counts and FLOPs against published and hand-computed numbers."""

from dataclasses import replace

import pytest

from megatron_ext.config.tree import ModelConfig
from megatron_ext.model.flops import flops_per_token, padded_vocab_size, parameter_count

PINTS = ModelConfig(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=4,
    vocab_size=32064,
    max_position_embeddings=16384,
)


def test_parameter_count_pints_gives_the_published_parts() -> None:
    # lit_gpt/config_base.py: 59,772,928 per layer with its two norms, 65,667,072 per vocabulary matrix
    count = parameter_count(PINTS)
    assert count.total == 1_565_886_464
    assert count.embedding == count.output == 65_667_072
    assert count.attention + count.mlp + count.norms == 24 * 59_772_928 + 2048


def test_parameter_count_tied_embeddings_counts_them_once() -> None:
    tied = parameter_count(replace(PINTS, share_embeddings_and_output_weights=True))
    assert tied.total == 1_565_886_464 - 65_667_072


def test_parameter_count_wide_heads_counts_their_width() -> None:
    # L 1, h 8, n 2, g 1, d 16, f 4, v 10: QKV 64 x 8, output 8 x 32, MLP 3 x 8 x 4, 3 norms, 2 x 80
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=4,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=16,
        vocab_size=10,
        max_position_embeddings=8,
    )
    assert parameter_count(model).total == 512 + 256 + 96 + 24 + 160


@pytest.mark.parametrize(("length", "giga"), [(2048, 9.605), (16384, 13.833)])
def test_flops_per_token_pints_gives_the_anchors(length: int, giga: float) -> None:
    assert flops_per_token(PINTS, length).total / 1e9 == pytest.approx(giga, abs=5e-4)


def test_flops_per_token_attention_and_linear_are_apart() -> None:
    flops = flops_per_token(PINTS, 2048)
    assert flops.attention == 6 * 24 * 2048 * 2048
    assert flops.linear == 6 * (1_565_886_464 - 65_667_072 - 49 * 2048)


def test_flops_per_token_tied_output_layer_still_costs() -> None:
    tied = replace(PINTS, share_embeddings_and_output_weights=True)
    assert flops_per_token(tied, 2048) == flops_per_token(PINTS, 2048)


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(32064, 128, 32128), (32064, 64, 32064), (1, 128, 128)])
def test_padded_vocab_size_rounds_up(vocab: int, multiple: int, rows: int) -> None:
    assert padded_vocab_size(replace(PINTS, vocab_size=vocab, make_vocab_size_divisible_by=multiple)) == rows
