"""Build the model: megatron-core's GPTModel, one chunk per (virtual) pipeline stage of this rank."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from megatron_ext.config.derived import bucket_size, padded_vocab_size
from megatron_ext.config.tree import Config
from megatron_ext.model.init import initialize_weights
from megatron_ext.model.spec import build_block_spec
from megatron_ext.model.transformer_config import build_transformer_config, uses_transformer_engine
from megatron_ext.parallel import device, groups


class Model(NamedTuple):
    """This rank's share of the model."""

    bare: list[Any]
    """GPTModel chunks, for state dicts."""
    wrapped: list[Any]
    """The same chunks in DistributedDataParallel, for training."""
    transformer_config: Any
    """The TransformerConfig that all chunks share; the optimizer's hooks are set on it."""


def build_model(config: Config) -> list[Any]:
    """Build this rank's GPTModel chunks with initial weights, unwrapped, on this rank's device.

    Every rank calls it after `groups.initialize`. Each chunk maps tokens [b, s] int64 to logits
    [b, s, v / tp] (or, given labels, to per-token losses [b, s] fp32).
    """
    # 0.19 tells on each construction that GPTModel only gets critical fixes; docs/decisions says why it stays.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    transformer = build_transformer_config(config)
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    chunks = [_build_chunk(config, transformer, chunk, num_chunks) for chunk in range(num_chunks)]
    place = groups.where_am_i()
    initialize_weights(
        chunks,
        config.model,
        seed=config.train.seed,
        tensor_rank=place.tensor_rank,
        tensor_size=place.tensor_size,
    )
    return chunks


def wrap_for_training(config: Config, chunks: list[Any]) -> Model:
    """Wrap chunks for mixed precision and data parallelism. Every rank calls it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    # 0.19 advises on each construction to compute the buffers' layout before; it does so itself just as well.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    parallel = config.parallel
    transformer = chunks[0].config
    inner = [Float16Module(transformer, chunk) for chunk in chunks] if transformer.bf16 else chunks
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # training/step.py checks the norm, and says which samples it was
        bucket_size=bucket_size(parallel),
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    wrapped = [
        # Only the first chunk's buckets can hide behind computation when chunks take turns.
        DistributedDataParallel(transformer, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(inner)
    ]
    return Model(bare=chunks, wrapped=wrapped, transformer_config=transformer)


def _build_chunk(config: Config, transformer: Any, chunk: int, num_chunks: int) -> Any:
    from megatron.core import tensor_parallel

    from megatron_ext.model.vocabulary import TrueVocabularyGPT

    model = config.model
    engine = uses_transformer_engine(config)
    module = TrueVocabularyGPT(
        config=transformer,
        transformer_layer_spec=build_block_spec(transformer, transformer_engine=engine, chunk=chunk),
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.is_first_stage(chunk, num_chunks),
        post_process=groups.is_last_stage(chunk, num_chunks),
        parallel_output=True,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=model.rotary_base,
        rope_scaling=model.rotary_scaling_factor is not None,
        rope_scaling_factor=model.rotary_scaling_factor or 8.0,
        vp_stage=chunk if num_chunks > 1 else None,
    )
    module.true_vocab_size = model.vocab_size
    for parameter in module.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return module.to(device.current()) if device.is_cuda() else module
