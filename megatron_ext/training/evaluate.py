"""Validation: the token-weighted mean loss over the same samples each time, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_ext.data.loader import Loader
from megatron_ext.training.step import Machine, run_micro_batches


class EvalResult(NamedTuple):
    """Outcome of a validation. The same on every rank."""

    loss: float
    """Mean over tokens, in nats."""
    tokens: int


@torch.no_grad()
def evaluate(machine: Machine, loader: Loader) -> EvalResult:
    """Compute the loss over the first eval_iters global batches of the validation samples. Every rank calls it.

    A validation set smaller than that is read once: the rest of its last batch is blank and does not count.
    """
    train = machine.config.train
    total = min(train.eval_iters * train.global_batch_size, loader.samples.size)
    reading = replace(machine, loader=loader)
    overlapping = machine.config.parallel.overlap_param_gather
    for chunk in machine.model.wrapped:
        chunk.eval()
        if overlapping:
            chunk.disable_forward_pre_hook()
    loss_sum = num_tokens = 0.0
    for first in range(0, total, train.global_batch_size):
        batches = loader.iteration(first, global_batch_size=train.global_batch_size, limit=total)
        part_sum, part_tokens = run_micro_batches(
            reading, batches, samples=train.global_batch_size, forward_only=True
        )
        loss_sum, num_tokens = loss_sum + part_sum, num_tokens + part_tokens
    for chunk in machine.model.wrapped:
        chunk.train()
        if overlapping:
            chunk.enable_forward_pre_hook()
    return EvalResult(loss_sum / num_tokens, int(num_tokens))
