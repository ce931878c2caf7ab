"""Layer 4: Megatron's memory-mapped token format, written and read with numpy alone.

`PREFIX.bin` holds the token ids of all documents, one after another, without a header. `PREFIX.idx` holds,
little-endian:

    offset  bytes  content
    0       9      b"MMIDIDX\\0\\0"
    9       8      uint64 version, 1
    17      1      uint8 code of the ids' type (`DTYPE_CODES`)
    18      8      uint64 S, sequences
    26      8      uint64 D, documents + 1
    34      4 S    int32 tokens per sequence
            8 S    int64 byte offset of each sequence in .bin
            8 D    int64 first sequence of each document, and S at the end

A document is one sequence, or several (its sentences); an empty document is none, but keeps its entry in
the document index. The format is that of megatron-core's datasets/indexed_dataset.py (@0.16.1 and @0.19.2),
and files are equal to its builder's byte for byte.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ext.data.manifest import manifest_path
from megatron_ext.durable import aside_path, flush, publish
from megatron_ext.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[str, int] = {
    "uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8,
}  # fmt: skip
_HEADER = struct.Struct("<9sQBQQ")
_COPY_BYTES = 16 << 20
_BLOCK = 1 << 20
"""Numbers of the index in memory at a time."""

TokenArray = npt.NDArray[np.integer[Any]]
Numbers = npt.NDArray[np.int32]


def bin_path(prefix: str | Path) -> Path:
    """Name the file of token ids of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Name the index file of a prefix."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the ids' type by the vocabulary, as megatron-core's DType.optimal_dtype does."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedTotals(NamedTuple):
    """What was written into one pair."""

    documents: int
    tokens: int
    empty_documents: int
    bin_bytes: int
    idx_bytes: int


