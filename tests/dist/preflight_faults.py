"""Start a program of ours with faults planted in its surroundings: FAULT[,FAULT …] PROGRAM ARGUMENT …

Ranks are told apart by RANK, as torchrun sets it. Not a test itself: test_preflight.py runs it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

RANK = int(os.environ["RANK"])


def elsewhere() -> None:
    """Rank 1 starts in another folder, so a relative run directory is not that of the others."""
    if RANK == 1:
        os.chdir(tempfile.mkdtemp())


def small_disk() -> None:
    """The run directory's disk has 100 kB left."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)


def own_nodes() -> None:
    """Each rank is on a node of its own."""
    from megatron_ext.parallel import probe

    probe.node_name = lambda launch: f"n{launch.rank}"


def slow_device() -> None:
    """The device of rank 1 is slow."""
    import torch

    plain = torch.mm

    def late(*arguments, **keywords):
        time.sleep(0.02)
        return plain(*arguments, **keywords)

    if RANK == 1:
        torch.mm = late


def slow_card() -> None:
    """Whatever rank 2 exchanges with another takes long."""
    import torch.distributed as dist

    plain = dist.batch_isend_irecv

    def late(operations):
        time.sleep(0.05)
        return plain(operations)

    if RANK == 2:
        dist.batch_isend_irecv = late


def fast_clock() -> None:
    """The clock of rank 1 is 100 s ahead."""
    plain = time.time
    if RANK == 1:
        time.time = lambda: plain() + 100.0


def other_torch() -> None:
    """Rank 2 has another torch."""
    from importlib import metadata

    plain = metadata.version
    if RANK == 2:
        metadata.version = lambda name: "1.0" if name == "torch" else plain(name)


if __name__ == "__main__":  # saving starts processes, which import this file
    for fault in sys.argv[1].split(","):
        globals()[fault]()
    program = importlib.import_module(sys.argv[2])
    code = program.main(sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
