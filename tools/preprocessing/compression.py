"""Unpack gzip, zstd and bz2 streams whole: every member or frame, and never a cut-off one in silence."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from megatron_ext.errors import DataError

READ_BYTES = 64 << 10
"""Packed bytes at a time: small, because what they unpack to is held in memory at once."""

_ZSTD_WINDOW_BYTES = 1 << 31
"""Largest zstd window: what `zstd --long=31` writes; the library's own limit refuses more than 128 MiB."""


class Format(NamedTuple):
    """How data of a format begin."""

    compression: str | None
    name: str
    magic: tuple[bytes, ...]
    """First bytes; any of them."""


_SKIPPABLE = tuple(bytes((nibble, 0x2A, 0x4D, 0x18)) for nibble in range(0x50, 0x60))
"""zstd frames that carry no data (RFC 8878 3.1.2); pzstd and seekable archives begin with one."""

FORMATS = (
    Format("gzip", "gzip data", (b"\x1f\x8b",)),
    Format("zstd", "zstd data", (b"\x28\xb5\x2f\xfd", *_SKIPPABLE)),
    Format("bz2", "bzip2 data", (b"BZh",)),
    Format(None, "Parquet data", (b"PAR1",)),
    Format(None, "Arrow data", (b"ARROW1", b"\xff\xff\xff\xff")),
    Format(None, "xz data", (b"\xfd7zXZ\x00",)),
    Format(None, "a zip archive", (b"PK\x03\x04",)),
    Format(None, "UTF-16 text", (b"\xff\xfe", b"\xfe\xff")),
)
"""What the first bytes of a file can tell."""


def recognise(head: bytes) -> Format | None:
    """Tell a format by the first bytes of a file; None for plain text and whatever else."""
    return next((known for known in FORMATS if head.startswith(known.magic)), None)


def unpack(file: BinaryIO, compression: str, *, path: str) -> Iterator[bytes]:
    """Unpack a stream in pieces; `file.tell()` says how far it has been read.

    Args:
        file: open at the beginning.
        compression: "gzip", "zstd" or "bz2".
        path: for messages.

    Raises:
        DataError: the data are damaged, or end before their format says so.
    """
    begin, damage = _decompressor(compression, path)
    stream: Any = None
    data = file.read(READ_BYTES)
    while data:
        if stream is None:
            stream = begin()
        try:
            piece = stream.decompress(data)
        except damage as error:
            raise DataError(
                f"{path}: is damaged {compression} data (near byte {file.tell():,}: {error}); fetch or pack it again."
            ) from error
        if piece:
            yield piece
        data = b""
        if stream.eof:
            data, stream = stream.unused_data, None
        data = data or file.read(READ_BYTES)
        if stream is None and compression == "gzip":
            # Tapes and some object stores pad members with zeros, which gzip itself passes over.
            while data and not (data := data.lstrip(b"\0")):
                data = file.read(READ_BYTES)
    if stream is not None:
        raise DataError(
            f"{path}: ends in the middle of compressed data ({compression}, after {file.tell():,} bytes); "
            "fetch or pack it again."
        )


class _Decompressor(NamedTuple):
    begin: Callable[[], Any]
    """Begins a member or frame; gives an object with `decompress`, `eof` and `unused_data`."""
    damage: type[Exception]
    """What it raises at damaged data."""


def _decompressor(compression: str, path: str) -> _Decompressor:
    """Choose the library of a format."""
    if compression == "gzip":
        return _Decompressor(lambda: zlib.decompressobj(wbits=31), zlib.error)  # 31: a gzip header and its checksum
    if compression == "bz2":
        return _Decompressor(bz2.BZ2Decompressor, OSError)
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path}: is zstd data, and zstandard is not installed: pip install zstandard.") from error
    library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    return _Decompressor(library.decompressobj, zstandard.ZstdError)
