"""Sizes and costs of a model by closed formulas; nothing is built, and torch is not needed.

Legend: L layers, h hidden, n query heads, g query groups, d width of a head, f ffn, v vocabulary, s sequence.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ext.config.derived import head_size
from megatron_ext.config.derived import padded_vocab_size as padded_vocab_size
from megatron_ext.config.tree import ModelConfig


class ParameterCount(NamedTuple):
    """Parameters of the model as exported: without the rows that pad the vocabulary."""

    embedding: int
    attention: int
    """QKV and output projections of all layers."""
    mlp: int
    norms: int
    output: int
    """0 when the output layer is tied to the embedding."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class FlopsPerToken(NamedTuple):
    """Floating-point operations to train on one token, forward and backward."""

    linear: int
    """Matrix products with weights, the output layer included."""
    attention: int
    """Products of queries with keys and of weights with values; a causal mask halves them."""

    @property
    def total(self) -> int:
        """Both; what TFLOP/s and MFU are counted with."""
        return self.linear + self.attention


def layer_matrix_parameters(model: ModelConfig) -> tuple[int, int]:
    """Return the weights of one layer's attention ((n + 2g) d x h and h x n d) and of its MLP (3 x h x f)."""
    head = head_size(model)
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * head * model.hidden_size
    projection = model.num_attention_heads * head * model.hidden_size
    return qkv + projection, 3 * model.hidden_size * model.ffn_hidden_size


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Count the parameters, by part. 1.5-Pints has 1,565,886,464 (1.5-Pints `lit_gpt/config_base.py`)."""
    attention, mlp = layer_matrix_parameters(model)
    words = model.vocab_size * model.hidden_size
    return ParameterCount(
        embedding=words,
        attention=model.num_layers * attention,
        mlp=model.num_layers * mlp,
        norms=(2 * model.num_layers + 1) * model.hidden_size,
        output=0 if model.share_embeddings_and_output_weights else words,
    )


def flops_per_token(model: ModelConfig, seq_length: int) -> FlopsPerToken:
    """Count the training FLOPs per token at a sequence length.

    linear = 6 x weights of all matrix products, the output layer included (tied or not) and the embedding
    not: 2 operations per weight forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    attention = 6 L s n d: 2 x 2 s n d forward, twice that backward, and half of all by the causal mask.
    Recomputed activations, norms, softmax and the rows that pad the vocabulary do not count. Documents do not either:
    with data.document_mask "reset" attention does less than this, so MFU reads too high by what it saves.
    """
    attention, mlp = layer_matrix_parameters(model)
    matrices = model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size
    width = model.num_attention_heads * head_size(model)
    return FlopsPerToken(linear=6 * matrices, attention=6 * model.num_layers * seq_length * width)
