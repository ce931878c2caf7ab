"""Look at what a run would stand on, without starting it: ranks, links, devices, clocks; with CONFIG also its run
directory, disk and data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.config.checks import check_config
from megatron_ext.config.load import find_config, load_config
from megatron_ext.config.tree import Config, ParallelConfig
from megatron_ext.errors import EXIT_CODE, ConfigError, MegapintsError
from megatron_ext.parallel.launch import cuda_is_visible, find_launch, launched, set_runtime_environment

if TYPE_CHECKING:
    from megatron_ext.training.preflight import Preflight

EPILOG = """\
examples:
  srun -N4 --ntasks-per-node=8 python tools/preflight.py               nodes, before anything is submitted to them
  srun -N4 --ntasks-per-node=8 python tools/preflight.py pints_1.5b_2k --run_dir /shared/run
  torchrun --nproc-per-node 8 tools/preflight.py --strict
  python tools/preflight.py configs/demo.toml --json

A training run does the same before its first iteration (reliability.preflight), and stops at errors.

exit status: 0 when nothing would stop a run; 1 with --strict when there is a warning; 2 when there is an error.
"""
_STRICT_CODE = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool on this rank; every rank returns the same exit status."""
    arguments, overrides = parse_arguments(argv)
    launcher = None
    try:
        launcher = launched()
        config = None
        if arguments.config is not None:
            config = load_config(find_config(arguments.config), overrides)
            if problems := check_config(config, world_size=launcher.world_size if launcher else 1):
                raise ConfigError(problems)
        set_runtime_environment(cuda=cuda_is_visible())
        return look(config, strict=arguments.strict, as_json=arguments.json)
    except MegapintsError as error:
        if launcher is None or launcher.local_rank == 0:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_CODE


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="preflight.py",
        usage="%(prog)s [--strict] [--json] [CONFIG [--SECTION.FIELD VALUE ...]]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file, or the name of one in configs/")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where there is a warning")
    parser.add_argument("--json", action="store_true", help="print everything measured as one JSON object")
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.config is None:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return arguments, overrides


def look(config: Config | None, *, strict: bool, as_json: bool) -> int:
    """Join all ranks, look, and show it on rank 0. Every rank calls it; returns the exit status."""
    from megatron_ext.data.blend import check_sources
    from megatron_ext.data.tokenizer import Tokenizer
    from megatron_ext.log import setup_logging
    from megatron_ext.parallel import groups
    from megatron_ext.training.preflight import examine

    launch = find_launch()
    setup_logging(rank=launch.rank, world_size=launch.world_size, path=None)
    groups.initialize(ParallelConfig() if config is None else config.parallel, launch, seed=0)
    try:
        if config is not None:
            with groups.together():  # what a run compares when it opens the data
                check_sources(config, Tokenizer.load(config.data.tokenizer))
        seen = examine(launch, config)
        if launch.rank == 0 and as_json:
            print(seen.as_json(), end="", flush=True)
        elif launch.rank == 0:
            show(seen)
        groups.gather_objects(None)  # a launcher ends all ranks at the first that fails: rank 0 has spoken now
    finally:
        groups.destroy()
    if seen.errors():
        return EXIT_CODE
    return _STRICT_CODE if strict and seen.findings else 0


def show(seen: Preflight) -> None:
    """Print the facts as a table, and what to do about each finding."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # Elsewhere than on a terminal rich takes 80 columns and would break every line of a log.
    console.width = console.width if console.is_terminal else 160
    facts = Table("looked at", "found", box=SIMPLE)
    for fact in seen.facts:
        facts.add_row(fact.about, Text(fact.text))
    console.print(facts)
    if not seen.findings:
        console.print(f"Nothing stands against a run ({seen.seconds:.1f} s).")
        return
    findings = Table("", "where", "what", "what to do", box=SIMPLE)
    for finding in sorted(seen.findings, key=lambda finding: finding.level):
        color = "red" if finding.level == "error" else "yellow"
        findings.add_row(Text(finding.level, color), *(Text(text) for text in finding[1:]))
    console.print(findings)
    errors = len(seen.errors())
    console.print(
        f"{errors} of these would stop a run." if errors else "None of these would stop a run.", highlight=False
    )


if __name__ == "__main__":
    sys.exit(main())
