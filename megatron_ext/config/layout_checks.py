"""Rules on shapes, parallel degrees and batch sizes: what must divide what.

Each function yields one message per problem, and takes for granted that the sizes are positive.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config import derived
from megatron_ext.config.tree import Config

# Tensor-parallel groups stay within a node, and nodes have at most this many GPUs.
_GPUS_PER_NODE = 8
_FP8_MULTIPLE = 16


def check_heads(config: Config) -> Iterator[str]:
    """Check that the heads share the width evenly, and that the sequence is within the model's range."""
    model = config.model
    heads, head = model.num_attention_heads, derived.head_size(model)
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads ({heads}) must divide model.hidden_size ({model.hidden_size}); "
            "or set model.kv_channels."
        )
    elif head % 2:
        yield (
            f"the width of a head ({head}) must be even, because the rotary embedding turns pairs; "
            "change model.kv_channels or model.num_attention_heads."
        )
    if heads % model.num_query_groups:
        yield (
            f"model.num_query_groups ({model.num_query_groups}) must divide model.num_attention_heads "
            f"({heads}); use {_divisors(heads)}."
        )
    if config.train.seq_length > model.max_position_embeddings:
        yield (
            f"train.seq_length ({config.train.seq_length}) must not exceed model.max_position_embeddings "
            f"({model.max_position_embeddings}); shorten the one or raise the other."
        )


def check_tensor_parallel(config: Config) -> Iterator[str]:
    """Check that the matrices split evenly. A degree above the groups must be a multiple of them."""
    model, size = config.model, config.parallel.tensor_model_parallel_size
    heads, groups, head = model.num_attention_heads, model.num_query_groups, derived.head_size(model)
    rows = derived.padded_vocab_size(model)
    widths = {
        f"model.num_attention_heads ({heads})": heads,
        f"model.ffn_hidden_size ({model.ffn_hidden_size})": model.ffn_hidden_size,
        f"the padded vocabulary ({rows}; see model.make_vocab_size_divisible_by)": rows,
        f"the key and value width (2 x {groups} groups x {head})": 2 * groups * head,
    }

    def groups_fit(degree: int) -> bool:
        return groups % degree == 0 or degree % groups == 0

    use = _either(
        [
            degree
            for degree in range(1, _GPUS_PER_NODE + 1)
            if groups_fit(degree) and not any(width % degree for width in widths.values())
        ]
    )
    name = f"parallel.tensor_model_parallel_size ({size})"
    # One line is enough: its advice keeps every rule.
    split_unevenly = [what for what, width in widths.items() if width % size]
    if split_unevenly:
        yield f"{name} must divide {split_unevenly[0]}; use {use}."
    elif not groups_fit(size):
        yield f"{name} must divide model.num_query_groups ({groups}) or be a multiple of it; use {use}."


def check_pipeline(config: Config) -> Iterator[str]:
    """Check that every stage and every chunk has the same number of layers, and at least one."""
    layers, parallel = config.model.num_layers, config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages_name = f"parallel.pipeline_model_parallel_size ({stages})"
    chunks_name = f"parallel.virtual_pipeline_model_parallel_size ({chunks})"
    if chunks is not None and stages == 1:
        yield (
            f"{chunks_name} needs parallel.pipeline_model_parallel_size greater than 1; "
            "raise it or leave the chunks out."
        )
    elif chunks is not None and layers % (stages * chunks):
        yield (
            f"{stages_name} x {chunks_name} must divide model.num_layers ({layers}); "
            f"together they may be {_divisors(layers)}."
        )
    elif layers % stages:
        yield f"{stages_name} must divide model.num_layers ({layers}); use {_divisors(layers)}."
    elif parallel.recompute_num_layers > (per_chunk := layers // (stages * (chunks or 1))):
        yield (
            f"parallel.recompute_num_layers ({parallel.recompute_num_layers}) must not exceed the "
            f"{per_chunk} layers of a model chunk; lower it."
        )


def check_sequence(config: Config) -> Iterator[str]:
    """Check that context and sequence parallelism can share a sequence evenly."""
    length, parallel = config.train.seq_length, config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if context > 1 and config.model.transformer_impl == "local":
        yield (
            f"parallel.context_parallel_size ({context}) needs Transformer Engine's attention; set "
            "model.transformer_impl to auto or transformer_engine, or use 1."
        )
    if context > 1 and length % (2 * context):
        yield (
            f"train.seq_length ({length}) must be a multiple of 2 x parallel.context_parallel_size "
            f"({2 * context}), because each rank takes two slices; change one of them."
        )
    if parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel (true) has no effect with parallel.tensor_model_parallel_size 1; "
            "raise the size or leave it out."
        )
    elif parallel.sequence_parallel and length % (tensor * context):
        yield (
            f"train.seq_length ({length}) must be a multiple of parallel.tensor_model_parallel_size x "
            f"context_parallel_size ({tensor * context}) for parallel.sequence_parallel; change one of them."
        )