class IndexedWriter:
    """Write `PREFIX.bin` and `PREFIX.idx`, whole or not at all, in memory that does not grow with them.

    Everything goes into files aside; `publish` flushes and renames them. As a context manager it leaves
    nothing behind when the block ends without `publish`.

        with IndexedWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
            writer.add_document(ids)
            totals = writer.publish()

    Args:
        prefix: path of the pair without .bin and .idx.
        dtype: the ids' type.
        aside: folder for the unfinished files, in the prefix's file system; by default the prefix's own.
        ids: a .bin to go on with, in the prefix's file system, which stays when the block ends without `publish`;
            `add_lengths` is to be given what it holds already.
    """

    def __init__(
        self, prefix: str | Path, *, dtype: np.dtype[Any], aside: Path | None = None, ids: Path | None = None
    ) -> None:
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        unfinished = self._prefix if aside is None else aside / self._prefix.name
        self._bin_aside = ids or aside_path(bin_path(unfinished))
        self._keeps_ids = ids is not None
        self._idx_aside = aside_path(idx_path(unfinished))
        self._documents_aside = aside_path(Path(f"{unfinished}.documents"))
        self._sequences = self._documents = self._empty_documents = self._tokens = 0
        self._totals: IndexedTotals | None = None
        with ExitStack() as opened:
            # Not "ab": copy_file_range refuses such files.
            self._bin = opened.enter_context(self._bin_aside.open("wb" if ids is None else "r+b"))
            self._bin.seek(0, os.SEEK_END)
            self._idx = opened.enter_context(self._idx_aside.open("wb"))
            self._sequences_of_documents = opened.enter_context(self._documents_aside.open("wb"))
            self._idx.write(bytes(_HEADER.size))  # the counts come last
            self._files = opened.pop_all()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Closing writes what is buffered, which a full disk refuses again.
            with suppress(OSError):
                self._files.close()
        finally:
            for path in (self._idx_aside, self._documents_aside):
                path.unlink(missing_ok=True)
            if not self._keeps_ids:
                self._bin_aside.unlink(missing_ok=True)

    def add_document(self, ids: npt.ArrayLike) -> None:
        """Append one document, perhaps an empty one, as one sequence; its ids must fit the dtype."""
        tokens = np.asarray(ids, dtype=self._dtype)
        self._bin.write(tokens.tobytes())
        self._add_lengths(np.array([tokens.size], dtype=np.int32))

    def add_part(self, path: Path, lengths: Iterable[Numbers], sequences: Iterable[Numbers] | None = None) -> None:
        """Append a file of raw ids in the writer's dtype, the ids of some documents one after another.

        Args:
            path: the file.
            lengths: as of `add_lengths`.
            sequences: as of `add_lengths`.

        Raises:
            DataError: the file's size is not that of `lengths` (it was cut short, by a full disk say).
        """
        held, before = path.stat().st_size, self._tokens
        with path.open("rb") as part:
            _append_file(part, self._bin, held)
        self.add_lengths(lengths, sequences)
        if held != (expected := (self._tokens - before) * self._dtype.itemsize):
            raise DataError(f"{path}: holds {held} bytes, must hold {expected}; run again.")

    def add_lengths(self, lengths: Iterable[Numbers], sequences: Iterable[Numbers] | None = None) -> None:
        """Append documents whose ids are in the .bin already.

        Args:
            lengths: `[documents]` tokens of each document, 0 for an empty one; with `sequences` `[sequences]` tokens
                of each sequence, none of them 0. In blocks, of which one is in memory at a time.
            sequences: `[documents]` sequences of each document, 0 for an empty one. In blocks.
        """
        for block in lengths:
            self._add_lengths(block, count_documents=sequences is None)
        for block in sequences or ():
            self._add_documents(block)

    def flush_ids(self) -> None:
        """Flush the ids that have been appended to the disk."""
        self._bin.flush()
        os.fdatasync(self._bin.fileno())

    def _add_lengths(self, lengths: npt.NDArray[np.int32], *, count_documents: bool = True) -> None:
        held = lengths > 0
        kept = np.ascontiguousarray(lengths[held], dtype="<i4")
        assert count_documents or kept.size == lengths.size, "a sequence without a token"
        self._idx.write(kept.data)
        self._sequences += kept.size
        self._tokens += int(kept.sum(dtype=np.int64))
        if count_documents:
            self._add_documents(held.astype(np.int32))

    def _add_documents(self, sequences: npt.NDArray[np.int32]) -> None:
        self._sequences_of_documents.write(np.ascontiguousarray(sequences, dtype="<i4").data)
        self._documents += sequences.size
        self._empty_documents += int((sequences == 0).sum())

    def seal(self) -> IndexedTotals:
        """Write the rest of the index and flush everything to the disk; the old pair is not touched yet."""
        if self._totals is None:
            self._sequences_of_documents.close()
            self._bin.close()
            self._write_index()
            self._idx.close()
            assert self._bin_aside.stat().st_size == self._tokens * self._dtype.itemsize, "ids without lengths"
            flush(self._bin_aside)
            flush(self._idx_aside)
            self._totals = IndexedTotals(
                documents=self._documents,
                tokens=self._tokens,
                empty_documents=self._empty_documents,
                bin_bytes=self._bin_aside.stat().st_size,
                idx_bytes=self._idx_aside.stat().st_size,
            )
        return self._totals

    def publish(self) -> IndexedTotals:
        """Put both files, sealed, in the place of any earlier pair.

        The old manifest and index go first and the new index comes last, so that no moment pairs an old
        index or manifest with new ids.
        """
        totals = self.seal()
        manifest_path(self._prefix).unlink(missing_ok=True)
        idx_path(self._prefix).unlink(missing_ok=True)
        publish(self._bin_aside, bin_path(self._prefix))
        publish(self._idx_aside, idx_path(self._prefix))
        return totals

    def _write_index(self) -> None:
        """Write pointers, document index and header behind and before the lengths, block by block."""
        self._idx.flush()
        offset = 0
        for lengths in _read_blocks(self._idx_aside, _HEADER.size, self._sequences):
            ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize + offset
            pointers = np.concatenate([np.array([offset], dtype=np.int64), ends[:-1]])
            self._idx.write(pointers.astype("<i8").data)
            offset = int(ends[-1])
        first = 0
        self._idx.write(np.zeros(1, dtype="<i8").data)
        for sequences in _read_blocks(self._documents_aside, 0, self._documents):
            ends = np.cumsum(sequences, dtype=np.int64) + first
            self._idx.write(ends.astype("<i8").data)
            first = int(ends[-1])
        assert first == self._sequences, (first, self._sequences)
        self._idx.seek(0)
        code = DTYPE_CODES[self._dtype.name]
        self._idx.write(_HEADER.pack(MAGIC, VERSION, code, self._sequences, self._documents + 1))


