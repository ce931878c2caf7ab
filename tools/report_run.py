"""Write one HTML file about one or more runs: figures, curves, restarts, data, configuration, versions."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.durable import write_whole
from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.watching.curves import AXES
from tools.watching.page import page_html
from tools.watching.reading import metrics_path, read_run

EPILOG = """\
examples:
  python tools/report_run.py runs/demo                          writes runs/demo/report.html
  python tools/report_run.py runs/a runs/b --output ab.html     two runs, their curves overlaid
  python tools/report_run.py runs/a runs/b --x iteration --output ab.html

The file needs nothing besides itself: no network, no server. Send it, print it, keep it. It follows the
browser's light or dark scheme. A run that is still going on is reported as far as it has come; write
again for a newer report. A run that was interrupted and resumed is drawn as it went on: what came after
the checkpoint it resumed from is left out of the curves, and stands in the time line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        output = arguments.output or default_output(arguments.runs)
        records = [read_run(run) for run in arguments.runs]
        page = page_html(records, by=arguments.x, now=time.time())
        write(page, output)
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
    parser.add_argument(
        "--output", metavar="HTML", type=Path, help="file to write (default: report.html in the only RUN)"
    )
    parser.add_argument("--x", choices=tuple(AXES), default="tokens", help="horizontal axis (default: tokens)")
    return parser.parse_args(argv)


def default_output(runs: Sequence[Path]) -> Path:
    """report.html beside the metrics of a single run; several runs have no obvious place."""
    if len(runs) > 1:
        raise DataError("--output: several runs are reported, so say which file to write, as in --output ab.html")
    return metrics_path(runs[0]).with_name("report.html")


def write(page: str, path: Path) -> None:
    """Write the file whole, or leave what was there."""
    try:
        write_whole(path, page)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); choose another --output") from None


if __name__ == "__main__":
    raise SystemExit(main())
