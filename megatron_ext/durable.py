"""Files that are whole or not there: written aside, flushed to the disk, renamed. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash at any moment leaves either what was there before or all of `content`."""
    aside = aside_path(path)
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_path(path: Path) -> Path:
    """Name the file that stands in for `path` until it is whole; own to this process."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def publish(aside: Path, path: Path) -> None:
    """Flush `aside` to the disk and rename it to `path`; both must lie in one file system.

    The folder is flushed too: otherwise a power cut can undo the rename and keep a later one.
    """
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file or folder that is already written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
