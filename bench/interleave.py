"""Compare two implementations fairly on a shared machine: CPU time, alternating A B B A, in processes of their own.

A bench file gives one function per implementation that builds it and returns a callable `run()` doing one unit of
work. `compare` starts a process for each, lets them take turns, and reports CPU seconds per unit (user and system,
all threads of the process) and their ratio. Wall time on a shared machine says little.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

Build = Callable[[], Callable[[], None]]


class Comparison(NamedTuple):
    """CPU seconds per unit of work of two implementations."""

    first: float
    second: float
    ratio: float
    """Median over rounds of second / first."""
    lowest: float
    highest: float


def compare(first: Build, second: Build, *, rounds: int, units: int, warmup: int = 1) -> Comparison:
    """Let two implementations take turns and compare their CPU time per unit of work.

    Args:
        first: builds the implementation A. Called in a process of its own.
        second: builds B.
        rounds: times that A B B A is played; each gives one ratio.
        units: units of work per turn.
        warmup: units before the first measured turn.
    """
    context = multiprocessing.get_context("spawn")
    workers = [_start(context, build, warmup) for build in (first, second)]
    ratios, totals = [], [[], []]  # type: ignore[var-annotated]
    for _ in range(rounds):
        spent = [0.0, 0.0]
        for index in (0, 1, 1, 0):
            spent[index] += _turn(workers[index], units) / (2 * units)
        ratios.append(spent[1] / spent[0])
        for index in (0, 1):
            totals[index].append(spent[index])
    for pipe in workers:
        pipe.send(0)
    return Comparison(
        statistics.median(totals[0]), statistics.median(totals[1]), statistics.median(ratios), min(ratios), max(ratios)
    )


def _start(context: multiprocessing.context.SpawnContext, build: Build, warmup: int) -> Connection:
    ours, theirs = context.Pipe()
    context.Process(target=_work, args=(theirs, build), daemon=False).start()
    theirs.close()
    _turn(ours, warmup)
    return ours


def _turn(pipe: Connection, units: int) -> float:
    pipe.send(units)
    return float(pipe.recv())


def _work(pipe: Connection, build: Build) -> None:
    run = build()
    while units := pipe.recv():
        before = time.process_time()
        for _ in range(units):
            run()
        pipe.send(time.process_time() - before)