def check_overlap(config: Config) -> Iterator[str]:
    """Check that the parameter gather has what it overlaps with."""
    parallel = config.parallel
    if parallel.overlap_param_gather:
        for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, name):
                yield f"parallel.overlap_param_gather (true) needs parallel.{name}; set that to true too."


def check_fp8(config: Config) -> Iterator[str]:
    """Check what Transformer Engine, and transformer_config.py of megatron-core 0.16.1, demand of FP8."""
    model, precision, parallel = config.model, config.precision, config.parallel
    if precision.dtype != "fp8":
        return
    if model.transformer_impl == "local":
        yield (
            "precision.dtype (fp8) needs Transformer Engine; set model.transformer_impl to auto or "
            "transformer_engine, or use bf16."
        )
    if precision.first_last_layers_bf16 and precision.fp8_recipe == "delayed":
        yield (
            "precision.first_last_layers_bf16 (true) does not go with precision.fp8_recipe (delayed); "
            "use tensorwise or blockwise."
        )
    if precision.fp8_param_gather and not parallel.use_distributed_optimizer:
        yield "precision.fp8_param_gather (true) needs parallel.use_distributed_optimizer; set it too."
    tensor, context, head = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        derived.head_size(model),
    )
    # Transformer Engine asserts multiples of 16 in the last dim and of 8 before it; the weight gradient's
    # product turns the activations round, and cuBLAS wants 16 there too.
    for what, width, shards in (
        ("model.hidden_size", model.hidden_size, 1),
        ("model.ffn_hidden_size", model.ffn_hidden_size, tensor),
        ("the attention output (heads x head width)", model.num_attention_heads * head, tensor),
        ("the QKV output", (model.num_attention_heads + 2 * model.num_query_groups) * head, tensor),
        (
            "train.micro_batch_size x train.seq_length",
            config.train.micro_batch_size * config.train.seq_length,
            context,
        ),
    ):
        if width % shards == 0 and width // shards % _FP8_MULTIPLE:
            yield (
                f"{what} is {width // shards} on each rank, which must be a multiple of {_FP8_MULTIPLE} for "
                "precision.dtype (fp8); change the shape or the parallel sizes, or use bf16."
            )


def ramp_problem(config: Config) -> str | None:
    """Say what is wrong with the batch-size ramp-up itself, if anything is."""
    train = config.train
    if train.rampup_batch_size is None:
        return None
    start, increment, _ = train.rampup_batch_size
    way = train.global_batch_size - start
    if way <= 0:
        return (
            f"train.rampup_batch_size: its start ({start}) must be less than train.global_batch_size "
            f"({train.global_batch_size}); lower it or leave the ramp-up out."
        )
    if way % increment:
        return (
            f"train.rampup_batch_size: its increment ({increment}) must divide the way from {start} to "
            f"train.global_batch_size ({train.global_batch_size}); use {_divisors(way)}."
        )
    return None


def check_world_and_batch(config: Config, world_size: int | None) -> Iterator[str]:
    """Check the number of processes, then that every batch size divides among them."""
    train, parallel = config.train, config.parallel
    if (ramp := ramp_problem(config)) is not None:
        yield ramp
    replica = derived.model_parallel_size(parallel)
    if world_size is not None and (world_size < 1 or world_size % replica):
        yield (
            f"the number of processes ({world_size}) must be a multiple of tensor x pipeline x context "
            f"parallel size ({parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} "
            f"x {parallel.context_parallel_size} = {replica}); start {replica} or a multiple, or change them."
        )
        return
    copies = 1 if world_size is None else world_size // replica
    share = train.micro_batch_size * copies
    batches = [train.global_batch_size]
    if ramp is None:
        batches = [step.global_batch_size for step in derived.batch_steps(train)]
    for batch in batches:
        name = "train.global_batch_size" if batch == train.global_batch_size else "the ramp-up's batch size"
        if batch % share:
            yield (
                f"{name} ({batch}) must be a multiple of train.micro_batch_size x data-parallel size "
                f"({train.micro_batch_size} x {copies} = {share}); change one of them."
            )
        elif (
            world_size is not None
            and parallel.virtual_pipeline_model_parallel_size is not None
            and (batch // share) % parallel.pipeline_model_parallel_size
        ):
            yield (
                f"{name} ({batch}) makes {batch // share} micro-batches, which must be a multiple of "
                f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}) with "
                "interleaved chunks; change the batch, or leave virtual_pipeline_model_parallel_size out."
            )


def _divisors(number: int) -> str:
    return _either([divisor for divisor in range(1, number + 1) if number % divisor == 0])


def _either(choices: list[int]) -> str:
    """Write a list of choices as words; a long one by its ends."""
    if len(choices) > 10:
        return f"{', '.join(map(str, choices[:6]))} ... or {choices[-1]}"
    words = [str(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
