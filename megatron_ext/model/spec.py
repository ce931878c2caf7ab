"""Layer specs: which modules a transformer layer is made of.

Shapes: s sequence, b micro batch, n query heads and g query groups of this rank, d kv_channels, t packed tokens.
Megatron's activations are [s, b, h].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_block_spec(transformer: TransformerConfig, *, transformer_engine: bool, chunk: int) -> Any:
    """Describe the layers of one model chunk.

    Args:
        transformer: Megatron's configuration.
        transformer_engine: Transformer Engine's fused modules, or torch's own.
        chunk: index of the model chunk on this pipeline stage.
    """
    if not transformer_engine:
        return _local_block_spec(transformer, chunk)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(transformer, use_transformer_engine=True, normalization="RMSNorm", vp_stage=chunk)


def _local_block_spec(transformer: TransformerConfig, chunk: int) -> TransformerBlockSubmodules:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = SDPAttention
    num_layers = get_num_layers_to_build(transformer, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor, allowed under sequence parallelism.

    Megatron's own torch norm refuses sequence parallelism. It is sound: each rank sees its share of the
    sequence, and `finalize_model_grads` adds the gradients of parameters marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, behind Megatron's core-attention interface.

    Grouped keys and values are used as they are (`enable_gqa`), not repeated, and the [s, s] scores are
    never stored. Packed documents are attended to one by one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine"
        assert attention_type == "self", f"only self attention, not {attention_type}"
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend causally, within each document where there are several.

        Args:
            query: [s, b, n, d]; packed [t, n, d], t tokens of all documents.
            key: [s, b, g, d]; packed [t, g, d].
            value: [s, b, g, d]; packed [t, g, d].
            attention_mask: must be None: the mask is causal.
            attn_mask_type: not used; the mask is causal.
            attention_bias: must be None.
            packed_seq_params: Megatron's PackedSeqParams; its cu_seqlens_q says where the documents begin.

        Returns:
            [s, b, n * d]; packed [t, n * d].
        """
        assert attention_mask is None and attention_bias is None
        if packed_seq_params is None:
            return self._attend(query, key, value)
        # With a block-causal mask instead, torch on a CPU takes 60 times as long and 1.3 GB more for 16,384 tokens in
        # documents of 256. Splitting, not slicing: the gradient of each slice would be as large as the whole.
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        documents = zip(*(t.unsqueeze(1).split(lengths) for t in (query, key, value)), strict=True)
        return torch.cat([self._attend(*document) for document in documents]).squeeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query_bnsd, key_bgsd, value_bgsd = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context_bnsd = F.scaled_dot_product_attention(
            query_bnsd,
            key_bgsd,
            value_bgsd,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query_bnsd.size(1) != key_bgsd.size(1),
        )
        return context_bnsd.permute(2, 0, 1, 3).flatten(2)
