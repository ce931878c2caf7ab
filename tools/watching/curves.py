"""The curves of one or more runs, as charts. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tools.watching.charts import Chart, Interval, Series
from tools.watching.figures import SMOOTHING_SHARE, loss_range, smooth
from tools.watching.reading import Row, RunRecord, iteration_of, number

AXES = {"tokens": "training tokens", "iteration": "iteration"}


def charts(records: Sequence[RunRecord], names: Sequence[str], *, by: str) -> list[Chart]:
    """Make the charts of a report; those without a point are left out when they are rendered."""
    return [
        _loss(records, names, by),
        _simple(records, names, by, name="lr", title="Learning rate", unit="", how="lr"),
        _simple(records, names, by, name="grad_norm", title="Gradient norm", unit="before clipping", how="plain"),
        _simple(records, names, by, name="tokens_per_second", title="Throughput", unit="tokens/s", how="tokens"),
        _efficiency(records, names, by),
        _simple(records, names, by, name="peak_memory_gib", title="Memory", unit="GiB, peak", how="plain"),
    ]


def _efficiency(records: Sequence[RunRecord], names: Sequence[str], by: str) -> Chart:
    """MFU where a run has it: it needs the device's peak; else the rate that it is made of."""
    if any(number(row.get("mfu")) is not None for record in records for row in record.train):
        return _simple(records, names, by, name="mfu", title="MFU", unit="share of the device's peak", how="percent")
    return _simple(records, names, by, name="tflops_per_gpu", title="Model TFLOP/s", unit="per device", how="plain")


def _loss(records: Sequence[RunRecord], names: Sequence[str], by: str) -> Chart:
    """Training loss, raw and smoothed, and validation loss."""
    series: list[Series] = []
    losses, validations = [], []
    alone = len(records) == 1
    for index, (record, name) in enumerate(zip(records, names, strict=True)):
        prefix = "" if alone else f"{name}: "
        losses.append(_values(record.train, "loss"))
        series += _curve(record.train, losses[-1], by=by, label=f"{prefix}train", color=index)
        valid = _values(record.valid, "loss")
        series.append(
            Series(
                label=f"{prefix}validation", color=1 if alone else index, look="points", ys=valid,
                xs=_across(record.valid, by), iterations=_iterations(record.valid),
            )
        )  # fmt: skip
        validations += valid
    shown = loss_range(losses, validations)
    return Chart(
        name="loss", title="Loss", unit="cross-entropy, nats per token", series=series, x_label=AXES[by],
        shown=None if shown is None else Interval(*shown), log_choice=True,
    )  # fmt: skip


def _simple(
    records: Sequence[RunRecord], names: Sequence[str], by: str, *, name: str, title: str, unit: str, how: str
) -> Chart:
    """One field of the training rows, a curve for each run."""
    values = [_values(record.train, name) for record in records]
    series: list[Series] = []
    for index, (record, run) in enumerate(zip(records, names, strict=True)):
        series += _curve(record.train, values[index], by=by, label=run, color=index, noisy=name != "lr")
    finite = sorted(value for run in values for value in run if math.isfinite(value))
    # One spike must not flatten the rest; what is cut off is still told by the cursor.
    usual = finite[int(0.99 * (len(finite) - 1))] if finite else 0.0
    spiky = bool(finite) and finite[-1] > 3 * usual > 0 and finite[0] >= 0
    return Chart(
        name=name, title=title, unit=unit, series=series, x_label=AXES[by], number_format=how,
        shown=Interval(0.0, 1.2 * usual) if spiky else None, log_choice=name == "grad_norm",
    )  # fmt: skip


def _curve(
    rows: Sequence[Row], values: Sequence[float], *, by: str, label: str, color: int, noisy: bool = True
) -> list[Series]:
    """Rows as a curve; many of a noisy field as their average, on the faint rows themselves."""
    window = max(1, round(len(rows) * SMOOTHING_SHARE)) if noisy else 1
    xs, iterations = _across(rows, by), _iterations(rows)
    if window == 1:
        return [Series(label=label, color=color, xs=xs, ys=values, iterations=iterations)]
    row = Series(label=f"{label}, row", color=color, look="faint", xs=xs, ys=values, iterations=iterations)
    averaged = f"{label} (average over about {window} rows)"
    return [row, Series(label=averaged, color=color, xs=xs, ys=smooth(values, window), iterations=iterations)]


def _across(rows: Sequence[Row], by: str) -> list[float]:
    return [number(row.get("consumed_tokens" if by == "tokens" else "iteration")) or 0.0 for row in rows]


def _iterations(rows: Sequence[Row]) -> list[int]:
    return [iteration_of(row) for row in rows]


def _values(rows: Sequence[Row], name: str) -> list[float]:
    values = (number(row.get(name)) for row in rows)
    return [math.nan if value is None else value for value in values]
