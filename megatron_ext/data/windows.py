"""Samples computed from (seed, k) alone: windows of a file's token stream, without index arrays.

Shapes: s sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_ext.data.indexed import IndexedFile, idx_path
from megatron_ext.data.split import stretches_of_part
from megatron_ext.errors import DataError


class Sample(NamedTuple):
    """One training sequence. Tensors may be shared with other samples: never written to in place."""

    tokens: torch.Tensor
    """[s] int64."""
    labels: torch.Tensor
    """[s] int64, the tokens one place on."""
    loss_mask: torch.Tensor
    """[s] float32, 0 where a label does not count."""


class Windows:
    """The samples of one part of a file, in file order: window i holds the part's tokens i s to (i + 1) s, both ends.

    So each token but the first is the label of exactly one sample, and less than one sample is left over at the end.
    Their shuffled order is `sampler.Permutation`'s. Training data of 1.5-Pints and TinyLlama was packed so
    (lit-gpt's PackedDataset: documents as they come, blocks shuffled). It differs from megatron-core's GPTDataset in
    what shares a sample: documents that are neighbours in the file, where GPTDataset shuffles the documents one by
    one first. A file that is ordered (by source, by length) should be shuffled before it is tokenised.

    A sample is one read of s + 1 ids, or one for each stretch where it joins stretches of the part
    (`split.stretches_of_part`). Nothing is held but the table of stretches, and opening reads only what it needs of
    the index.
    """

    def __init__(
        self, file: IndexedFile, *, part: int, shares: Sequence[float], seq_length: int, masked_input: int | None
    ) -> None:
        """Find the part's stretches.

        Args:
            file: the opened pair.
            part: index into shares.
            shares: proportions of the parts, dealt by document.
            seq_length: s.
            masked_input: id whose positions do not count in the loss, as GPTDataset's eod_mask_loss leaves out the
                positions whose input is the end of a document; None: all count.

        Raises:
            DataError: the index is damaged where it was read.
        """
        places = _token_places(file, stretches_of_part(file.num_documents, part, shares))
        ends = np.cumsum(places[:, 1] - places[:, 0])
        # Plain lists and a plain array: numpy scalars and memory maps cost microseconds at each access.
        self._ends: list[int] = ends.tolist()
        self._shifts: list[int] = (places[:, 1] - ends).tolist()
        self._ids = np.asarray(file.tokens)
        self._seq_length = seq_length
        self._masked_input = masked_input
        self._ones = torch.ones(seq_length)
        self.num_tokens = self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        """Count the windows."""
        return max(0, self.num_tokens - 1) // self._seq_length

    def __getitem__(self, window: int) -> Sample:
        """Read one window."""
        assert 0 <= window < len(self), (window, len(self))
        start = window * self._seq_length
        end = start + self._seq_length + 1
        stretch = bisect_right(self._ends, start)
        shift = self._shifts[stretch]
        if end <= self._ends[stretch]:
            ids = self._ids[start + shift : end + shift].astype(np.int64)
        else:
            ids = self._read_joined(stretch, start, end)
        mask = self._ones
        if self._masked_input is not None:
            mask = torch.from_numpy((ids[:-1] != self._masked_input).astype(np.float32))
        return Sample(torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:]), mask)

    def _read_joined(self, stretch: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """Read the part's tokens [start, end), which begin in `stretch` and go on in the next ones."""
        pieces = []
        while start < end:
            stop, shift = min(end, self._ends[stretch]), self._shifts[stretch]
            pieces.append(self._ids[start + shift : stop + shift])
            start, stretch = stop, stretch + 1
        return np.concatenate(pieces, dtype=np.int64)


def _token_places(file: IndexedFile, stretches: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Turn document numbers into places in the stream of ids: documents lie in .bin one after another.

    Raises:
        DataError: the places do not rise, or lie outside of the file.
    """
    path = idx_path(file.prefix)
    documents_at = file.idx_bytes - 8 * file.document_indices.size
    pointers_at = documents_at - 8 * file.sequence_pointers.size
    sequences = _read_entries(path, documents_at, stretches.ravel())
    places = np.full(sequences.shape, file.tokens.size)
    inside = (sequences >= 0) & (sequences < file.sequence_pointers.size)
    places[inside] = _read_entries(path, pointers_at, sequences[inside]) // file.dtype.itemsize
    if (np.diff(places, prepend=0, append=file.tokens.size) < 0).any():
        raise DataError(
            f"{path}: documents do not lie in .bin one after another, as their pointers say; see "
            "tools/inspect_data.py --verify, and preprocess again."
        )
    return places.reshape(-1, 2)


def _read_entries(path: Path, offset: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Read a few entries of a table of int64 in a file.

    Not through a memory map: each page fault there reads far around it. Of an index of 1 GB, not in the page cache,
    500 entries took 900 ms by faults and 60 ms by reads (bench/index.py --cold shows the whole).
    """
    entries = []
    with path.open("rb", buffering=0) as table:
        for index in indices.tolist():
            table.seek(offset + 8 * index)
            entries.append(table.read(8))
    return np.frombuffer(b"".join(entries), dtype="<i8").astype(np.int64)
