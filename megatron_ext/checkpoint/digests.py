"""Digests of a checkpoint's files: taken while they are written, compared before they are read. No torch.

XXH3 of 128 bits: it is to find damage, not forgery, and reads at 27 GB/s on one core of the machine that it was
chosen on, where zlib.crc32 reads 4.3, hashlib's sha256 1.8 and blake2b 0.9 (`python bench/checkpoint.py --hashes`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 4 * 2**20
_READERS = 4
_SHARD = re.compile(r"__(\d+)_\d+\.distcp\Z")


class FileRecord(NamedTuple):
    """Size and digest of a file, as it was written."""

    size: int
    digest: str


class DigestingFile:
    """A new file that is digested while it is written, and flushed to the disk when it is closed.

    It is a stream for `torch.save`, whose C++ writer must not see an exception from `write`: the first one is kept,
    later writes do nothing, and `close` raises it.
    """

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            OSError: it cannot be created.
        """
        self._stream: BinaryIO = path.open("wb", buffering=2**20)
        self._path = path
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self._error: OSError | None = None

    @property
    def failed(self) -> bool:
        """Whether a write has failed, so that what follows would be in vain."""
        return self._error is not None

    def write(self, content: bytes | memoryview) -> int:
        """Append bytes; all of them are taken, also after a failure."""
        whole = memoryview(content).cast("B")
        try:
            for begin in range(0, 0 if self.failed else len(whole), _BLOCK_BYTES):
                block = whole[begin : begin + _BLOCK_BYTES]  # digested and copied while it is in the CPU's cache
                self._digest.update(block)
                self._stream.write(block)
                self._size += len(block)
        except OSError as error:
            self._error = error
        return len(whole)

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: `torch.save` flushes after every tensor; what counts is `close`."""

    def close(self) -> FileRecord:
        """Flush everything to the disk and close the file.

        Raises:
            OSError: this or an earlier write failed, with the file's name in it.
        """
        try:
            if self._error is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        except OSError as error:
            self._error = error
        try:
            self._stream.close()  # flushes what is left, so on a full disk it fails once more
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from None
        return FileRecord(self._size, self._digest.hexdigest())


def of_text(content: str) -> str:
    """Digest a text."""
    return xxhash.xxh3_128_hexdigest(content.encode())


def of_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> FileRecord:
    """Read a file once and digest it.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    size = 0
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
            size += count
            on_bytes(count)
    return FileRecord(size, digest.hexdigest())


def find_damage(
    directory: Path, expected: Mapping[str, FileRecord], on_bytes: Callable[[int], None] = lambda _: None
) -> str | None:
    """Read files of a directory, several at a time, and say what is wrong with the first bad one; None if all is well.

    Args:
        directory: where they lie.
        expected: their names, and what they were when they were written.
        on_bytes: called with every number of bytes read, from several threads.
    """

    def check(name: str) -> str | None:
        try:
            found = of_file(directory / name, on_bytes)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found.size != expected[name].size:
            return f"{name} has {found.size} bytes, not {expected[name].size}"
        if found.digest != expected[name].digest:
            return f"{name} is damaged (its content is not what was written)"
        return None

    if not expected:
        return None
    with ThreadPoolExecutor(min(_READERS, len(expected))) as readers:
        return next((reason for reason in readers.map(check, sorted(expected)) if reason), None)


def writer_of(name: str, index: int) -> int:
    """Read from a shard's name which rank wrote it; any other file's is `index`."""
    match = _SHARD.match(name)
    return int(match[1]) if match else index
