#!/usr/bin/env python3
"""Check the data of a configuration and build its index caches, before a run that would have all ranks wait for it."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, ConfigError, MegapintsError
from tools.progress import Progress

if TYPE_CHECKING:
    from megatron_ext.config.tree import Config
    from megatron_ext.data.blend import DataSplits, Opened

EPILOG = """\
One process on one CPU, without a GPU: a login node will do. Every source is opened as the run opens it, so whatever
the run would refuse is refused here: missing or cut files, another tokenizer, too little data, too many passes. The
run finds the caches where it would have built them; it must see the files under the same path, and give the same
data, train.seed and train.seq_length. The number of iterations, of ranks, and the weights do not matter.

With data.sample_index "lazy" there is nothing to build; the sources are checked and the table is printed all the same.

examples:
  python tools/prepare_data_cache.py pints_1.5b_2k
  python tools/prepare_data_cache.py my.toml --data.path_to_cache /shared/cache --train.seed 7
"""


class _Reporter:
    """Says of each part of a source what was done for it, with the time that is left."""

    def __init__(self, config: Config) -> None:
        from megatron_ext.data.blend import parts_of

        prefixes = [prefix for part in parts_of(config) if part is not None for prefix in part.prefixes]
        self._bytes = {prefix: Path(f"{prefix}.idx").stat().st_size for prefix in prefixes}
        # The work is in proportion to the index.
        self._progress = Progress(sum(self._bytes[prefix] for prefix in prefixes), stream=sys.stderr)
        self._began = time.monotonic()

    def tell(self, opened: Opened) -> None:
        """Print a line for one part of a source."""
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        what = "nothing to build"
        if opened.cache is not None:
            size = sum(file.stat().st_size for file in opened.cache.iterdir()) / 1e6
            done = f"built in {seconds:.1f} s" if opened.built else "already there"
            what = f"{done}: {size:,.1f} MB in {opened.cache}"
        self._progress.note(f"{opened.prefix} ({opened.part}): {what}")
        self._progress.update(self._bytes[opened.prefix], documents=0)

    def close(self) -> None:
        """Leave the live line."""
        self._progress.close()


def prepare(config: Config) -> None:
    """Check all sources, build the caches that are missing, and print what the run will read.

    Raises:
        MegapintsError: the run could not start with this data.
    """
    from megatron_ext.config.checks import check_config
    from megatron_ext.data.blend import check_sources, open_samples
    from megatron_ext.data.tokenizer import Tokenizer

    if problems := check_config(config, world_size=None):
        raise ConfigError(problems)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    check_sources(config, tokenizer)
    reporter = _Reporter(config)
    with warnings.catch_warnings():
        # Importing megatron-core tells in a dozen warnings that accelerators are absent, which no index needs.
        warnings.simplefilter("ignore")
        splits = open_samples(config, tokenizer, builds=True, on_open=reporter.tell)
    reporter.close()
    report(config, splits)


def report(config: Config, splits: DataSplits) -> None:
    """Print the table of sources.

    Raises:
        ConfigError: the run would refuse the passes that it makes.
    """
    from megatron_ext.data import usage
    from megatron_ext.training.describe import table

    uses = usage.uses_of(config, splits.train.prefixes, splits.train.blend)
    print("\n".join(table(usage.rows(uses, seq_length=config.train.seq_length), usage.ALIGNMENT)))
    if splits.valid is not None:
        print(f"validation: {splits.valid.size:,} samples")
    for warning in usage.warnings(uses):
        print(f"warning: {warning}", file=sys.stderr)
    if problems := usage.problems(config, uses):
        raise ConfigError(problems)
    if config.data.sample_index == "lazy":
        print('data.sample_index is "lazy": samples are computed, and the run builds nothing.')
    else:
        print("all index caches are there; the run will build nothing.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_data_cache.py",
        usage="%(prog)s CONFIG [--SECTION.FIELD VALUE ...]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a TOML file, or the name of one in configs/")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="as pretrain_pints.py takes them")
    arguments = parser.parse_args(argv)
    try:
        from megatron_ext.config.load import find_config, load_config

        prepare(load_config(find_config(arguments.config), arguments.overrides))
    except (MegapintsError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
