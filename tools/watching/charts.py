"""Charts as HTML and inline SVG: they scale with the page, need no script to be seen, and carry their figures for it.

The SVG of a chart is stretched to whatever size the page gives it (lines keep their width), and all text is HTML
beside it, so that labels stay readable on a phone. report.js adds a cursor, from the JSON that stands in the chart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from tools.watching.figures import format_lr, format_tokens

SIZE = 1000
"""Width and height of a chart's own coordinates."""
MOST_POINTS = 2000
COLORS = 7
"""Colours that report.css has: --series-0 and on."""


class Interval(NamedTuple):
    """A span of an axis."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve."""

    label: str
    color: int
    xs: Sequence[float]
    ys: Sequence[float]
    """NaN is a gap."""
    iterations: Sequence[int]
    look: str = "line"
    """line; faint: what a smoothed line stands on; points: dashed, with a dot at each."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Several curves over one axis."""

    name: str
    """Identifier in the page."""
    title: str
    unit: str
    series: Sequence[Series]
    x_label: str
    number_format: str = "plain"
    """How report.js and the axis write values: plain, lr, tokens, percent."""
    shown: Interval | None = None
    """Span of the vertical axis; default: from zero to the highest value."""
    log_choice: bool = False
    """Offer a logarithmic axis."""


def format_number(value: float, how: str) -> str:
    """Write a value as an axis does."""
    if how == "lr":
        return format_lr(value)
    if how == "tokens":
        return format_tokens(value)
    return f"{100 * value:.3g} %" if how == "percent" else f"{value:.4g}"


