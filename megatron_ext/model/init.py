"""Initial weights, drawn by name: the same in every layout from the same seed.

Each matrix is drawn whole on the CPU from a generator seeded by (seed, name of the parameter with its
global layer number), and each rank keeps its shard. So a run starts from bit-equal weights whatever its
tensor- and pipeline-parallel sizes are; Megatron's own initialisation depends on the layout.

Shapes: v padded vocabulary, h hidden, f ffn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_ext.config.tree import ModelConfig

_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_SPLIT_BY_COLUMN = _RESIDUAL_OUTPUTS
_GATED = "mlp.linear_fc1.weight"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class Deviations(NamedTuple):
    """Standard deviations of the normal distributions that weights are drawn from."""

    matrix: float
    residual_output: float


def standard_deviations(model: ModelConfig) -> Deviations:
    """Resolve the two standard deviations.

    1.5-Pints draws every matrix from N(0, sqrt(2/(5h))) and the two matrices that write to the residual
    stream from N(0, 1/(sqrt(h) L)) (Pints-AI/1.5-Pints, lit_gpt/model.py, `_init_weights`). Megatron takes
    0.02 and 0.02/sqrt(2L).
    """
    if model.init_method == "pints":
        matrix = model.init_method_std or math.sqrt(2.0 / 5.0 / model.hidden_size)
        output = model.output_init_method_std or 1.0 / math.sqrt(model.hidden_size) / model.num_layers
        return Deviations(matrix, output)
    matrix = model.init_method_std or 0.02
    return Deviations(matrix, model.output_init_method_std or matrix / math.sqrt(2.0 * model.num_layers))


@torch.no_grad()
def initialize_weights(
    chunks: Sequence[torch.nn.Module], model: ModelConfig, *, seed: int, tensor_rank: int, tensor_size: int
) -> None:
    """Fill this rank's parameters in place."""
    deviations = standard_deviations(model)
    for name, parameter in named_parameters_globally(chunks):
        if parameter.dim() == 1:
            parameter.fill_(1.0)  # RMSNorm weights; there are no biases
            continue
        std = deviations.residual_output if name.endswith(_RESIDUAL_OUTPUTS) else deviations.matrix
        axis = 1 if name.endswith(_SPLIT_BY_COLUMN) else 0
        shape = list(parameter.shape)
        shape[axis] *= tensor_size
        if model.share_embeddings_and_output_weights and name == _OUTPUT:
            name = _EMBEDDING  # the last stage's copy of the tied matrix
        whole = torch.zeros(shape, dtype=torch.float32)
        # Rows that pad the vocabulary stay zero, so that what is drawn does not depend on the padding.
        drawn = whole[: model.vocab_size] if name in (_EMBEDDING, _OUTPUT) else whole
        drawn.normal_(0.0, std, generator=_generator(seed, name))
        shard = _shard(whole, name, axis, tensor_rank, tensor_size)
        parameter.copy_(shard)
        if hasattr(parameter, "get_high_precision_init_val"):
            # A weight kept in FP8 (fp8_param_gather): the optimizer takes its fp32 copy from here.
            parameter.get_high_precision_init_val().copy_(shard)


def named_parameters_globally(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters under names that do not depend on the pipeline layout (global layer numbers)."""
    for chunk in chunks:
        numbers = {
            f"decoder.layers.{local}.": f"decoder.layers.{layer.layer_number - 1}."
            for local, layer in enumerate(chunk.decoder.layers)  # type: ignore[union-attr, arg-type]
        }
        for name, parameter in chunk.named_parameters():
            for local_prefix, global_prefix in numbers.items():
                if name.startswith(local_prefix):
                    name = global_prefix + name[len(local_prefix) :]
                    break
            yield name, parameter


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _shard(whole: torch.Tensor, name: str, axis: int, tensor_rank: int, tensor_size: int) -> torch.Tensor:
    if tensor_size == 1:
        return whole
    if name.endswith(_GATED):
        # [gate; up] as a whole, [gate_i; up_i] on rank i
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tensor_size)[tensor_rank], up.chunk(tensor_size)[tensor_rank]])
    return whole.chunk(tensor_size, dim=axis)[tensor_rank]
