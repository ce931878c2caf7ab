"""The learning rate and the batch size as pure functions of the samples consumed: nothing to save or restore.

The curve is Megatron's (`OptimizerParamScheduler` of megatron-core 0.16.1), with samples as its unit. An
iteration runs at the curve's value at its end: the k-th (k = 1, 2, ...) at k batches. So the first one is
not wasted at a rate of zero, as it is in Megatron, and the last one of the decay runs at min_lr. lit-gpt,
which 1.5-Pints and ProX used, moves the rate between micro-batches and updates with the last one's: within
a micro-batch of the same.
"""

from __future__ import annotations

import math

from megatron_ext.config import derived
from megatron_ext.config.tree import OptimizerConfig, TrainConfig


def learning_rate(optimizer: OptimizerConfig, train: TrainConfig, consumed_samples: int) -> float:
    """Return the learning rate of the iteration that starts when `consumed_samples` have been consumed."""
    end_of_iteration = consumed_samples + derived.batch_size_at(train, consumed_samples)
    return _curve(optimizer, train, end_of_iteration)


def global_batch_size_at(train: TrainConfig, consumed_samples: int) -> int:
    """Return the samples of the iteration that starts at `consumed_samples`."""
    return derived.batch_size_at(train, consumed_samples)


def total_samples(train: TrainConfig) -> int:
    """Return the samples consumed after train_iters iterations, ramp-up included."""
    return derived.samples_after(train, train.train_iters)


def samples_after(train: TrainConfig, iterations: int) -> int:
    """Return the samples consumed by the first `iterations` iterations, ramp-up included."""
    return derived.samples_after(train, iterations)


def _curve(optimizer: OptimizerConfig, train: TrainConfig, samples: int) -> float:
    warmup = derived.warmup_samples(optimizer, train)
    if samples <= warmup:
        return optimizer.lr * samples / warmup
    if optimizer.lr_decay_style == "constant":
        return optimizer.lr
    end = derived.decay_samples(optimizer, train)
    if samples > end:
        return optimizer.min_lr
    if optimizer.lr_decay_style == "wsd":
        assert optimizer.lr_wsd_decay_iters is not None, "checks.py requires it for wsd"
        length = optimizer.lr_wsd_decay_iters * train.global_batch_size
        share = _decay_share(optimizer.lr_wsd_decay_style, max(0, samples - (end - length)) / length)
    else:
        share = _decay_share(optimizer.lr_decay_style, (samples - warmup) / (end - warmup))
    return optimizer.min_lr + share * (optimizer.lr - optimizer.min_lr)


def _decay_share(style: str, progress: float) -> float:
    """Return what is left of lr - min_lr (1 to 0) at a progress from 0 to 1."""
    match style:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "exponential":
            return 2.0 * math.pow(0.5, progress) - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(progress)
    raise AssertionError(style)
