"""Estimated memory of one GPU, by closed formulas; torch is not needed.

Legend: b micro batch, s sequence, h hidden, n query heads, g query groups, d width of a head, f ffn,
v padded vocabulary; t, c and p the tensor-, context- and pipeline-parallel sizes; e bytes of an activation
(2 in bf16 and fp8, 4 in fp32); T = s b / c tokens of a micro-batch on one rank.

Activations kept for the backward pass are counted as Korthikanti et al. 2022 (arXiv 2205.05198, sections 4.1
and 4.2) do, for this architecture: no dropout masks, RMSNorm, SwiGLU, grouped key/value heads, and a
flash-style attention that keeps one log-sum-exp per head and token instead of the s x s scores:

    per layer = T e [4 h / t' + (2 n d + 2 g' d + 3 f) / t] + 4 T n / t      bytes

    4 h         inputs of the two norms and their outputs (inputs of QKV and of gate/up);
                t' = t with sequence parallelism, else 1
    2 n d       queries and the attention's output (input of the projection)
    2 g' d      keys and values; g' = max(g, t), because a rank holds at least one group
    3 f         gate, up and their product (input of down)
    4 n         log-sum-exp, fp32

    output      T [2 h e / t' + v (e + 4) / t]: final norm's input and output, logits in e bytes and in fp32

A pipeline stage keeps several micro-batches in flight: min(p - stage, micro-batches) under 1F1B; interleaved,
2 (p - stage - 1) + (chunks - 1) p + 1 chunks of its layers (Narayanan et al. 2021, arXiv 2104.04473).
Recomputation "full" keeps the input of each block of layers, T h e / t', and one block while it is being
recomputed; "selective" only saves the log-sum-exp, because the attention keeps no scores anyway.

Weights are e bytes each, gradients 4, the optimizer 12 (fp32 weights and two moments; 8 in fp32, where the
weights are their own master), divided by dp x c with the distributed optimizer. FP8 adds to each matrix of
the layers an FP8 copy and its transpose (2 bytes), or with fp8_param_gather has them in place of the bf16
weight.
Not counted: the CUDA context and kernels' workspaces, communication buffers, fragmentation (3 to 6 GiB).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ext.config.derived import head_size, model_parallel_size
from megatron_ext.config.tree import Config
from megatron_ext.model.flops import layer_matrix_parameters, padded_vocab_size

GIB = 2**30


class MemoryEstimate(NamedTuple):
    """Memory of one rank, in GiB."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class _Parameters(NamedTuple):
    """Parameters on one rank; shards, and whole norms."""

    layer_matrices: int
    others: int


def memory_per_gpu(config: Config, *, world_size: int) -> MemoryEstimate:
    """Estimate the memory of a rank of the pipeline stage that needs most."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    return max(
        (memory_of_stage(config, world_size=world_size, stage=stage) for stage in stages),
        key=lambda estimate: estimate.total,
    )


def memory_of_stage(config: Config, *, world_size: int, stage: int) -> MemoryEstimate:
    """Estimate the memory of a rank of one pipeline stage. The formulas are at the top of this file."""
    parallel, precision = config.parallel, config.precision
    parameters = _parameters_of_rank(config, stage)
    total = sum(parameters)
    element = 4 if precision.dtype == "fp32" else 2
    weights = element * total
    if precision.dtype == "fp8":
        weights += (0 if precision.fp8_param_gather else 2) * parameters.layer_matrices
    replicas = world_size // model_parallel_size(parallel)
    shards = replicas * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    return MemoryEstimate(
        weights=weights / GIB,
        gradients=4 * total / GIB,
        optimizer=(8 if precision.dtype == "fp32" else 12) * total / shards / GIB,
        activations=_activation_bytes(config, stage, replicas) / GIB,
    )


def _parameters_of_rank(config: Config, stage: int) -> _Parameters:
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = model.num_layers // stages
    words = padded_vocab_size(model) * model.hidden_size // tensor
    first, last = stage == 0, stage == stages - 1
    # A tied output layer on another stage than the embedding has a copy of it.
    copies = first + last - (first and last and model.share_embeddings_and_output_weights)
    norms = (2 * layers + last) * model.hidden_size
    return _Parameters(
        layer_matrices=layers * sum(layer_matrix_parameters(model)) // tensor, others=copies * words + norms
    )


def _activation_bytes(config: Config, stage: int, replicas: int) -> float:
    model, parallel, train = config.model, config.parallel, config.train
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    element = 4 if config.precision.dtype == "fp32" else 2
    tokens = train.seq_length * train.micro_batch_size / parallel.context_parallel_size
    replicated_width = model.hidden_size / (tensor if parallel.sequence_parallel else 1)

    micro_batches = max(1, train.global_batch_size // (train.micro_batch_size * replicas))
    layers_per_chunk = model.num_layers // (stages * chunks)
    chunks_in_flight = min(stages - stage, micro_batches)
    if chunks > 1:
        chunks_in_flight = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, micro_batches * chunks)

    layer = _layer_bytes(config, tokens, element, replicated_width)
    if parallel.recompute_granularity == "full":
        block = min(parallel.recompute_num_layers, layers_per_chunk)
        inputs = -(-layers_per_chunk // block) * tokens * replicated_width * element
        kept = chunks_in_flight * inputs + block * layer
    else:
        kept = chunks_in_flight * layers_per_chunk * layer
    if stage == stages - 1:
        logits = padded_vocab_size(model) * (element + 4) / tensor
        kept += tokens * (2 * replicated_width * element + logits)
    return kept


def _layer_bytes(config: Config, tokens: float, element: int, replicated_width: float) -> float:
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    head, heads = head_size(model), model.num_attention_heads
    sharded = 2 * heads * head + 2 * max(model.num_query_groups, tensor) * head + 3 * model.ffn_hidden_size
    bytes_per_token = element * (4 * replicated_width + sharded / tensor)
    if config.parallel.recompute_granularity != "selective":
        bytes_per_token += 4 * heads / tensor
    return tokens * bytes_per_token
