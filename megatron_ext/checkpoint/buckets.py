"""Gathered optimizer state laid out as the gradient buckets are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch


@contextlib.contextmanager
def bucket_padding_kept(optimizer: Any) -> Iterator[None]:
    """Within the block, let megatron-core cut fully_reshardable state at the right places. Every rank enters it.

    `sharded_param_state_fully_reshardable` (distrib_optimizer.py of 0.16.1 and 0.19.2) cuts each parameter out by its
    place in the gradient buffer, whose buckets end in padding, but out of a tensor that was gathered without it. With
    several buckets every parameter behind a padded one would be saved shifted, and the last filled up with zeros.
    """
    parts = [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if hasattr(part, "gbuf_ranges")]
    for part in parts:
        part.get_parameter_state_dp_zero = partial(_gather, part.get_parameter_state_dp_zero, part.buffers)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero  # what the class has shows again


def _gather(gather: Callable[..., Any], buffers: list[Any], **options: Any) -> Any:
    state = gather(**options)
    if state is not None:
        for index, buffer in enumerate(buffers):
            for tensors in state[index].values():
                for name, flat in tensors.items():
                    if isinstance(flat, torch.Tensor):
                        tensors[name] = spread(flat, buffer.buckets)
    return state


def spread(flat: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    """Put the padding of Megatron's buckets back between their numbers.

    Args:
        flat: [numbers of all buckets], each bucket's `numel_unpadded`, one after another.
        buckets: in order; `grad_data` of each is as long as the bucket with its padding.

    Returns:
        [padded numbers of all buckets]; `flat` itself where there is only one bucket, whose padding nothing follows.
    """
    if len(buckets) == 1:
        return flat
    pieces = flat.split([bucket.numel_unpadded for bucket in buckets])
    whole = [bucket.grad_data.numel() for bucket in buckets]
    return torch.cat(
        [torch.nn.functional.pad(piece, (0, size - len(piece))) for piece, size in zip(pieces, whole, strict=True)]
    )
