"""Draw loss, learning rate and throughput of one or more runs into a PNG."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.watching import reading
from tools.watching.figures import SMOOTHING_SHARE, format_lr, format_tokens, loss_range, smooth
from tools.watching.reading import metrics_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPILOG = """\
examples:
  python tools/plot_run.py runs/demo                        writes runs/demo/plot.png
  python tools/plot_run.py runs/a runs/b --output ab.png    two runs overlaid
  python tools/plot_run.py runs/a runs/b --x iteration      by iteration instead of tokens

RUN is a run directory, or a metrics.jsonl. A run that was interrupted and resumed is drawn as it went
on: what came after the checkpoint it resumed from is left out.
"""
# Okabe and Ito's palette: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        runs = [read_run(path) for path in arguments.runs]
        output = arguments.output or default_output(arguments.runs)
        figure = draw(runs, by=arguments.x, smoothing=arguments.smoothing)
        write_png(figure, output)
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(output)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory or metrics.jsonl")
    parser.add_argument("--output", metavar="PNG", type=Path, help="file to write (default: plot.png in the only RUN)")
    parser.add_argument(
        "--x", choices=("tokens", "iteration"), default="tokens", help="horizontal axis (default: tokens)"
    )
    parser.add_argument(
        "--smoothing",
        metavar="ROWS",
        type=_positive,
        help="rows that the training loss is averaged over; 1: no smoothing (default: 2%% of a run's rows)",
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def default_output(runs: Sequence[Path]) -> Path:
    """plot.png beside the metrics of a single run; several runs have no obvious place."""
    if len(runs) > 1:
        raise DataError("--output: several runs are drawn, so say which file to write, as in --output ab.png")
    return metrics_path(runs[0]).with_name("plot.png")


class Validation(NamedTuple):
    """One validation row."""

    iteration: int
    tokens: float
    loss: float


@dataclass(kw_only=True)
class Run:
    """What is drawn of one run; the lists of training rows run in parallel."""

    name: str
    iterations: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    """Tokens consumed so far."""
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    mfus: list[float] = field(default_factory=list)
    """Only of rows that have one."""
    validations: list[Validation] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Read what is drawn of a run.

    Raises:
        DataError: there is no metrics file, no training row yet, or a row is not one of a run.
    """
    metrics = metrics_path(path)
    record = reading.read_run(path)
    for line in record.damaged:
        print(f"note: {metrics}:{line}: left out, because a crash cut the line short", file=sys.stderr)
    if not record.train:
        raise DataError(f"{metrics}: no training row yet; draw it once the run has logged its first interval")
    run = Run(name=record.name)
    try:
        for row in record.train:
            run.iterations.append(row["iteration"])
            run.tokens.append(row["consumed_tokens"])
            run.losses.append(_number(row["loss"]))
            run.lrs.append(_number(row["lr"]))
            run.tokens_per_second.append(_number(row["tokens_per_second"]))
            if row.get("mfu") is not None:
                run.mfus.append(row["mfu"])
        # Validation rows count samples only; a sample has the same number of tokens throughout a run.
        tokens_per_sample = record.train[-1]["consumed_tokens"] / record.train[-1]["consumed_samples"]
        for row in record.valid:
            tokens = row["consumed_samples"] * tokens_per_sample
            run.validations.append(Validation(row["iteration"], tokens, _number(row["loss"])))
    except KeyError as error:
        raise DataError(f"{metrics}: a row has no {error}; was it written by pretrain_pints.py?") from None
    return run


def _number(value: float | None) -> float:
    """A value that was not finite may be stored as null: draw a gap."""
    return math.nan if value is None else float(value)


def draw(runs: Sequence[Run], *, by: str, smoothing: int | None) -> Figure:
    """Lay out three panels over one horizontal axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "axes.axisbelow": True,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure, (loss, lr, speed) = pyplot.subplots(
            3, 1, sharex=True, figsize=(10, 9), height_ratios=(3, 1, 1.2), layout="constrained"
        )
        for index, run in enumerate(runs):
            color = COLORS[index % len(COLORS)]
            x = run.tokens if by == "tokens" else run.iterations
            draw_loss(loss, run, x, by=by, color=color, smoothing=smoothing, alone=len(runs) == 1)
            lr.plot(x, run.lrs, color=color, linewidth=1.6)
            draw_speed(speed, run, x, color=color, alone=len(runs) == 1)
        shown = loss_range([run.losses for run in runs], [point.loss for run in runs for point in run.validations])
        if shown is not None:
            loss.set_ylim(shown)
        figure.suptitle(", ".join(run.name for run in runs), fontsize=13, fontweight="bold")
        loss.set(title="Loss", ylabel="cross-entropy (nats per token)")
        loss.legend(loc="upper right", framealpha=1)
        lr.set(title="Learning rate", ylabel="lr", ylim=(0, None))
        lr.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: format_lr(value)))
        speed.set(title="Throughput", ylabel="tokens/s", ylim=(0, None))
        speed.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        # Above the panel: a steady rate leaves no corner free.
        speed.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=min(2, len(runs)))
        speed.set_xlabel("training tokens" if by == "tokens" else "iteration")
        if by == "tokens":
            # Language models are counted in billions (B), not in giga.
            speed.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: format_tokens(value)))
        speed.set_xlim(left=0)
        figure.align_ylabels()
    return figure


def draw_loss(
    axes: Axes, run: Run, x: Sequence[float], *, by: str, color: str, smoothing: int | None, alone: bool
) -> None:
    """Draw the raw training loss faintly, its average on it, and the validations as points."""
    rows = smoothing or max(1, round(len(x) * SMOOTHING_SHARE))
    prefix = "" if alone else f"{run.name}: "
    if rows > 1:
        axes.plot(x, run.losses, color=color, alpha=0.25, linewidth=0.8)
    averaged = f"{prefix}train" + (f" (average over about {rows} rows)" if rows > 1 and alone else "")
    axes.plot(x, smooth(run.losses, rows), color=color, linewidth=1.8, label=averaged)
    if run.validations:
        last = run.validations[-1]
        points = [point.tokens if by == "tokens" else point.iteration for point in run.validations]
        axes.plot(
            points,
            [point.loss for point in run.validations],
            color="#D55E00" if alone else color,
            linestyle="--",
            linewidth=1,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=f"{prefix}validation (last {last.loss:.3f})",
        )


def draw_speed(axes: Axes, run: Run, x: Sequence[float], *, color: str, alone: bool) -> None:
    """Draw tokens per second, with the median in the legend: it does not mind the first, slow interval."""
    finite = [value for value in run.tokens_per_second if math.isfinite(value)]
    label = "" if alone else f"{run.name}: "
    if finite:
        label += f"median {format_tokens(statistics.median(finite))} tokens/s"
    if run.mfus:
        label += f", MFU {100 * statistics.median(run.mfus):.1f} %"
    axes.plot(x, run.tokens_per_second, color=color, linewidth=1.2, label=label or None)


def write_png(figure: Figure, path: Path) -> None:
    """Write the picture aside and rename it, so that a viewer never meets half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as stream:
            figure.savefig(stream, format="png", dpi=130)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another --output") from None


if __name__ == "__main__":
    raise SystemExit(main())
