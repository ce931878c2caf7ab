"""A micro batch, and how the ranks of a tensor-parallel group come to share one.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_ext.data.documents import find_starts
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place


class Batch(NamedTuple):
    """Inputs of one forward pass, on this rank's device.

    Where documents are kept apart, [1, b s] stands for [b, s]: the samples one after another.
    """

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64."""
    loss_mask: torch.Tensor
    """[b, s] float32."""
    position_ids: torch.Tensor
    """[b, s] int64, from 0 in each sample, or in each document where they are kept apart."""
    documents: Any = None
    """Megatron's PackedSeqParams: where attention and rotary positions restart. None: only at each sample."""


def share_batch(
    host: torch.Tensor | None, place: Place, *, shape: tuple[int, int], document_end: int | None = None
) -> Batch:
    """Give the first tensor-parallel rank's micro batch to its group, and cut it for context parallelism.

    Args:
        host: [3, b, s] int64 on the host (tokens, labels, loss mask); None on the other tensor-parallel ranks.
        place: this rank's coordinates.
        shape: (b, s).
        document_end: id after which a new document begins; None: documents are not kept apart.
    """
    if host is None:
        packed = torch.empty((3, *shape), dtype=torch.int64, device=device.current())
    else:
        packed = device.pin(host).to(device.current(), non_blocking=True) if device.is_cuda() else host
    groups.broadcast_over_tensor_ranks(packed)
    if document_end is not None:
        assert place.context_size == 1, "context ranks would need slices of each document"
        # Found on the host where the tokens are there: counting on the device would wait for all that it has to do.
        return _keep_apart(packed, find_starts((packed if host is None else host)[0], document_end))
    positions = torch.arange(shape[1], dtype=torch.int64, device=packed.device).expand(shape)
    batch = Batch(packed[0], packed[1], packed[2].float(), positions)
    if place.context_size == 1:
        return batch
    return Batch(*(cut_for_context_rank(t, place.context_rank, place.context_size) for t in batch[:4]))


def _keep_apart(packed: torch.Tensor, starts: torch.Tensor) -> Batch:
    """Lay the samples of [3, b, s] one after another, with documents that begin at [documents + 1] int32 places."""
    from megatron.core.packed_seq_params import PackedSeqParams

    # Exactly the longest: megatron-core's unfused rotary embedding takes a table as long as all tokens together for
    # one of places in the batch, and would not restart (0.16.1 and 0.19.2, rope_utils.py, _apply_rotary_pos_emb_thd).
    longest = int(starts.diff().max())
    if starts.device != packed.device:
        starts = device.pin(starts).to(packed.device, non_blocking=True)
    tokens, labels, loss_mask = packed.flatten(1).unsqueeze(1)
    places = torch.arange(tokens.numel(), dtype=torch.int64, device=packed.device)
    positions = places - starts[:-1].repeat_interleave(starts.diff(), output_size=tokens.numel())
    documents = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return Batch(tokens, labels, loss_mask.float(), positions.unsqueeze(0), documents)


def cut_for_context_rank(tensor: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Take a context-parallel rank's share of [b, s]: the chunks `rank` and `2 size - 1 - rank` of 2 size.

    An early chunk with a late one, so that every rank has the same work under a causal mask; as Transformer Engine's
    attention expects it (megatron-core 0.16.1 and 0.19.2, utils.py, get_batch_on_this_cp_rank).
    """
    chunks = tensor.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)
