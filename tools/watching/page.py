"""The report of one or more runs as one HTML page. Standard library only; every text of a run is escaped."""

from __future__ import annotations

import re
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tools.watching import curves
from tools.watching.charts import chart_html
from tools.watching.figures import SMOOTHING_SHARE, format_bytes, format_duration, format_lr, format_tokens
from tools.watching.reading import (
    LogLine,
    Row,
    RunRecord,
    details,
    iteration_of,
    number,
    read_log,
    time_of,
    training_seconds,
)
from tools.watching.state import Status, find_status
from tools.watching.timeline import timeline_html

_HERE = Path(__file__).parent
_MOST_NUMBERS = 40
_NOTHING = "–"


class Reported(NamedTuple):
    """A run, as all parts of the page need it."""

    name: str
    record: RunRecord
    status: Status
    log: list[LogLine]


def page_html(records: Sequence[RunRecord], *, by: str, now: float) -> str:
    """Write the whole page.

    Args:
        records: the runs, in the order in which they get their colours.
        by: horizontal axis, "tokens" or "iteration".
        now: time of writing, seconds since the epoch.
    """
    runs = [
        Reported(name, record, find_status(record, label=str(record.folder), now=now), read_log(record.folder))
        for name, record in zip(distinct_names(records), records, strict=True)
    ]
    names = [run.name for run in runs]
    title = ", ".join(names)
    sections = {
        "Summary": _tiles(runs[0]) * (len(runs) == 1) + _warnings(runs) + _summary(runs),
        "Curves": _curves(records, names, by),
        "Time line": timeline_html(records, names) + _each(runs, _events),
        "Data": _each(runs, _data),
        "Configuration": _differences(runs) + _each(runs, _configuration),
        "Provenance": _provenance(runs),
        "Figures": _each(runs, _numbers),
    }
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#{_slug(name)}">{name}</a>' for name in shown)
    body = "".join(
        f'<section aria-labelledby="{_slug(name)}"><h2 id="{_slug(name)}">{name}</h2>\n{content}</section>\n'
        for name, content in shown.items()
    )
    folders = " · ".join(escape(str(run.record.folder.resolve())) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{escape(title)}: training report</title>
<style>
{(_HERE / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p>Training report, written {moment(now)} from {folders}</p>
<nav aria-label="Sections">{links}</nav></header>
<main>
{body}</main>
<script>
{(_HERE / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def distinct_names(records: Sequence[RunRecord]) -> list[str]:
    """Name runs by their folders, or by their paths where two folders have one name."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def moment(seconds: float) -> str:
    """Date and time with the zone of this machine."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))


def _slug(text: str) -> str:
    return text.lower().replace(" ", "-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, numbers: bool = False) -> str:
    """Render a table of plain texts; the first column names each row. `numbers`: the others are right-aligned."""
    kind = ' class="number"' if numbers else ""
    top = "".join(f'<th scope="col"{kind if index else ""}>{escape(cell)}</th>' for index, cell in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _each(runs: Sequence[Reported], part: Callable[[Reported], str]) -> str:
    return "".join(map(part, runs))


def _tiles(run: Reported) -> str:
    """The figures that a single run is asked for first."""
    status = run.status
    last = "" if status.last_iteration is None else f" of {status.last_iteration:,}"
    best = status.best_valid_loss
    tiles = [
        ("State", status.state, status.reason if status.state in ("stopped", "failed") else ""),
        ("Iteration", "" if status.iteration is None else f"{status.iteration:,}", last),
        ("Tokens", _or(status.consumed_tokens, format_tokens), ""),
        ("Training loss", _or(_final_loss(run.record), "{:.4f}".format), "average of the last rows"),
        (
            "Validation loss",
            _or(status.valid_loss, "{:.4f}".format),
            "" if best is None else f"best {best:.4f}",
        ),
        ("Throughput", _or(_median(run.record, "tokens_per_second"), format_tokens), "tokens/s, median"),
        ("MFU", _or(_median(run.record, "mfu"), "{:.1%}".format), "median"),
        ("Restarts", str(len(status.restarts)), _lost(status)),
    ]
    shown = "".join(
        f'<div><dt>{label}</dt><dd class="{escape(text) if label == "State" else "figure"}">{escape(text)}'
        f"<small>{escape(note)}</small></dd></div>\n"
        for label, text, note in tiles
        if text != _NOTHING
    )
    return f'<dl class="tiles">{shown}</dl>\n'


def _or(value: float | None, how: Callable[[float], str]) -> str:
    return _NOTHING if value is None else how(value)


def _lost(status: Status) -> str:
    return f"{format_duration(status.lost_seconds)} lost" if status.lost_seconds >= 1 else ""


def _median(record: RunRecord, name: str) -> float | None:
    """Median over the rows that count: it does not mind the first, slow interval."""
    values = [value for row in record.train if (value := number(row.get(name))) is not None]
    return statistics.median(values) if values else None


def _final_loss(record: RunRecord) -> float | None:
    """Mean of the last rows, as many as the curve is smoothed over."""
    rows = max(1, round(len(record.train) * SMOOTHING_SHARE))
    values = [value for row in record.train[-rows:] if (value := number(row.get("loss"))) is not None]
    return statistics.fmean(values) if values else None


def _warnings(runs: Sequence[Reported]) -> str:
    told = [f"{run.name}: {warning}" for run in runs for warning in run.status.warnings]
    if not told:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in told)
    return f'<div class="warnings" role="note"><b>To look at</b><ul>{items}</ul></div>\n'


def _summary(runs: Sequence[Reported]) -> str:
    columns = [_facts(run) for run in runs]
    rows = [
        [label, *(column[label] or _NOTHING for column in columns)]
        for label in columns[0]
        if any(column[label] for column in columns)
    ]
    return table(["", *(run.name for run in runs)], rows, caption="The runs in figures")


def _facts(run: Reported) -> dict[str, str]:
    """What the summary says of one run; empty where it is not known."""
    record, status = run.record, run.status
    wall, training = status.elapsed_seconds or 0.0, training_seconds(record)
    best = min(
        ((loss, iteration_of(row)) for row in record.valid if (loss := number(row.get("loss"))) is not None),
        default=None,
    )
    speed, device = _median(record, "tokens_per_second"), _median(record, "tokens_per_second_per_gpu")
    tflops, mfu = _median(record, "tflops_per_gpu"), _median(record, "mfu")
    hours = sum(session.seconds * (number(session.start.get("world_size")) or 1) for session in record.sessions) / 3600
    found = status.checkpoint
    final = _final_loss(record)
    progress = "" if status.iteration is None else f"{status.iteration:,}"
    return {
        "State": f"{status.state} ({status.reason})" if status.reason else status.state,
        "Iterations": progress + ("" if status.last_iteration is None else f" of {status.last_iteration:,}"),
        "Tokens": "" if status.consumed_tokens is None else f"{status.consumed_tokens:,.0f}",
        "Parameters": _logged(run.log, r"model: ([\d,]+) parameters"),
        "Training loss, last rows": "" if final is None else f"{final:.4f}",
        "Validation loss, last": "" if status.valid_loss is None else f"{status.valid_loss:.4f}",
        "Validation loss, best": "" if best is None else f"{best[0]:.4f} at iteration {best[1]:,}",
        "First start": moment(time_of(record.rows[0])) if record.rows else "",
        "Wall time": format_duration(wall) if record.rows else "",
        "In iterations": f"{format_duration(training)}, {training / wall:.1%} of wall time" if wall else "",
        "Device-hours": f"{hours:,.4g}" if hours else "",
        "Restarts": f"{len(status.restarts)}" + (f", {_lost(status)}" if _lost(status) else ""),
        "Skipped and rewound": ", ".join(
            f"{len(told)} {word}" for told, word in ((status.skipped, "skipped"), (status.rewinds, "rewound")) if told
        ),
        "Throughput, median": "" if speed is None else f"{speed:,.0f} tokens/s",
        "  per device": "" if device is None else f"{device:,.0f} tokens/s",
        "Model FLOPs, median": "" if tflops is None else f"{tflops:.4g} TFLOP/s per device",
        "MFU, median": "" if mfu is None else f"{mfu:.1%}",
        "Peak memory": "" if status.peak_memory_gib is None else f"{status.peak_memory_gib:.1f} GiB",
        "Machine, newest start": "" if status.device is None else f"{status.world_size} x {status.device}",
        "Newest checkpoint": ""
        if found is None
        else f"iteration {found.iteration:,}, {format_bytes(found.size_bytes)}",
    }


def _logged(log: Sequence[LogLine], pattern: str) -> str:
    """The newest log line's value of a pattern; empty without one."""
    for line in reversed(log):
        if match := re.search(pattern, line.message):
            return match[1]
    return ""


def _curves(records: Sequence[RunRecord], names: Sequence[str], by: str) -> str:
    drawn = "".join(map(chart_html, curves.charts(records, names, by=by)))
    if not drawn:
        return "<p>No training row yet.</p>\n"
    hint = (
        '<p class="hint">Point at a chart to read its figures, drag over a part of the run to see it closer, '
        "double-click to see it whole. With the keyboard: Tab to a chart; arrow keys, + and -, Escape.</p>"
    )
    return f'{hint}\n<div class="charts">{drawn}</div>\n'


def _events(run: Reported) -> str:
    """All rows but those of training and validation, in order."""
    events = [row for row in run.record.rows if row["kind"] not in ("train", "valid")]
    if not events:
        return ""
    begin = time_of(events[0])
    rows = [
        [
            moment(time_of(row)), format_duration(time_of(row) - begin), f"{iteration_of(row):,}", row["kind"],
            details(row),
        ]
        for row in events
    ]  # fmt: skip
    listed = table(["time", "since the start", "iteration", "event", "details"], rows, caption=f"Events of {run.name}")
    return f"<details><summary>{len(rows):,} events of {escape(run.name)}</summary>{listed}</details>\n"


def _data(run: Reported) -> str:
    """What the newest start said about its data."""
    starts = [index for index, line in enumerate(run.log) if re.match(r"\d+ ranks: ", line.message)]
    newest = run.log[starts[-1] :] if starts else run.log
    lines = [line.message.removeprefix("data: ") for line in newest if line.message.startswith("data: ")]
    if not lines:
        return ""
    other = next((line.message for line in newest if line.message.startswith("validation: ")), "")
    told = f"<p>{escape(other)}</p>" if other else ""
    head, *rows = [re.split(r" {2,}", line.strip()) for line in lines]
    if rows and len(head) > 1 and all(len(row) == len(head) for row in rows):
        return table(head, rows, caption=f"Sources of {run.name}", numbers=True) + told
    return f"<pre>{escape(chr(10).join(lines))}</pre>{told}\n"


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """Map section.field to its value as text."""
    flat = {}
    for name, value in config.items():
        for leaf, inner in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{name}.{leaf}" if leaf else name] = str(inner)
    return flat


def _differences(runs: Sequence[Reported]) -> str:
    if len(runs) == 1:
        return ""
    flat = [_flat(run.record.config) for run in runs]
    fields = dict.fromkeys(name for one in flat for name in one)
    rows = [[name, *(one.get(name, _NOTHING) for one in flat)] for name in fields]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return "<p>The configurations are the same.</p>\n"
    return table(["", *(run.name for run in runs)], differing, caption="Where the configurations differ")


def _configuration(run: Reported) -> str:
    try:
        text = (run.record.folder / "config.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return (
        f"<details><summary>config.toml of {escape(run.name)} (of its newest start, defaults included)</summary>"
        f"<pre>{escape(text)}</pre></details>\n"
    )


def _provenance(runs: Sequence[Reported]) -> str:
    """What each run was made with: its newest start's environment.json."""
    columns = []
    for run in runs:
        environment = dict(run.record.environment)
        column = {}
        command = environment.pop("command", None)
        if isinstance(command, list):
            column["command"] = shlex.join(map(str, command))
        for name, value in environment.items():
            if isinstance(value, dict):
                column |= {f"{name}: {key}": str(inner) for key, inner in value.items() if inner is not None}
            elif value is not None:
                column[name.replace("_", " ")] = str(value)
        columns.append(column)
    labels = dict.fromkeys(label for column in columns for label in column)
    if not labels:
        return ""
    rows = [[label, *(column.get(label, _NOTHING) for column in columns)] for label in labels]
    return table(["", *(run.name for run in runs)], rows, caption="Newest start of each run")


def _numbers(run: Reported) -> str:
    """The curves as a table: evenly spaced rows, the last one among them."""
    train = run.record.train
    if not train:
        return ""
    count = min(_MOST_NUMBERS, len(train))
    chosen = [train[(len(train) - 1) * index // max(1, count - 1)] for index in range(count)]
    valid = {iteration_of(row): number(row.get("loss")) for row in run.record.valid}
    rows = [_number_row(row, valid.get(iteration_of(row))) for row in chosen]
    head = ["iteration", "tokens", "training loss", "validation loss", "lr", "grad norm", "tokens/s", "MFU"]
    listed = table(head, rows, caption=f"{count} of {len(train):,} training rows of {run.name}", numbers=True)
    return f"<details><summary>{escape(run.name)}</summary>{listed}</details>\n"


def _number_row(row: Row, valid: float | None) -> list[str]:
    formats: dict[str, Callable[[float], str]] = {
        "loss": "{:.4f}".format, "lr": format_lr, "grad_norm": "{:.3f}".format, "tokens_per_second": "{:,.0f}".format,
        "mfu": "{:.1%}".format,
    }  # fmt: skip
    loss, *rest = (_or(number(row.get(name)), how) for name, how in formats.items())
    tokens = _or(number(row.get("consumed_tokens")), "{:,.0f}".format)
    return [f"{iteration_of(row):,}", tokens, loss, _or(valid, "{:.4f}".format), *rest]