def chart_html(chart: Chart) -> str:
    """Render a chart; empty where no curve has a finite point."""
    series = [thinned(one) for one in chart.series]
    points = [(x, y) for one in series for x, y in zip(one.xs, one.ys, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    across = _span([x for x, _ in points], from_zero=True)
    shown = chart.shown or _span([y for _, y in points], from_zero=True)
    scales: dict[str, Interval] = {"linear": shown}
    if chart.log_choice and (positive := [y for _, y in points if y > 0]):
        low = shown.low if shown.low > 0 else min(positive)
        scales["log"] = Interval(low, max(shown.high, low * 1.01))
    views = "".join(_view(chart, series, across, scale, shown) for scale, shown in scales.items())
    choice = (
        f'<input type="checkbox" class="log-choice" id="{chart.name}-log">'
        f'<label for="{chart.name}-log">log scale</label>'
        if "log" in scales
        else ""
    )
    data = {
        "x": across, "scales": scales, "format": chart.number_format, "xLabel": chart.x_label,
        "series": [_data(one) for one in series],
    }  # fmt: skip
    return (
        f'<figure class="chart" id="{chart.name}">'
        f"<figcaption><h3>{escape(chart.title)}</h3> <span>{escape(chart.unit)}</span></figcaption>{choice}"
        f'<div class="plot" role="group" aria-roledescription="chart" tabindex="0" '
        f'aria-label="{escape(describe(chart))}">{views}</div>'
        f"{_legend(chart)}"
        f'<script type="application/json">{script_json(data)}</script></figure>\n'
    )


def script_json(value: Any) -> str:
    """Write JSON that may stand in a script element, whatever text it holds."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def describe(chart: Chart) -> str:
    """Say in words what a chart shows, for those who do not see it."""
    said = []
    for one in chart.series:
        finite = [(i, y) for i, y in zip(one.iterations, one.ys, strict=True) if math.isfinite(y)]
        if one.look != "faint" and finite:
            (first, begin), (last, end) = finite[0], finite[-1]
            begin_text, end_text = format_number(begin, chart.number_format), format_number(end, chart.number_format)
            said.append(f"{one.label}: {begin_text} at iteration {first:,}, {end_text} at iteration {last:,}")
    return f"{chart.title} by {chart.x_label}. {'; '.join(said)}."


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Keep the lowest and the highest point of each stretch, so that a long curve keeps its shape and its spikes."""
    count = len(series.xs)
    if count <= most:
        return series
    kept: list[int] = []
    stretches = most // 2
    for stretch in range(stretches):
        indices = range(count * stretch // stretches, count * (stretch + 1) // stretches)
        finite = [index for index in indices if math.isfinite(series.ys[index])] or [indices[0]]
        lowest, highest = min(finite, key=series.ys.__getitem__), max(finite, key=series.ys.__getitem__)
        kept += sorted({lowest, highest})
    kept = sorted({0, *kept, count - 1})
    return Series(
        label=series.label, color=series.color, look=series.look, xs=[series.xs[i] for i in kept],
        ys=[series.ys[i] for i in kept], iterations=[series.iterations[i] for i in kept],
    )  # fmt: skip


def nice_ticks(span: Interval, count: int = 5) -> list[float]:
    """Round values within a span, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    raw = (span.high - span.low) / count
    if not raw > 0:
        return [span.low]
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * scale for factor in (1, 2, 5) if factor * scale >= raw), 10 * scale)
    first, last = math.ceil(span.low / step - 1e-9), math.floor(span.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(span: Interval) -> list[float]:
    """Round values for a logarithmic axis: 1, 2 and 5 in each power of ten, or powers alone where there are many."""
    decades = range(math.floor(math.log10(span.low)), math.ceil(math.log10(span.high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    within = [tick for tick in ticks if span.low <= tick <= span.high]
    return within if len(within) >= 3 else nice_ticks(span)


def _span(values: Sequence[float], *, from_zero: bool) -> Interval:
    low, high = (min(0.0, *values) if from_zero else min(values)), max(values)
    return Interval(low, high + 0.04 * (high - low) if high > low else low + 1.0)


def _place(span: Interval, scale: str) -> Callable[[float], float]:
    """Map a value of an axis to 0 .. SIZE."""
    if scale == "log":
        low, high = math.log(span.low), math.log(span.high)
        return lambda value: SIZE * (math.log(value) - low) / (high - low) if value > 0 else -SIZE
    return lambda value: SIZE * (value - span.low) / (span.high - span.low)


def _view(chart: Chart, series: Sequence[Series], across: Interval, scale: str, shown: Interval) -> str:
    """Draw the curves at one scale, with grid and labels."""
    to_x, to_y = _place(across, "linear"), _place(shown, scale)
    y_ticks = log_ticks(shown) if scale == "log" else nice_ticks(shown)
    grid = "".join(f"M0 {SIZE - to_y(tick):.1f}H{SIZE}" for tick in y_ticks)
    curves = "".join(_curve(one, to_x, to_y) for one in series)
    y_labels = "".join(
        f'<span class="y" style="top:{100 - 100 * to_y(tick) / SIZE:.2f}%">'
        f"{escape(format_number(tick, chart.number_format))}</span>"
        for tick in y_ticks
    )
    x_labels = "".join(
        f'<span class="x" style="left:{100 * to_x(tick) / SIZE:.2f}%">{escape(format_tokens(tick))}</span>'
        for tick in nice_ticks(across)
    )
    return (
        f'<div class="view {scale}" aria-hidden="true">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" focusable="false">'
        f'<path class="grid" d="{grid}"/>{curves}</svg>{y_labels}{x_labels}'
        f'<span class="x-label">{escape(chart.x_label)}</span></div>'
    )


def _curve(series: Series, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    """Draw one curve; a gap breaks it."""
    steps, pen_down = [], False
    dots = []
    for x, y in zip(series.xs, series.ys, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        # Far outside is as good as infinitely far, and short to write.
        place = f"{to_x(x):.1f} {min(2 * SIZE, max(-SIZE, SIZE - to_y(y))):.1f}"
        steps.append(f"{'L' if pen_down else 'M'}{place}")
        dots.append(f"M{place}h0")
        pen_down = True
    style = f'style="stroke:var(--series-{series.color % COLORS})"'
    path = f'<path class="{series.look}" {style} d="{"".join(steps)}"/>'
    if series.look == "points" or len(dots) == 1:
        path += f'<path class="dots" {style} d="{"".join(dots)}"/>'
    return path


def _legend(chart: Chart) -> str:
    named = [one for one in chart.series if one.look != "faint"]
    if len(named) < 2:
        return ""
    entries = "".join(
        f'<li><span class="key {one.look}" style="border-color:var(--series-{one.color % COLORS})"></span>'
        f"{escape(one.label)}</li>"
        for one in named
    )
    return f'<ul class="legend">{entries}</ul>'


def _data(series: Series) -> dict[str, Any]:
    """What the cursor tells; six digits are more than a screen shows."""
    values = [float(f"{y:.6g}") if math.isfinite(y) else None for y in series.ys]
    return {
        "label": series.label, "color": series.color % COLORS, "look": series.look, "x": list(series.xs), "y": values,
        "iteration": list(series.iterations),
    }  # fmt: skip
