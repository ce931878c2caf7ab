"""What follows from the configuration by arithmetic alone: sizes, degrees and sample counts.

Kept below `checks`, `model` and `optim`, so that each number has one definition that all of them use.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ext.config.tree import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig


class BatchStep(NamedTuple):
    """One level of the batch-size ramp-up."""

    from_samples: int
    """Consumed samples at which the level begins."""
    global_batch_size: int


def head_size(model: ModelConfig) -> int:
    """Return the width of one attention head: kv_channels, or hidden_size / num_attention_heads."""
    return model.hidden_size // model.num_attention_heads if model.kv_channels is None else model.kv_channels


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the rows of the embedding: vocab_size rounded up to make_vocab_size_divisible_by.

    Independent of the tensor-parallel size, unlike Megatron's own rule: a checkpoint fits every layout.
    """
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def model_parallel_size(parallel: ParallelConfig) -> int:
    """Return the ranks that hold one replica of the model: tp x pp x cp."""
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def bucket_size(parallel: ParallelConfig) -> int | None:
    """Return the elements per gradient bucket; None, one bucket for all, where nothing overlaps.

    Megatron's default grows with the number of data-parallel ranks, and a dp_reshardable checkpoint is cut by bucket:
    a fixed size lets that number change.
    """
    return (parallel.ddp_bucket_size or 40_000_000) if parallel.overlap_grad_reduce else None


def batch_steps(train: TrainConfig) -> tuple[BatchStep, ...]:
    """Return the levels of the global batch size, by consumed samples; one level without ramp-up.

    With (start, increment, samples) the level k begins at ceil(k x samples / levels), as in megatron-core
    0.16.1's num_microbatches_calculator.py (which divides in floating point and so may be a sample late).
    """
    if train.rampup_batch_size is None:
        return (BatchStep(0, train.global_batch_size),)
    start, increment, samples = train.rampup_batch_size
    levels = (train.global_batch_size - start) // increment
    return tuple(BatchStep(-(-k * samples // levels), start + k * increment) for k in range(levels + 1))


def batch_size_at(train: TrainConfig, consumed_samples: int) -> int:
    """Return the global batch size of the iteration that starts at `consumed_samples`."""
    steps = batch_steps(train)
    return next(step.global_batch_size for step in reversed(steps) if consumed_samples >= step.from_samples)


def samples_after(train: TrainConfig, iterations: int) -> int:
    """Return the samples consumed by the first `iterations` iterations, ramp-up included.

    An iteration that starts below a level's beginning runs at the smaller batch, even if it passes it.
    """
    steps = batch_steps(train)
    consumed = 0
    for step, following in zip(steps, steps[1:], strict=False):
        missing = max(0, following.from_samples - consumed)
        taken = min(iterations, -(-missing // step.global_batch_size))
        consumed += taken * step.global_batch_size
        iterations -= taken
    return consumed + iterations * train.global_batch_size


def warmup_samples(optimizer: OptimizerConfig, train: TrainConfig) -> int:
    """Return the samples over which the learning rate warms up (counted at the full batch)."""
    return optimizer.lr_warmup_iters * train.global_batch_size


def decay_samples(optimizer: OptimizerConfig, train: TrainConfig) -> int:
    """Return the consumed samples at which the learning rate reaches min_lr."""
    iterations = train.train_iters if optimizer.lr_decay_iters is None else optimizer.lr_decay_iters
    return samples_after(train, iterations)
