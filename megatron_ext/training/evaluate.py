"""Validation: the token-weighted mean loss over the same samples each time, on all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from megatron_ext.data.loader import Loader
from megatron_ext.training.step import Machine, gathered_parameters, run_micro_batches


class EvalResult(NamedTuple):
    """Outcome of a validation. The same on every rank."""

    loss: float
    """Mean over tokens, in nats."""
    tokens: int


@torch.no_grad()
def evaluate(machine: Machine, loader: Loader) -> EvalResult:
    """Compute the loss over the first eval_iters global batches of the validation samples. Every rank calls it.

    Where that is more than the validation data holds, one pass over it is enough: the rest of the last batch is blank
    and does not count.
    """
    train = machine.config.train
    total = min(train.eval_iters * train.global_batch_size, loader.samples.size)
    reading = replace(machine, loader=loader)
    loss_sum = num_tokens = 0.0
    for chunk in machine.model.wrapped:
        chunk.eval()
    with gathered_parameters(machine):
        for first in range(0, total, train.global_batch_size):
            batches = loader.iteration(first, global_batch_size=train.global_batch_size, limit=total)
            totals = run_micro_batches(reading, batches, samples=train.global_batch_size, forward_only=True)
            part_sum, part_tokens = totals.tolist()
            loss_sum, num_tokens = loss_sum + part_sum, num_tokens + part_tokens
    for chunk in machine.model.wrapped:
        chunk.train()
    return EvalResult(loss_sum / num_tokens, int(num_tokens))
