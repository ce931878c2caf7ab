"""Deal the documents of a file into parts (training, validation), evenly over the file.

Megatron cuts contiguous ranges, so a file ordered by source gives a validation share of one source alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GOLDEN_RATIO = 0.6180339887498949
# How many stretches the smaller part is dealt in, and the most blocks that a file is cut into for it.
_STRETCHES = 128
_MOST_BLOCKS = 1 << 20


def sequences_of_part(
    document_indices: npt.NDArray[np.int64], part: int, shares: Sequence[float]
) -> npt.NDArray[np.int32]:
    """Pick the sequences whose documents belong to one part of a split: every 100th document for 99,1.

    Args:
        document_indices: [documents + 1], first sequence of each document.
        part: index into shares.
        shares: proportions of the parts.

    Returns:
        Sequence indices, ascending.
    """
    mine = _deal(len(document_indices) - 1, part, shares)
    return np.flatnonzero(np.repeat(mine, np.diff(document_indices))).astype(np.int32)


def stretches_of_part(documents: int, part: int, shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Find the runs of neighbouring documents that belong to one part; few, whatever the file's size.

    Blocks of neighbouring documents are dealt, so many that the smaller part gets about 128 of them; in a file with
    fewer documents than blocks a block is a document, and the parts are those of `sequences_of_part`.

    Args:
        documents: how many the file has.
        part: index into shares.
        shares: proportions of the parts.

    Returns:
        [stretches, 2] first document, and the one after the last; ascending.
    """
    smallest = min(share for share in shares if share > 0) / sum(shares)
    blocks = 1 if smallest == 1 else min(documents, _MOST_BLOCKS, round(_STRETCHES / smallest))
    edges = np.flatnonzero(np.diff(_deal(blocks, part, shares), prepend=False, append=False))
    return (edges * documents // max(blocks, 1)).reshape(-1, 2)


def _deal(number: int, part: int, shares: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Say for each of `number` things whether it belongs to a part."""
    total, before = sum(shares), sum(shares[:part])
    low, high = before / total, (before + shares[part]) / total
    # Multiples of the golden ratio, modulo one, fill the unit interval evenly in every stretch and keep no step
    # with a file that alternates its sources (Kronecker sequence; Niederreiter 1992, chapter 3).
    place = (np.arange(number, dtype=np.float64) * _GOLDEN_RATIO) % 1.0
    return (place >= low) & (place < high)
