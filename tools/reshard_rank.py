#!/usr/bin/env python3
"""One rank of `convert_checkpoint.py reshard`, which starts it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, MegapintsError
from megatron_ext.parallel.launch import Launch


def main(argv: Sequence[str] | None = None) -> int:
    """Be one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--optimizer-format", required=True)  # convert_checkpoint.py has checked it
    for name in ("--rank", "--world-size", "--port", "--building"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # megatron-core announces each optional package that it does without
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_ext").setLevel(logging.INFO if arguments.rank == 0 else logging.ERROR)
    import torch

    from megatron_ext.training.reshard import reshard

    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.world_size))
    launch = Launch(
        rank=arguments.rank,
        world_size=arguments.world_size,
        local_rank=arguments.rank,
        local_world_size=arguments.world_size,
        master_addr="127.0.0.1",
        master_port=arguments.port,
        launcher="bare",
    )
    try:
        reshard(
            arguments.load,
            arguments.save,
            optimizer_format=arguments.optimizer_format,
            launch=launch,
            on_built=lambda: os.close(arguments.building),
        )
    except MegapintsError as error:
        if arguments.rank == 0 or not error.everywhere:
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr, flush=True)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
