"""A folder that a tool makes: filled beside its place, with progress shown, and there only when it is whole."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from megatron_ext.errors import CheckpointError


def refuse_existing(target: Path) -> None:
    """Refuse a folder that is there already, unless it is empty.

    Raises:
        CheckpointError: it is there.
    """
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or give another --save.")


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Give a folder to fill beside the target; it gets the target's name only if all went well."""
    folder = target.with_name(target.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if folder.exists():
        _sync(folder)
        folder.rename(target)
        _sync(target.parent)


def keep_rejected(folder: Path, target: Path) -> Path:
    """Keep a folder that is not to be published, under a name that says so."""
    rejected = target.with_name(target.name + ".rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    return folder.rename(rejected)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done, rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn(task),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            handle = bar.add_task(task, total=total)
            yield lambda count: bar.advance(handle, count)
        return
    started = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= 10 or done == total:
            shown = now
            rate = max(done, 1) / max(now - started, 1e-9)
            print(
                f"{task}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s, "
                f"{max(0, total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    yield advance
