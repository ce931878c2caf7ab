"""convert_checkpoint.py reshard: start ranks on this machine's CPUs that write a checkpoint in another format."""

from __future__ import annotations

import argparse
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import layout
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.launch import free_port
from tools.new_folder import aside, progress, refuse_existing
from tools.saved_checkpoint import find_checkpoint

_POLL_SECONDS = 0.2
_PASSES = 5
"""Times that the checkpoint's bytes go through: verified, loaded, written; and the new one verified and loaded."""

_RESHARD = """\
A checkpoint whose optimizer's state is dp_reshardable, the default, resumes with any number of data-parallel
ranks, but only at the tensor- and pipeline-parallel sizes that it was saved at. This writes it again as
fully_reshardable, into a new run directory, from which a run goes on in any layout: it starts as many processes on
this machine's CPUs as those sizes make, loads, saves, loads again, and compares. Training at an unchanged layout goes
on bit for bit as from the old one. The other way round, --optimizer-format dp_reshardable makes later saves lighter;
a run does that by itself at its next save, whatever it was resumed from.

Memory: about 20 bytes per parameter over all processes. Checkpoints trained with Transformer Engine are refused, with
the command that does the same on GPUs.
"""


def add_command(commands: Any, *, epilog: str) -> None:
    """Add `reshard` to convert_checkpoint.py's commands."""
    command = commands.add_parser(
        "reshard",
        help="checkpoint -> checkpoint that resumes in any parallel layout",
        description=_RESHARD,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    load = "a run directory (its newest whole checkpoint) or one checkpoints/iter_* directory"
    add("--load", type=Path, required=True, metavar="RUN|ITER", help=load)
    add("--save", type=Path, required=True, metavar="NEW_RUN", help="run directory to make; must not exist")
    formats = ("fully_reshardable", "dp_reshardable")
    add(
        "--optimizer_format",
        "--optimizer-format",
        choices=formats,
        default=formats[0],
        help="default: fully_reshardable",
    )
    command.set_defaults(run=_reshard)


def _reshard(arguments: argparse.Namespace) -> int:
    target: Path = arguments.save
    refuse_existing(target)
    from megatron_ext.training.reshard import reshard_config

    checkpoint = find_checkpoint(arguments.load)
    description = layout.read_description(checkpoint)
    config = reshard_config(checkpoint, description, arguments.optimizer_format)
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    size = sum(file.stat().st_size for file in checkpoint.iterdir() if file.is_file())
    print(f"{checkpoint}: {description.optimizer_format}, {size / 1e6:,.1f} MB; {ranks} processes", flush=True)
    with aside(target) as folder:
        for name in ("config.toml", "skipped.json", "tokenizer"):  # what a run goes on by, besides its checkpoint
            source = layout.run_of(checkpoint) / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            elif source.is_file():
                shutil.copy2(source, folder / name)
        with progress("resharding", _PASSES * size) as advance:
            _run_ranks(
                checkpoint,
                folder / layout.CHECKPOINTS,
                optimizer_format=arguments.optimizer_format,
                num_ranks=ranks,
                on_bytes=advance,
            )
    print(f"{target}: iteration {description.iteration}, {arguments.optimizer_format}; start from it with run_dir")
    return 0


def _run_ranks(
    checkpoint: Path, checkpoints: Path, *, optimizer_format: str, num_ranks: int, on_bytes: Callable[[int], None]
) -> None:
    """Start the ranks, show how far they are, and wait for them.

    Args:
        checkpoint: the directory to write again.
        checkpoints: folder to write the new one into.
        optimizer_format: of the new one.
        num_ranks: its tensor-parallel times its pipeline-parallel size.
        on_bytes: called with bytes that the ranks have read and written since; Linux only.

    Raises:
        CheckpointError: a rank failed; it has said why.
    """
    port = free_port()
    # An empty list of devices: the ranks meet over gloo, and may be more than this machine has GPUs.
    command = [
        "env",
        "CUDA_VISIBLE_DEVICES=",
        sys.executable,
        str(Path(__file__).with_name("reshard_rank.py").resolve()),
    ]
    command += ["--load", str(checkpoint), "--save", str(checkpoints), "--optimizer-format", optimizer_format]
    built, building = os.pipe()  # its other end is closed by rank 0 once the model is built; before, imports are read
    command += ["--building", str(building), "--world-size", str(num_ranks), "--port", str(port)]
    ranks = [subprocess.Popen([*command, "--rank", str(rank)], pass_fds=[building]) for rank in range(num_ranks)]
    os.close(building)
    done: int | None = None
    try:
        while all(rank.poll() in (None, 0) for rank in ranks) and any(rank.poll() is None for rank in ranks):
            time.sleep(_POLL_SECONDS)
            if done is not None:
                now = max(done, _bytes_moved(ranks))
                on_bytes(now - done)
                done = now
            elif select.select([built], [], [], 0)[0]:
                done = _bytes_moved(ranks)
    finally:
        os.close(built)
        for rank in ranks:
            if rank.poll() is None and any(other.poll() for other in ranks):
                _let_end(rank)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
    codes = [rank.returncode for rank in ranks]
    if any(codes):
        bad = next(code for code in codes if code)
        why = f"was ended by signal {-bad}; is there too little memory?" if bad < 0 else "failed, see above"
        raise CheckpointError(f"{checkpoint}: could not be written again: rank {codes.index(bad)} {why}.")


def _let_end(rank: subprocess.Popen[bytes]) -> None:
    try:
        rank.wait(timeout=5)
    except subprocess.TimeoutExpired:
        rank.kill()


def _bytes_moved(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Add up what the ranks have read and written; 0 where the system does not tell."""
    total = 0
    for rank in ranks:
        try:
            fields = dict(line.split(": ") for line in Path(f"/proc/{rank.pid}/io").read_text().splitlines())
        except OSError:
            continue
        total += int(fields["rchar"]) + int(fields["wchar"])
    return total
