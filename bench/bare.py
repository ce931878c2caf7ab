"""Build the parts of a run for a measurement: one process, random tokens, no files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_ext.config.tree import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
)
from megatron_ext.data.blend import Sample
from megatron_ext.data.loader import Loader
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer
from megatron_ext.parallel import groups
from megatron_ext.parallel.launch import single_process
from megatron_ext.training.step import Machine, connect


class RandomSamples:
    """Random tokens in place of a data set: the k-th sample is a function of k."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self._vocab_size, self._seq_length = vocab_size, seq_length
        self._mask = torch.ones(seq_length)

    def __getitem__(self, k: int) -> Sample:
        """Draw the k-th sample."""
        generator = torch.Generator().manual_seed(k)
        text = torch.randint(self._vocab_size, (self._seq_length + 1,), generator=generator)
        return Sample(text[:-1], text[1:], self._mask)


def random_samples(vocab_size: int, seq_length: int) -> Any:
    """Make an endless source of random samples."""
    return RandomSamples(vocab_size, seq_length)


def build_machine(
    shape: Mapping[str, Any], *, dtype: Any, seq_length: int, micro_batch: int, micro_batches: int, samples: Any
) -> Machine:
    """Build what `train_step` works with, as pretrain_pints.py does, on this process alone."""
    config = Config(
        name="bench",
        model=ModelConfig(**shape, max_position_embeddings=seq_length),
        precision=PrecisionConfig(dtype=dtype),
        data=DataConfig(tokenizer="", train_data=()),
        train=TrainConfig(
            seq_length=seq_length,
            micro_batch_size=micro_batch,
            global_batch_size=micro_batch * micro_batches,
            train_iters=10**9,
        ),
        optimizer=OptimizerConfig(lr=1e-4, lr_decay_style="constant"),
    )
    place = groups.initialize(config.parallel, single_process(), seed=1)
    model = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, model.wrapped)
    connect(config, model, optimizer)
    loader = Loader(samples, place, micro_batch_size=micro_batch, seq_length=seq_length)
    return Machine(config=config, place=place, model=model, optimizer=optimizer, loader=loader)
