"""Where a thread stands, from its Python stack: in which collective it waits, or what it does instead."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

# Where torch's collectives are called through. Other files of torch.distributed (checkpoints) do work of their own.
_COLLECTIVE_FILES = ("distributed_c10d.py", "c10d_logger.py", "_functional_collectives.py")
_DECORATORS = ("wrapper",)  # of c10d_logger.py, around every collective
_WAITS_FOR_RANKS = (".wait(",)  # of a collective that was begun before
_WAITS_FOR_DEVICE = (".wait(", ".tolist(", ".item(", ".synchronize(", ".cpu(", "float(")
_PATHS = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_REAL_PATHS = {os.path.realpath(path) for path in _PATHS}
_LIBRARIES = tuple(sorted((path + os.sep for path in _PATHS | _REAL_PATHS), key=len, reverse=True))
_OURS = ("megatron" + os.sep, "megatron_ext" + os.sep)
_CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep


class Position(NamedTuple):
    """Where a thread stands."""

    waits: bool
    """In a collective, or for the device: not with work of its own."""
    text: str
    """In words, with file and line."""
    function: str
    """The innermost function of ours or Megatron's, and its file."""


Fingerprint = tuple[tuple[int, int], ...]
"""Each frame and its instruction: the same twice where the thread did not move in between."""


def observe(thread: int, *, cuda: bool) -> tuple[Position, Fingerprint] | None:
    """Look where a thread of this process stands; None where it has ended."""
    innermost = sys._current_frames().get(thread)
    if innermost is None:
        return None
    return position_of(innermost, cuda=cuda), tuple((id(frame), frame.f_lasti) for frame in _outwards(innermost))


def position_of(innermost: FrameType, *, cuda: bool) -> Position:
    """Put a stack into words, by its innermost frame.

    On CUDA a collective only waits on the device; what shows in the host's stack is the wait for the device's result.
    """
    operation = None
    caller: FrameType | None = innermost
    while caller is not None and (_in_collective(caller) or (operation is not None and _manages_context(caller))):
        if _in_collective(caller):
            decorates = caller.f_code.co_name in _DECORATORS
            operation = operation or "a collective" if decorates else caller.f_code.co_name
        caller = caller.f_back
    if operation is None and caller is not None:
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        if any(mark in line for mark in _WAITS_FOR_RANKS):
            operation = "the wait for a collective"
        elif cuda and any(mark in line for mark in _WAITS_FOR_DEVICE):
            operation = "the wait for the device"
    ours = next((frame for frame in _outwards(caller) if _is_ours(frame)), caller)
    function = "?" if ours is None else f"{ours.f_code.co_name} ({short_path(ours.f_code.co_filename)})"
    if operation is not None:
        return Position(True, operation if caller is None else f"{operation}, called by {_describe(caller)}", function)
    assert caller is innermost
    text = _describe(innermost)
    if ours is not None and ours is not innermost:
        text += f", called by {_describe(ours)}"
    return Position(False, text, function)


def short_path(path: str) -> str:
    """Leave out where a library or this checkout is installed."""
    for folder in (*_LIBRARIES, _CHECKOUT):
        if path.startswith(folder):
            return path[len(folder) :]
    return path


def _in_collective(frame: FrameType) -> bool:
    folder, _, file = frame.f_code.co_filename.rpartition(os.sep)
    return file in _COLLECTIVE_FILES and folder.endswith(os.path.join("torch", "distributed"))


def _manages_context(frame: FrameType) -> bool:
    return os.path.basename(frame.f_code.co_filename) == "contextlib.py"


def _is_ours(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return short_path(path).startswith(_OURS) or not path.startswith((*_LIBRARIES, "<"))


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({short_path(frame.f_code.co_filename)}:{frame.f_lineno})"