def _append_file(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Append `size` bytes of a file, within the kernel where it can do that (and share blocks on some systems)."""
    target.flush()
    left = size
    try:
        while left and (copied := os.copy_file_range(source.fileno(), target.fileno(), left)):
            left -= copied
    except (AttributeError, OSError) as error:
        # Not between these two file systems, or not on this one; a full disk is an error by the other way too.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
    target.seek(0, os.SEEK_END)
    if left:
        shutil.copyfileobj(source, target, _COPY_BYTES)


def read_numbers(path: Path) -> Iterator[Numbers]:
    """Read a file of int32 in blocks, as `IndexedWriter.add_lengths` takes them."""
    return _read_blocks(path, 0, path.stat().st_size // 4)


def _read_blocks(path: Path, start: int, count: int) -> Iterator[Numbers]:
    """Read `count` int32 from byte `start` of a file in blocks."""
    with path.open("rb") as file:
        file.seek(start)
        while count:
            block = np.fromfile(file, dtype="<i4", count=min(count, _BLOCK))
            assert block.size, (path, count)
            count -= block.size
            yield block


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedFile:
    """An opened pair; the arrays are memory maps, so opening reads the index but no id."""

    prefix: Path
    dtype: np.dtype[Any]
    sequence_lengths: npt.NDArray[np.int32]
    """`[sequences]`"""
    sequence_pointers: npt.NDArray[np.int64]
    """`[sequences]` bytes."""
    document_indices: npt.NDArray[np.int64]
    """`[documents + 1]`"""
    tokens: TokenArray
    """`[tokens]` all ids of the file, one after another."""
    bin_bytes: int
    idx_bytes: int

    @classmethod
    def open(cls, prefix: str | Path) -> IndexedFile:
        """Open a pair and check that its sizes fit each other.

        Raises:
            DataError: a file is missing, is not of this format, or was cut short.
        """
        ids, index = bin_path(prefix), idx_path(prefix)
        for path in (ids, index):
            if not path.is_file():
                raise DataError(f"{path}: no such file; give the path of a pair without .bin or .idx.")
        dtype, sequences, documents = _read_header(index)
        bin_bytes, idx_bytes = ids.stat().st_size, index.stat().st_size
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if idx_bytes != expected:
            hint = " It holds sequence modes (multimodal data)?" if idx_bytes == expected + sequences else ""
            raise DataError(
                f"{index}: holds {idx_bytes} bytes, its header promises {expected}; preprocess again.{hint}"
            )
        raw = np.memmap(index, mode="r", dtype=np.uint8)
        first, second = _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences
        lengths: npt.NDArray[np.int32] = raw[_HEADER.size : first].view("<i4")
        pointers: npt.NDArray[np.int64] = raw[first:second].view("<i8")
        # The end of the last sequence, not the sum of all lengths: of 50 million documents that is 200 MB.
        # data/verify.py compares every pointer with the lengths.
        promised = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
        if bin_bytes != promised:
            raise DataError(
                f"{ids}: holds {bin_bytes} bytes, the index promises {promised}; "
                "the file is cut short or is another's: preprocess again."
            )
        return cls(
            prefix=Path(prefix),
            dtype=dtype,
            sequence_lengths=lengths,
            sequence_pointers=pointers,
            document_indices=raw[second:].view("<i8"),
            # An empty file cannot be mapped.
            tokens=np.memmap(ids, mode="r", dtype=dtype) if bin_bytes else np.zeros(0, dtype=dtype),
            bin_bytes=bin_bytes,
            idx_bytes=idx_bytes,
        )

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return int(self.document_indices.size) - 1

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Give `[documents]` tokens per document."""
        ends = np.zeros(self.sequence_lengths.size + 1, dtype=np.int64)
        np.cumsum(self.sequence_lengths, out=ends[1:])
        return np.diff(ends[self.document_indices])

    def document(self, number: int) -> TokenArray:
        """Give the ids of one document, counted from 0."""
        first, last = self.document_indices[number : number + 2]
        if first == last:
            return self.tokens[:0]
        start = int(self.sequence_pointers[first]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[first:last].sum(dtype=np.int64))]


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Read (ids' type, sequences, length of the document index) from an index file."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path}: is not a Megatron index (no MMIDIDX header); preprocess again.")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    names = {number: name for name, number in DTYPE_CODES.items()}
    if version != VERSION:
        raise DataError(f"{path}: format version is {version}, must be {VERSION}; preprocess again.")
    if code not in names or not np.issubdtype(np.dtype(names[code]), np.integer):
        raise DataError(f"{path}: type code is {code}, which no token ids have; preprocess again.")
    if documents < 1:
        raise DataError(f"{path}: has no document index; preprocess again.")
    return np.dtype(names[code]).newbyteorder("<"), sequences, documents
