"""The Llama family in Hugging Face's terms and in Megatron's: configuration, names, layouts. Pure functions.

Legend: h hidden, v true and p padded vocabulary, n query heads, g query groups, r = n / g, d kv_channels,
f ffn.

    Hugging Face                                  Megatron checkpoint key (stacked over layers on axis 0)
    model.embed_tokens            [v, h]          embedding.word_embeddings.weight                     [p, h]
    layers.i.input_layernorm      [h]             decoder.layers.self_attention.linear_qkv.layer_norm_weight
    layers.i.self_attn.{q,k,v}_proj               decoder.layers.self_attention.linear_qkv.weight
    layers.i.self_attn.o_proj     [h, nd]         decoder.layers.self_attention.linear_proj.weight
    layers.i.post_attention_layernorm [h]         decoder.layers.mlp.linear_fc1.layer_norm_weight
    layers.i.mlp.{gate,up}_proj   [f, h] each     decoder.layers.mlp.linear_fc1.weight      [gate; up: 2f, h]
    layers.i.mlp.down_proj        [h, f]          decoder.layers.mlp.linear_fc2.weight
    model.norm                    [h]             decoder.final_layernorm.weight
    lm_head (absent when tied)    [v, h]          output_layer.weight                                  [p, h]

The keys are the same for Megatron's local layers and for Transformer Engine's. Query [nd, h], key and value
[gd, h] are interleaved by group into [g(r+2)d, h]: each group's r query heads, then its key head, then its
value head. Both sides rotate halves (not neighbouring pairs), so the rotary embedding needs no permutation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_ext.config.derived import head_size, padded_vocab_size
from megatron_ext.config.tree import ModelConfig
from megatron_ext.errors import CheckpointError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
QKV_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
FC1_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"

_LAYER_NAMES = (
    (QKV_NORM, ("input_layernorm",)),
    (QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (PROJ, ("self_attn.o_proj",)),
    (FC1_NORM, ("post_attention_layernorm",)),
    (FC1, ("mlp.gate_proj", "mlp.up_proj")),
    (FC2, ("mlp.down_proj",)),
)

# What transformers assumes when config.json leaves a field out (configuration_llama.py and
# configuration_mistral.py of transformers 5.23; the same in 4.x).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
_COMMON_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu"}
_DEFAULT_ROTARY_BASE = 10000.0
# Megatron has these three of Llama-3's scaling built in and takes the factor alone.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class HfModel(NamedTuple):
    """A model read from a config.json."""

    model: ModelConfig
    notes: tuple[str, ...]
    """What a person should know about the reading."""


class SpecialTokens(NamedTuple):
    """Token ids that config.json and generation_config.json declare."""

    bos: int | None
    eos: int | None
    pad: int | None


class Piece(NamedTuple):
    """One Megatron tensor, or one layer of a stacked one, and the HF tensors of the same numbers."""

    key: str
    layer: int | None
    """Layer of a stacked tensor; None for a tensor that is not stacked."""
    hf_names: tuple[str, ...]


def model_from_hf(config: Mapping[str, Any], *, where: str) -> HfModel:
    """Read a Llama or Mistral config.json, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    A sliding window as long as the longest sequence is no window, so Mistral-7B-v0.1 (window 4096) is taken
    with max_position_embeddings clipped to its window; a note says so.

    Args:
        config: the parsed config.json.
        where: path of the file, for messages.

    Raises:
        CheckpointError: it is another architecture, or something in it cannot be represented; all problems
            at once.
    """
    fields = _Fields(config, architecture=_architecture(config, where), where=where)
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    groups = heads if fields.values.get("num_key_value_heads") is None else fields.integer("num_key_value_heads")
    if heads % groups:
        fields.refuse(f"num_key_value_heads ({groups}) must divide num_attention_heads ({heads}).")
    head_dim = None if fields.values.get("head_dim") is None else fields.integer("head_dim")
    if head_dim is None and hidden_size % heads:
        fields.refuse(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads}).")
    max_positions, notes = _read_positions(fields)
    rotary_base, scaling_factor = _read_rope(fields)
    _refuse_unsupported(fields)
    model = ModelConfig(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=fields.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=None if head_dim is None or head_dim * heads == hidden_size else head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=max_positions,
        share_embeddings_and_output_weights=bool(fields.values.get("tie_word_embeddings", False)),
        layernorm_epsilon=fields.number("rms_norm_eps"),
        rotary_base=rotary_base,
        rotary_scaling_factor=scaling_factor,
        init_method="megatron",
        init_method_std=fields.number("initializer_range"),
    )
    if fields.problems:
        raise CheckpointError("\n".join(fields.problems))
    return HfModel(model, notes)


class _Fields:
    """The fields of a config.json over transformers' defaults, and the problems found while reading them."""

    def __init__(self, config: Mapping[str, Any], *, architecture: str, where: str) -> None:
        self.values: dict[str, Any] = {**_COMMON_DEFAULTS, **_DEFAULTS[architecture], **config}
        self.where = where
        self.problems: list[str] = []

    def refuse(self, problem: str) -> None:
        self.problems.append(f"{self.where}: {problem}")

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self.refuse(f"{name} ({value!r}) must be a positive whole number.")
        return 1

    def number(self, name: str) -> float:
        return self.positive(name, self.values.get(name))

    def positive(self, name: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self.refuse(f"{name} ({value!r}) must be a positive number.")
        return 1.0


def _architecture(config: Mapping[str, Any], where: str) -> str:
    named = config.get("architectures") or []
    by_type = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    found = str(named[0]) if named else by_type.get(str(config.get("model_type")))
    if found not in _DEFAULTS:
        name = found or config.get("model_type") or "not named"
        raise CheckpointError(
            f"{where}: architecture {name} is not supported; it must be one of {', '.join(_DEFAULTS)}."
        )
    return found


def _read_positions(fields: _Fields) -> tuple[int, tuple[str, ...]]:
    """Read the longest sequence, and a note where a sliding window shortens it."""
    positions = fields.integer("max_position_embeddings")
    if fields.values.get("sliding_window") is None:
        return positions, ()
    window = fields.integer("sliding_window")
    if window >= positions:
        return positions, ()
    note = (
        f"sliding_window {window}: attention here is over the whole sequence, which is the same up to "
        f"{window} tokens; max_position_embeddings becomes {window} (was {positions})."
    )
    return window, (note,)


def _read_rope(fields: _Fields) -> tuple[float, float | None]:
    """Read the rotary base, and Llama-3's scaling factor or None."""
    values = fields.values
    scaling, parameters = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or not isinstance(parameters, Mapping):
        fields.refuse("rope_scaling and rope_parameters must be tables.")
        return 1.0, None
    bases = [base for base in (parameters.get("rope_theta"), values.get("rope_theta")) if base is not None]
    if len(bases) == 2 and bases[0] != bases[1]:
        fields.refuse(f"rope_theta ({bases[1]}) and rope_parameters.rope_theta ({bases[0]}) differ; remove one.")
    base = fields.positive("rope_theta", bases[0]) if bases else _DEFAULT_ROTARY_BASE
    rope = {**scaling, **parameters}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    if kind != "llama3":
        fields.refuse(f"rotary embedding of type {kind!r} is not supported; it must be default or llama3.")
        return base, None
    for name, built_in in _LLAMA3_SCALING.items():
        if rope.get(name) != built_in:
            fields.refuse(f"{name} of llama3 scaling ({rope.get(name)}) must be {built_in:g}, as in Megatron.")
    return base, fields.positive("factor of llama3 scaling", rope.get("factor"))


def _refuse_unsupported(fields: _Fields) -> None:
    values = fields.values
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            fields.refuse(f"{name} is true, but layers here have no biases; the model cannot be represented.")
    if values["hidden_act"] not in ("silu", "swish"):
        fields.refuse(f"hidden_act ({values['hidden_act']!r}) must be silu (SwiGLU).")
    if values.get("quantization_config") is not None:
        fields.refuse("the weights are quantised; give the folder with the original weights.")


def model_to_hf(model: ModelConfig, *, dtype: str, special: SpecialTokens) -> dict[str, Any]:
    """Write a model as a LlamaForCausalLM config.json that transformers 4 and 5 read alike.

    The rotary embedding is given both ways: `rope_theta` and `rope_scaling` for transformers 4,
    `rope_parameters` for 5.

    Args:
        model: the model; what it came from (Mistral included) is written as Llama, which computes the same.
        dtype: `float32`, `bfloat16` or `float16`: that of the weights beside the file.
        special: ids to declare.
    """
    scaling: dict[str, Any] | None = None
    if model.rotary_scaling_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.rotary_scaling_factor, **_LLAMA3_SCALING}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": head_size(model),
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std if model.init_method_std is not None else 0.02,
        "use_cache": True,
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "torch_dtype": dtype,
    }


