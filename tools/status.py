"""Show how runs are getting on: progress, loss, speed, restarts, checkpoints. Reads the run directory alone."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, MegapintsError
from tools.watching.figures import format_bytes, format_duration, format_lr, format_tokens, sparkline
from tools.watching.state import Status, Watched

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EPILOG = """\
examples:
  python tools/status.py runs/demo             a screen that refreshes; Ctrl-C leaves it, the run goes on
  python tools/status.py runs/demo --once      print it once (as it does wherever there is no terminal)
  python tools/status.py runs/*                a line for each run
  python tools/status.py runs/demo --json      a JSON object, on a line of its own for each run

RUN is a run directory. Nothing is asked of the run itself: this works on another machine that sees the
directory, and after the run has ended. A run is "stalled" when its metrics have had no new row for three
times the longest pause between rows so far, and for a minute at least.
"""
_COLORS = {
    "running": "green",
    "finished": "green",
    "starting": "yellow",
    "stopped": "yellow",
    "stalled": "red",
    "failed": "red",
}
_SPARKLINE_WIDTH = 40
_LISTED = 5
"""Restarts, skips and rewinds told one by one; of more, the newest."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? for the sparkline
    try:
        watched = [Watched(path) for path in arguments.runs]
        if arguments.json:
            for run in watched:
                print(json.dumps(as_json(run.look(time.time()))))
        elif arguments.once or not sys.stdout.isatty():
            print_once([run.look(time.time()) for run in watched])
        else:
            refresh(watched, seconds=arguments.interval)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python must not try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="print the state once, and leave")
    how.add_argument("--json", action="store_true", help="print the state once, for programs")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=5.0, help="time between refreshes (default: 5)"
    )
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, 0.1 or more")
    return seconds


def as_json(status: Status) -> dict[str, Any]:
    """The status as JSON has it; times are seconds since the epoch."""
    values = {field.name: getattr(status, field.name) for field in fields(status)}
    values["progress"] = status.progress
    values["restarts"] = [restart._asdict() for restart in status.restarts]
    values["checkpoint"] = None if status.checkpoint is None else status.checkpoint._asdict()
    return values


class Fact(NamedTuple):
    """One line of the screen."""

    label: str
    text: str
    style: str = ""


def facts(status: Status) -> list[Fact]:
    """Say all that is known, in the order in which a person asks."""
    found = [
        Fact("state", _state(status), f"bold {_COLORS.get(status.state, 'white')}"),
        Fact("progress", _progress(status)),
        Fact("loss", _loss(status)),
        Fact("validation", _validation(status)),
        Fact("learning rate", "" if status.lr is None else format_lr(status.lr)),
        Fact("grad norm", "" if status.grad_norm is None else f"{status.grad_norm:.3f}"),
        Fact("throughput", _throughput(status)),
        Fact("MFU", _mfu(status)),
        Fact("memory", "" if status.peak_memory_gib is None else f"{status.peak_memory_gib:.1f} GiB at the peak"),
        Fact("machine", "" if status.device is None else f"{status.world_size} x {status.device}"),
        Fact("checkpoint", _checkpoint(status)),
        Fact("restarts", _restarts(status)),
    ]
    for restart in status.restarts[-_LISTED:]:
        again = f", {restart.redone_iterations:,} iterations done again" if restart.redone_iterations else ""
        found.append(
            Fact("", f"{_clock(restart.time)} at iteration {restart.iteration:,}: {restart.reason}{again}", "dim")
        )
    for label, told in (("rewound", status.rewinds), ("skipped", status.skipped)):
        if len(told) > _LISTED:
            found.append(Fact(label, f"{len(told)} times; the last:"))
            label = ""
        for entry in told[-_LISTED:]:
            found.append(Fact(label, entry, "yellow"))
            label = ""
    found += [Fact("warning", warning, "bold red") for warning in status.warnings]
    return [fact for fact in found if fact.text]


def _state(status: Status) -> str:
    text = status.state
    if status.since is not None:
        text += f" since {_clock(status.since)}"
    return f"{text} ({status.reason})" if status.reason else text


def _clock(moment: float) -> str:
    """Date and time of this machine's zone; today's without the date."""
    then = time.localtime(moment)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", then)


def _progress(status: Status) -> str:
    if status.iteration is None:
        return ""
    of = "" if status.last_iteration is None else f" of {status.last_iteration:,}"
    parts = [f"iteration {status.iteration:,}{of}"]
    if status.progress is not None:
        parts.append(f"{status.progress:.1%}")
    if status.consumed_tokens is not None:
        parts.append(f"{format_tokens(status.consumed_tokens)} tokens")
    if status.elapsed_seconds is not None:
        parts.append(f"after {format_duration(status.elapsed_seconds)}")
    if status.eta_seconds is not None:
        parts.append(f"ETA {format_duration(status.eta_seconds)} ({_clock(time.time() + status.eta_seconds)})")
    return ", ".join(parts)


def _loss(status: Status) -> str:
    if status.loss is None:
        return ""
    text = f"{status.loss:.4f}"
    if status.loss_change is not None:
        text += f" ({status.loss_change:+.4f} over {status.loss_change_iterations:,} iterations)"
    losses = [math.nan if loss is None else loss for loss in status.recent_losses]
    return f"{text}  {sparkline(losses, _SPARKLINE_WIDTH)}"


def _validation(status: Status) -> str:
    if status.valid_loss is None:
        return ""
    text = f"{status.valid_loss:.4f} at iteration {status.valid_iteration:,}"
    best = status.best_valid_loss
    return f"{text}, best {best:.4f}" if best is not None and best < status.valid_loss else text


def _throughput(status: Status) -> str:
    parts = []
    if status.tokens_per_second is not None:
        parts.append(f"{format_tokens(status.tokens_per_second)} tokens/s")
    if status.tokens_per_second_per_gpu is not None and (status.world_size or 1) > 1:
        parts.append(f"{format_tokens(status.tokens_per_second_per_gpu)} per device")
    if status.iteration_seconds is not None:
        parts.append(f"{status.iteration_seconds:.3g} s per iteration")
    return ", ".join(parts)


def _mfu(status: Status) -> str:
    parts = [] if status.mfu is None else [f"{status.mfu:.1%}"]
    if status.tflops_per_gpu is not None:
        parts.append(f"{status.tflops_per_gpu:.3g} TFLOP/s per device")
    return ", ".join(parts)


def _checkpoint(status: Status) -> str:
    saving = "" if status.being_saved is None else f"{status.being_saved} is being written"
    if status.checkpoint is None:
        return saving or ("none yet" if status.iteration is not None else "")
    found = status.checkpoint
    age, size = format_duration(found.age_seconds), format_bytes(found.size_bytes)
    text = f"iteration {found.iteration:,}, {age} old, {size}"
    return f"{text}; {saving}" if saving else text


def _restarts(status: Status) -> str:
    if status.iteration is None:
        return ""
    lost = f", {format_duration(status.lost_seconds)} lost" if status.lost_seconds >= 1 else ""
    more = f"; the last {_LISTED}:" if len(status.restarts) > _LISTED else ""
    return f"{len(status.restarts)}{lost}{more}" if status.restarts else "none"


COLUMNS = ("run", "state", "iteration", "done", "ETA", "loss", "validation", "tokens/s", "MFU", "restarts", "warnings")


def table_cells(statuses: Sequence[Status]) -> list[list[str]]:
    """Each status as one line of a table, in the order of COLUMNS; a run goes by its folder's name where that does."""
    names = [status.name for status in statuses]
    if len(set(names)) < len(names):
        names = [status.run for status in statuses]
    return [[name, *_cells(status)] for name, status in zip(names, statuses, strict=True)]


def _cells(status: Status) -> list[str]:
    return [
        status.state,
        "-" if status.iteration is None else f"{status.iteration:,}",
        "-" if status.progress is None else f"{status.progress:.1%}",
        "-" if status.eta_seconds is None else format_duration(status.eta_seconds),
        "-" if status.loss is None else f"{status.loss:.4f}",
        "-" if status.valid_loss is None else f"{status.valid_loss:.4f}",
        "-" if status.tokens_per_second is None else format_tokens(status.tokens_per_second),
        "-" if status.mfu is None else f"{status.mfu:.1%}",
        str(len(status.restarts)),
        str(len(status.warnings)) if status.warnings else "-",
    ]


def print_once(statuses: Sequence[Status]) -> None:
    """Print the state: as the screen would show it on a terminal, in plain lines anywhere else."""
    if sys.stdout.isatty():
        _console().print(screen(statuses))
        return
    if len(statuses) == 1:
        lines: list[Sequence[str]] = [(fact.label, fact.text) for fact in facts(statuses[0])]
    else:
        lines = [COLUMNS, *table_cells(statuses)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def refresh(watched: Sequence[Watched], *, seconds: float) -> None:
    """Show the state until Ctrl-C; the last one stays on the terminal."""
    from rich.live import Live

    console = _console()
    statuses: list[Status] = []
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                statuses = [run.look(time.time()) for run in watched]
                live.update(screen(statuses), refresh=True)
                time.sleep(seconds)
    except KeyboardInterrupt:
        if statuses:
            console.print(screen(statuses))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def screen(statuses: Sequence[Status]) -> RenderableType:
    """Lay the state out: all facts of a single run, a line for each of several."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if len(statuses) == 1:
        return _panel(statuses[0])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=name != "run")
    for run, state, *rest in table_cells(statuses):
        table.add_row(Text(run, "bold"), Text(state, _COLORS.get(state, "")), *map(Text, rest))
    return table


def _panel(status: Status) -> RenderableType:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in facts(status):
        grid.add_row(Text(fact.label), Text(fact.text, fact.style))
    rows = Table.grid(expand=True)
    if status.progress is not None:
        rows.add_row(ProgressBar(total=1.0, completed=status.progress, complete_style=_COLORS.get(status.state, "")))
    rows.add_row(grid)
    return Panel(rows, title=Text(status.name, "bold"), title_align="left", border_style="dim")


if __name__ == "__main__":
    raise SystemExit(main())
