"""Layer 4: check a `.bin/.idx` pair number by number, block by block, and name the first bad place of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed import IndexedFile, bin_path, idx_path

BLOCK = 1 << 20
"""Numbers in memory at a time."""

Advance = Callable[[int], None]
"""Is told how many more bytes have been looked at."""


def index_faults(file: IndexedFile, advance: Advance) -> list[str]:
    """Check every length, pointer and document entry; one line per kind of fault, none for a sound index."""
    path = idx_path(file.prefix)
    return [f"{path}: {fault}" for fault in (*_sequence_faults(file, advance), *_document_faults(file, advance))]


def _sequence_faults(file: IndexedFile, advance: Advance) -> Iterator[str]:
    """Check that all sequences hold tokens and begin where the one before ends."""
    empty, moved = _Fault(), _Fault()
    path, sequences = idx_path(file.prefix), file.sequence_lengths.size
    after_pointers = file.idx_bytes - 8 * file.document_indices.size
    after_lengths = after_pointers - 8 * sequences
    end = 0
    for start in range(0, sequences, BLOCK):
        count = min(BLOCK, sequences - start)
        lengths = _read(path, file.sequence_lengths.dtype, after_lengths - 4 * (sequences - start), count)
        pointers = _read(path, file.sequence_pointers.dtype, after_pointers - 8 * (sequences - start), count)
        empty.look(lengths <= 0, lengths, start)
        ends = end + np.cumsum(lengths, dtype=np.int64) * file.dtype.itemsize
        expected = np.concatenate([np.array([end], dtype=np.int64), ends[:-1]])
        moved.look(pointers != expected, pointers, start, expected)
        end = int(ends[-1])
        advance(lengths.nbytes + pointers.nbytes)
    if empty.count:
        yield f"sequence {empty.place:,}: its length is {empty.value}, must be at least 1{empty.others()}."
    if moved.count:
        yield (
            f"sequence {moved.place:,}: its pointer is {moved.value}, must be {moved.wanted}, "
            f"where the sequences before it end{moved.others()}."
        )


def _document_faults(file: IndexedFile, advance: Advance) -> Iterator[str]:
    """Check that the document index rises from 0 to the number of sequences."""
    documents, sequences = file.document_indices, file.sequence_lengths.size
    if documents[0] != 0:
        yield f"document 0: begins at sequence {documents[0]}, must begin at 0."
    falls = _Fault()
    path = idx_path(file.prefix)
    for start in range(0, documents.size, BLOCK):
        left = documents.size - start
        # One further: each is compared with the next.
        block = _read(path, documents.dtype, file.idx_bytes - 8 * left, min(BLOCK + 1, left))
        falls.look(np.diff(block) < 0, block[1:], start, block[:-1])
        advance(min(BLOCK, left) * block.itemsize)
    if falls.count:
        yield (
            f"document {falls.place:,}: ends at sequence {falls.value}, before it begins ({falls.wanted})"
            f"{falls.others()}."
        )
    if documents[-1] != sequences:
        yield f"document index: ends at sequence {documents[-1]}, must end at {sequences}, the number of sequences."


def id_faults(file: IndexedFile, *, vocab_size: int | None, advance: Advance) -> list[str]:
    """Check that every id is at least 0 and below `vocab_size` (None: not known, any id will do)."""
    path, found = bin_path(file.prefix), _Fault()
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    for start in range(0, file.tokens.size, BLOCK):
        ids = _read(path, file.dtype, start * file.dtype.itemsize, min(BLOCK, file.tokens.size - start))
        if int(ids.min()) < 0 or int(ids.max()) >= limit:
            found.look((ids < 0) | (ids.astype(np.int64) >= limit), ids, start)
        advance(ids.nbytes)
    if not found.count:
        return []
    bounds = "at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
    return [f"{path}: {_place(file, found.place)}: id is {found.value}, must be {bounds}{found.others()}."]


def _read(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
    """Read numbers from a byte of a file on; the pages of a mapping would stay in this process's memory instead."""
    return np.fromfile(path, dtype=dtype, count=count, offset=offset)


def _place(file: IndexedFile, token: int) -> str:
    """Name the document and sequence that hold a token, as far as the index can be trusted."""
    byte = token * file.dtype.itemsize
    sequence = int(np.searchsorted(file.sequence_pointers, byte, side="right")) - 1
    document = int(np.searchsorted(file.document_indices, sequence, side="right")) - 1
    return f"token {token:,} (byte {byte:,}, sequence {sequence:,}, document {document:,})"


class _Fault:
    """The first of some faults of one kind, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self.place = self.value = self.wanted = -1

    def look(
        self,
        bad: npt.NDArray[np.bool_],
        values: npt.NDArray[Any],
        start: int,
        wanted: npt.NDArray[Any] | None = None,
    ) -> None:
        """Take in a block that begins at number `start`; `bad` marks the faults."""
        if not self.count and bad.any():
            first = int(bad.argmax())
            self.place, self.value = start + first, int(values[first])
            self.wanted = self.wanted if wanted is None else int(wanted[first])
        self.count += int(np.count_nonzero(bad))

    def others(self) -> str:
        """Say how many more there are."""
        return f" (and {self.count - 1:,} more)" if self.count > 1 else ""