def generation_config(special: SpecialTokens) -> dict[str, Any]:
    """Write generation_config.json: which ids start, end and pad a text."""
    ids = {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}
    return {name: value for name, value in ids.items() if value is not None}


def pieces(model: ModelConfig) -> list[Piece]:
    """List every tensor of the model once, layer after layer, in the order of a forward pass."""
    listed = [Piece(EMBEDDING, None, ("model.embed_tokens.weight",))]
    for layer in range(model.num_layers):
        for key, modules in _LAYER_NAMES:
            listed.append(Piece(key, layer, tuple(f"model.layers.{layer}.{module}.weight" for module in modules)))
    listed.append(Piece(FINAL_NORM, None, ("model.norm.weight",)))
    if not model.share_embeddings_and_output_weights:
        listed.append(Piece(OUTPUT, None, ("lm_head.weight",)))
    return listed


def megatron_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every Megatron checkpoint key; stacked ones with the layers on axis 0."""
    h, f, layers = model.hidden_size, model.ffn_hidden_size, model.num_layers
    n, g, d = model.num_attention_heads, model.num_query_groups, head_size(model)
    p = padded_vocab_size(model)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (p, h),
        QKV_NORM: (layers, h),
        QKV: (layers, (n + 2 * g) * d, h),
        PROJ: (layers, h, n * d),
        FC1_NORM: (layers, h),
        FC1: (layers, 2 * f, h),
        FC2: (layers, h, f),
        FINAL_NORM: (h,),
    }
    if not model.share_embeddings_and_output_weights:
        shapes[OUTPUT] = (p, h)
    return shapes


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor, in the order of `pieces`."""
    h, f = model.hidden_size, model.ffn_hidden_size
    n, g, d = model.num_attention_heads, model.num_query_groups, head_size(model)
    by_key: dict[str, tuple[tuple[int, ...], ...]] = {
        EMBEDDING: ((model.vocab_size, h),),
        OUTPUT: ((model.vocab_size, h),),
        FINAL_NORM: ((h,),),
        QKV_NORM: ((h,),),
        QKV: ((n * d, h), (g * d, h), (g * d, h)),
        PROJ: ((h, n * d),),
        FC1_NORM: ((h,),),
        FC1: ((f, h), (f, h)),
        FC2: ((h, f),),
    }
    return {
        name: shape for piece in pieces(model) for name, shape in zip(piece.hf_names, by_key[piece.key], strict=True)
    }


