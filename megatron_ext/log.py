"""Layer 2: where log lines go. Standard library only.

Rank 0 speaks to the console and to the run's log file; the other ranks only warn, on stderr, under their
number. Modules take their logger by `logging.getLogger(__name__)`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TextIO

from megatron_ext.errors import MegapintsError

_TIME = "%Y-%m-%d %H:%M:%S"
# Libraries that report their own affairs (planner statistics, absent accelerators) on every rank.
_LIBRARIES = ("megatron", "torch", "transformer_engine", "nvdlfw_inspect", "transformers", "matplotlib")


def setup_logging(*, rank: int, world_size: int, path: Path | None) -> None:
    """Send log records where this rank's belong. Calling it again replaces the former arrangement.

    `path` is the log file of rank 0, appended to, so that a resumed run goes on in the same file; the other
    ranks leave it alone.

    Raises:
        MegapintsError: the log file cannot be opened.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler(rank, world_size)]
    if rank == 0 and path is not None:
        handlers.append(_file_handler(path))
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if getattr(handler, "of_megapints", False)]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.of_megapints = True  # type: ignore[attr-defined]
        handler.addFilter(_LibraryFilter(logging.WARNING if rank == 0 else logging.ERROR))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    _route_warnings(rank)


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Write to whatever sys.stdout (rank 0) or sys.stderr is at that moment.

    A live progress display replaces both while it runs, to print lines above itself; a handler that kept the
    stream of its creation would write through the display.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        super().__init__(self.stream)
        self.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        digits = len(str(world_size - 1))
        self.setFormatter(_LineFormatter(prefix="" if rank == 0 else f"[rank {rank:>{digits}}] "))

    @property
    def stream(self) -> TextIO:
        return sys.stdout if self._rank == 0 else sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Ignored: StreamHandler.__init__ assigns what it was given."""


class _LineFormatter(logging.Formatter):
    """Time stamp and message; the level is named from warnings upwards."""

    def __init__(self, *, prefix: str = "") -> None:
        super().__init__(f"%(asctime)s {prefix}%(message)s", datefmt=_TIME)
        self._loud = logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", datefmt=_TIME)

    def format(self, record: logging.LogRecord) -> str:
        return self._loud.format(record) if record.levelno >= logging.WARNING else super().format(record)


def _file_handler(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise MegapintsError(
            f"{path}: the log file cannot be written ({error.strerror or error}); "
            "free the path or choose another run_dir"
        ) from None
    handler.setLevel(logging.INFO)
    handler.setFormatter(_LineFormatter())
    return handler


class _LibraryFilter(logging.Filter):
    """Leave out what a library says below a level; our own records pass."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._level or record.name.partition(".")[0] not in _LIBRARIES


def _route_warnings(rank: int) -> None:
    """Let Python's warnings through the log on rank 0; the same ones of every other rank say nothing new.

    Megatron's and torch's are dropped: each import tells in a dozen warnings that Transformer Engine and apex
    are absent (`tools/doctor.py` tells it once), and torch announces deprecations inside Megatron's calls.
    """
    logging.captureWarnings(True)
    if rank != 0:
        warnings.simplefilter("ignore")
        return
    for library in ("megatron", "torch", "transformer_engine"):
        warnings.filterwarnings("ignore", module=rf"{library}(\..*)?\Z")
