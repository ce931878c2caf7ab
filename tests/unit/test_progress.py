"""tools/progress.py: what a line says."""

from __future__ import annotations

import io

import pytest

from tools import progress
from tools.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_line_says_share_rate_and_time_left(clock: list[float]) -> None:
    bar = Progress(40_000_000, stream=io.StringIO(), label="a: ")
    clock[0] += 2
    bar.update(10_000_000, 1234)
    assert bar.line() == "a:  25.0%  10.0 of 40.0 MB  1,234 documents  5.00 MB/s  ETA 0:00:06"


def test_line_of_a_run_that_continues_counts_only_its_own_bytes_for_the_rate(clock: list[float]) -> None:
    bar = Progress(40_000_000, stream=io.StringIO(), done_bytes=20_000_000)
    clock[0] += 2
    bar.update(10_000_000, 5)
    assert bar.line() == " 75.0%  30.0 of 40.0 MB  5 documents  5.00 MB/s  ETA 0:00:02"


def test_line_before_anything_is_done_knows_no_end(clock: list[float]) -> None:
    assert Progress(40_000_000, stream=io.StringIO()).line().endswith("0.00 MB/s  ETA unknown")
