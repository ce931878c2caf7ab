"""Say which rank a hung run waits for, from what each rank said of itself last. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """One rank of a run that does not go on."""

    rank: int
    node: str
    pid: int
    state: Literal["here", "silent", "lost", "left"]
    """here: it still tells; silent: its process or machine is stopped; lost: its process has ended; left: done."""
    iteration: int = 0
    """The one it is in, or after."""
    phase: str = ""
    seconds: float = 0.0
    """Since it came to this phase of this iteration."""
    waits: bool = False
    """In a collective, or for the device: not with work of its own."""
    where: str = ""
    silent_seconds: float = 0.0
    why: str = ""
    """What it said when it ended."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.node}, pid {self.pid})"


@dataclass(frozen=True, kw_only=True, slots=True)
class HangReport:
    """What is known of a hang."""

    verdict: str
    """One line: the ranks that are waited for, what they do, and who waits where."""
    culprits: tuple[int, ...]
    """The ranks that are waited for; empty where none stands out."""
    table: tuple[str, ...]
    """A line for each group of ranks that stand at the same place."""
    ranks: tuple[RankReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Give all of it as JSON values."""
        return asdict(self)


def diagnose(reports: Sequence[RankReport]) -> HangReport:
    """Find the ranks that the others wait for: those gone or silent, else not in a collective, else behind."""
    here = [report for report in reports if report.state == "here"]
    culprits, waiting = _find_culprits(reports, here)
    if culprits:
        verdict = "; ".join(_accuse(report) for report in culprits[:4])
        if len(culprits) > 4:
            verdict += f"; and {len(culprits) - 4} more ranks"
    else:
        verdict = "every rank waits, and none is behind: they call collectives in another order, or a link has failed"
    if waiting:
        verdict += f"; {_waiting(waiting)}"
    return HangReport(
        verdict=verdict,
        culprits=tuple(report.rank for report in culprits),
        table=tuple(_table(reports)),
        ranks=tuple(reports),
    )


def _find_culprits(
    reports: Sequence[RankReport], here: Sequence[RankReport]
) -> tuple[list[RankReport], list[RankReport]]:
    """Return those who are waited for, and those who wait."""
    gone = [report for report in reports if report.state in ("lost", "silent")]
    if gone:
        return gone, [report for report in here if report.waits]
    busy = [report for report in here if not report.waits]
    if busy:
        return busy, [report for report in here if report.waits]
    newest = max((report.iteration for report in here), default=0)
    behind = [report for report in here if report.iteration < newest]
    if behind:
        return behind, [report for report in here if report.iteration == newest]
    places = Counter(_collective(report) for report in here)
    common, times = places.most_common(1)[0] if places else ("", 0)
    # A half is no majority, and in a pipeline each stage waits at a place of its own.
    if len(here) - times == 1 and times > 1:
        return [report for report in here if _collective(report) != common], [
            report for report in here if _collective(report) == common
        ]
    return [], list(here)


def _collective(report: RankReport) -> str:
    return report.where


def _accuse(report: RankReport) -> str:
    if report.state == "lost":
        return f"{report.name} is gone: {report.why}{_last_known(report)}"
    if report.state == "silent":
        return (
            f"{report.name} has not been heard of for {report.silent_seconds:.0f} s: its process or its machine is "
            f"stopped{_last_known(report)}"
        )
    return f"{report.name} is in {_place(report)} for {report.seconds:.0f} s: {report.where}"


def _last_known(report: RankReport) -> str:
    return f" (last seen in {_place(report)}: {report.where})" if report.where else ""


def _waiting(reports: Sequence[RankReport]) -> str:
    places = Counter(report.where for report in reports)
    parts = []
    for where, _ in places.most_common(3):
        ranks = [report.rank for report in reports if report.where == where]
        parts.append(f"{name_ranks(ranks)} wait{'s' if len(ranks) == 1 else ''} in {where}")
    if len(places) > 3:
        parts.append(f"{len(places) - 3} more places in the table")
    return "; ".join(parts)


def _place(report: RankReport) -> str:
    if not report.phase:
        return "its start"
    return f"iteration {report.iteration}" if report.phase == "iteration" else f"{report.phase} ({report.iteration})"


def _table(reports: Sequence[RankReport]) -> Iterable[str]:
    groups: dict[tuple[Any, ...], list[RankReport]] = {}
    for report in reports:
        groups.setdefault((report.state, report.iteration, report.phase, report.where), []).append(report)
    for (state, _, _, where), members in groups.items():
        what = {"here": "", "silent": "silent, ", "lost": "gone, ", "left": "left, "}[state]
        longest = max(report.seconds for report in members)
        yield f"{name_ranks([m.rank for m in members])}: {what}{_place(members[0])}, {longest:.1f} s: {where or '-'}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Write rank numbers, in order, as `rank 3` or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"
