"""A micro batch, and how the ranks of a tensor-parallel group come to share one.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place


class Batch(NamedTuple):
    """Inputs of one forward pass, on this rank's device."""

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64."""
    loss_mask: torch.Tensor
    """[b, s] float32."""
    position_ids: torch.Tensor
    """[b, s] int64."""


def share_batch(host: torch.Tensor | None, place: Place, *, shape: tuple[int, int]) -> Batch:
    """Give the first tensor-parallel rank's micro batch to its group, and cut it for context parallelism.

    Args:
        host: [3, b, s] int64 on the host (tokens, labels, loss mask); None on the other tensor-parallel ranks.
        place: this rank's coordinates.
        shape: (b, s).
    """
    if host is None:
        packed = torch.empty((3, *shape), dtype=torch.int64, device=device.current())
    else:
        packed = device.pin(host).to(device.current(), non_blocking=True) if device.is_cuda() else host
    groups.broadcast_over_tensor_ranks(packed)
    positions = torch.arange(shape[1], dtype=torch.int64, device=packed.device).expand(shape)
    batch = Batch(packed[0], packed[1], packed[2].float(), positions)
    if place.context_size == 1:
        return batch
    return Batch(*(cut_for_context_rank(t, place.context_rank, place.context_size) for t in batch))


def cut_for_context_rank(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Take a context-parallel rank's share of [b, s]: the chunks `rank` and `2 size - 1 - rank` of 2 size.

    An early chunk with a late one, so that every rank has the same work under a causal mask; as Transformer Engine's
    attention expects it (megatron-core 0.16.1 and 0.19.2, utils.py, get_batch_on_this_cp_rank).
    """
    chunks = tensor.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)
