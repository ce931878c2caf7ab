"""When runs trained, paused and saved: a lane for each, as inline SVG. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tools.watching.charts import COLORS, SIZE
from tools.watching.figures import format_duration
from tools.watching.reading import RunRecord, iteration_of, time_of

_TICKS = 4
_HINT = (
    "A bar is a session, a gap the time between two. Thin lines in a bar are checkpoints. A tall mark ends a session "
    "that stopped; a red one, a session that ended without a word."
)


def timeline_html(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Draw the lanes over one axis, each from its own first start; empty without any session."""
    spans = [time_of(record.rows[-1]) - time_of(record.sessions[0].start) for record in records if record.sessions]
    if not spans:
        return ""
    longest = max(max(spans), 1e-3)
    lanes = "".join(
        f'<b>{escape(name)}</b><svg viewBox="0 0 {SIZE} 30" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(_describe(record, name))}">{_lane(record, index, longest)}</svg>'
        for index, (record, name) in enumerate(zip(records, names, strict=True))
        if record.sessions
    )
    labels = "".join(
        f'<span style="left:{100 * tick / _TICKS:g}%">{format_duration(longest * tick / _TICKS)}</span>'
        for tick in range(_TICKS + 1)
    )
    return f'<p class="key-text">{_HINT}</p><div class="lane">{lanes}<div class="times">{labels}</div></div>\n'


def _describe(record: RunRecord, name: str) -> str:
    sessions = len(record.sessions)
    saved = len(record.of_kind("checkpoint"))
    return f"{name}: {sessions} {'session' if sessions == 1 else 'sessions'}, {saved} checkpoints saved"


def _lane(record: RunRecord, index: int, longest: float) -> str:
    begin = time_of(record.sessions[0].start)

    def place(seconds: float) -> float:
        return SIZE * (seconds - begin) / longest

    parts = []
    for number, session in enumerate(record.sessions, start=1):
        left, right = place(time_of(session.start)), place(time_of(session.last))
        ended = session.stop is not None or number == len(record.sessions)
        why = "" if session.stop is None else f", {session.stop.get('reason', '')}"
        title = (
            f"session {number}: iterations {iteration_of(session.start):,} to {iteration_of(session.last):,}, "
            f"{format_duration(session.seconds)}{why if ended else ', ended without a word'}"
        )
        parts.append(
            f'<rect x="{left:.2f}" y="5" width="{max(1.0, right - left):.2f}" height="20" '
            f'style="fill:var(--series-{index % COLORS})"><title>{escape(title)}</title></rect>'
        )
        if session.stop is not None or not ended:
            mark = "stop-mark" if ended else "killed-mark"
            parts.append(f'<path class="{mark}" d="M{right:.2f} 2V28"/>')
    saved = "".join(f"M{place(time_of(row)):.2f} 5V25" for row in record.of_kind("checkpoint"))
    return "".join(parts) + (f'<path class="checkpoint-mark" d="{saved}"/>' if saved else "")
