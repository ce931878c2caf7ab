"""Progress of the data tools: one live line on a terminal, plain lines elsewhere. Standard library only."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TextIO

LIVE_SECONDS = 0.2
"""Least time between two states of the live line."""


class Progress:
    """Bytes and documents done, with rate and time left.

    Args:
        total_bytes: bytes to come.
        stream: where lines go; a terminal gets a live line.
        interval_documents: elsewhere, a line each time so many more documents are done.
        interval_seconds: elsewhere, a line each time so many more seconds have passed.
        label: word that lines begin with.
        done_bytes: bytes that an earlier run has done; they count as done, but not for the rate.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        stream: TextIO,
        interval_documents: int | None = None,
        interval_seconds: float | None = None,
        label: str = "",
        done_bytes: int = 0,
    ) -> None:
        self._total = max(total_bytes, 1)
        self._stream = stream
        self._live = stream.isatty()
        self._interval_documents = interval_documents
        self._interval_seconds = LIVE_SECONDS if self._live else interval_seconds
        self._label = label
        self._began = self._shown = time.monotonic()
        self._bytes = self._before = done_bytes
        self._documents = 0

    def update(self, num_bytes: int, documents: int = 1) -> None:
        """Count what is done, and show it when that is due."""
        before = self._documents
        self._bytes += num_bytes
        self._documents += documents
        if not self._is_due(before):
            return
        self._shown = time.monotonic()
        if self._live:
            print(f"\r{self.line()}\033[K", end="", file=self._stream, flush=True)
        else:
            print(self.line(), file=self._stream, flush=True)

    def _is_due(self, documents_before: int) -> bool:
        if self._interval_seconds is not None:
            return time.monotonic() - self._shown >= self._interval_seconds
        interval = self._interval_documents
        return interval is not None and self._documents // interval > documents_before // interval

    def line(self) -> str:
        """Describe the state."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._bytes - self._before) / seconds
        left = timedelta(seconds=int((self._total - self._bytes) / rate)) if rate else "unknown"
        return (
            f"{self._label}{self._bytes / self._total:6.1%}  "
            f"{self._bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB  {self._documents:,} documents"
            f"  {rate / 1e6:.2f} MB/s  ETA {left}"
        )

    def note(self, message: str) -> None:
        """Print a line that stays."""
        print(f"\r{message}\033[K" if self._live else message, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the live line, with its last state."""
        if self._live:
            print(f"\r{self.line()}\033[K", file=self._stream, flush=True)
