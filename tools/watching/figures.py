"""Figures of a run as people say them, and curves as they are shown. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The smoothed curve averages over about this part of the rows shown.
SMOOTHING_SHARE = 0.02
_BLOCKS = "▁▂▃▄▅▆▇█"


def format_tokens(count: float) -> str:
    """Write a number of tokens as people say it: 950, 12.5k, 3M, 57B, 1.2T."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.3g}{suffix}"
    return f"{count:.3g}"


def format_lr(value: float) -> str:
    """Write a learning rate as configs do: 4e-4, 2.5e-4; 0 as it is."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def format_bytes(count: float) -> str:
    """Write a size in binary units: 512 B, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def format_duration(seconds: float) -> str:
    """Write a time span by its two largest units: 8 s, 2 min 5 s, 3 h 20 min, 4 d 2 h."""
    whole = max(0, round(seconds))
    for large, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def smooth(values: Sequence[float], rows: int) -> list[float]:
    """Average each value with its neighbours, `rows` in all, as many before as after: the curve does not lag.

    Fewer after towards the end, fewer of both towards the start, where the loss falls fastest. Values that
    are not finite stay out of it.
    """
    sums, counts = [0.0], [0]  # of what is finite before each value: one pass, however wide the window
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    smoothed = []
    for index in range(len(values)):
        before = min(rows // 2, index)
        after = min(before, len(values) - 1 - index)
        first, end = index - before, index + after + 1
        count = counts[end] - counts[first]
        smoothed.append((sums[end] - sums[first]) / count if count else math.nan)
    return smoothed


def loss_range(losses: Sequence[Sequence[float]], validations: Sequence[float]) -> tuple[float, float] | None:
    """Fix a loss axis to the data of several runs, so that one spike does not flatten the curve.

    None where nothing is finite.
    """
    finite = sorted(value for run in losses for value in run if math.isfinite(value))
    if not finite:
        return None
    # A fresh model's loss, ln(vocabulary), and the validations belong in the picture: they are never cut off.
    kept = [finite[0], finite[int(0.99 * (len(finite) - 1))]]
    kept += [run[0] for run in losses if run and math.isfinite(run[0])]
    kept += [value for value in validations if math.isfinite(value)]
    low, high = min(kept), max(kept)
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw a curve in one line of block characters, each the mean of its share of the values; a gap is a space."""
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = []
    for share in shares:
        finite = [value for value in share if math.isfinite(value)]
        means.append(statistics.fmean(finite) if finite else math.nan)
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(_BLOCKS) - 1
    return "".join(
        " " if math.isnan(value) else _BLOCKS[round((value - low) / span * top) if span else top // 2]
        for value in means
    )