def to_hf(piece: Piece, tensor: torch.Tensor, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Turn one Megatron piece (without the layer axis) into its Hugging Face tensors, same dtype, same bits.

    The results may share memory with `tensor`.
    """
    if piece.key == QKV:
        parts = split_qkv(tensor, model)
    elif piece.key == FC1:
        parts = tensor.split(model.ffn_hidden_size)
    elif piece.key in (EMBEDDING, OUTPUT):
        parts = (tensor[: model.vocab_size],)
    else:
        parts = (tensor,)
    return dict(zip(piece.hf_names, parts, strict=True))


def from_hf(piece: Piece, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Turn the Hugging Face tensors of a piece, in the order of its `hf_names`, into the Megatron tensor.

    Rows that pad the vocabulary are zero: their logits are 0 until training moves them; export drops them.
    """
    if piece.key == QKV:
        query, key, value = tensors
        return merge_qkv(query, key, value, model)
    if piece.key == FC1:
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if piece.key in (EMBEDDING, OUTPUT):
        padded_ph = tensor.new_zeros(padded_vocab_size(model), tensor.size(1))
        padded_ph[: tensor.size(0)] = tensor
        return padded_ph
    return tensor


def merge_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Interleave query [nd, h], key [gd, h] and value [gd, h] by query group into [g(r+2)d, h]."""
    g, h = model.num_query_groups, model.hidden_size
    grouped = [part.reshape(g, -1, h) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, h)


def split_qkv(qkv: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
    """Undo `merge_qkv`: query [nd, h], key [gd, h], value [gd, h] out of [g(r+2)d, h]."""
    g, h, d = model.num_query_groups, model.hidden_size, head_size(model)
    r = model.num_attention_heads // g
    qkv_gxh = qkv.view(g, (r + 2) * d, h)
    return tuple(part.reshape(-1, h) for part in qkv_gxh.split([r * d, d, d], dim=1))
