"""Forward passes of a saved model on one process, for checks and comparisons.

Legend: b batch, s sequence, v true vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.hf_convert import model_of
from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.config.tree import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainConfig,
)
from megatron_ext.model.gpt import build_model
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.launch import single_process


def forward_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Compute a checkpoint's next-token logits with megatron-core, in fp32, on this process alone.

    The model is built from the checkpoint's own `megapints.json`; weights of any type and layout are
    converted to fp32 on loading. Layers are the local ones, also where Transformer Engine is there, whose
    attention has no fp32 kernels. Process groups are made and left again, unless there are some already.

    Args:
        checkpoint: a whole checkpoint directory.
        tokens: [b, s] int64, ids below v.

    Returns:
        [b, s, v] float32 on the CPU; rows that pad the vocabulary are left out.

    Raises:
        CheckpointError: the directory is not a whole checkpoint of a model.
    """
    model = model_of(layout.read_description(checkpoint), where=checkpoint)
    config = _inference_config(replace(model, transformer_impl="local"), seq_length=tokens.size(1))
    with _single_process(config.parallel), torch.no_grad():
        chunks = build_model(config)
        Checkpoints(
            config,
            groups.where_am_i(),
            directory=checkpoint.parent,
            bare_chunks=chunks,
            optimizer=None,
            tokenizer_sha256="",
            transformer_engine=False,
        ).load_weights(checkpoint)
        (gpt,) = chunks
        gpt.eval()
        position_ids = torch.arange(tokens.size(1), device=device.current()).unsqueeze(0)
        # One sequence at a time: logits are the largest tensor of a small model.
        rows = [gpt(row.unsqueeze(0).to(device.current()), position_ids, None).float().cpu() for row in tokens]
    return torch.cat(rows)[..., : model.vocab_size]


def _inference_config(model: ModelConfig, *, seq_length: int) -> Config:
    return Config(
        name="inference",
        model=model,
        precision=PrecisionConfig(dtype="fp32"),
        parallel=ParallelConfig(use_distributed_optimizer=False),
        data=DataConfig(tokenizer="", train_data=()),
        train=TrainConfig(seq_length=seq_length, micro_batch_size=1, global_batch_size=1, train_iters=1),
        optimizer=OptimizerConfig(lr=0.0),
    )


@contextmanager
def _single_process(parallel: ParallelConfig) -> Iterator[None]:
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "forward_logits is for one process"
        yield
        return
    groups.initialize(parallel, single_process(), seed=1)
    try:
        yield
    finally:
        groups.destroy()
