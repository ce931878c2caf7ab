"""Several ranks that share a work folder: who does what, and how they end together."""

from __future__ import annotations

import heapq
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_ext.errors import LaunchError, MegapintsError
from megatron_ext.parallel.launch import read_launch

Value = TypeVar("Value")
Item = TypeVar("Item")

_POLL_SECONDS = 0.02
_SHARED_SECONDS = 30
"""How long a file may take to be seen on another node: network file systems cache folders for a while."""


class Ranks(Protocol):
    """The processes of a run."""

    rank: int
    size: int

    def broadcast(self, value: Any) -> Any:
        """Give rank 0's value to all."""

    def gather(self, value: Any) -> list[Any]:
        """Give all ranks' values to all, in the order of ranks."""

    def abort(self, code: int) -> None:
        """End all ranks now, whatever they wait for."""


class OneRank:
    """A run of this process alone."""

    rank = 0
    size = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def abort(self, code: int) -> None:
        return


class MpiRanks:
    """The ranks of mpiexec or srun, through mpi4py.

    Raises:
        LaunchError: mpi4py does not load, or belongs to another MPI than the launcher.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise LaunchError(
                f"--mpi: mpi4py does not load ({error}); install it (it is in requirements.txt)."
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.rank
        self.size: int = self._world.size
        launched = read_launch()
        if launched.launcher in ("mpiexec", "srun") and launched.world_size != self.size:
            raise LaunchError(
                f"--mpi: {launched.launcher} started {launched.world_size} processes, mpi4py's library sees "
                f"{self.size}: they belong to different MPIs; use the mpiexec that lies beside this Python, or "
                "srun --mpi=pmix."
            )

    def broadcast(self, value: Any) -> Any:
        self._meet()
        return self._world.bcast(value, root=0)

    def gather(self, value: Any) -> list[Any]:
        self._meet()
        return list(self._world.allgather(value))

    def abort(self, code: int) -> None:
        self._world.Abort(code)

    def _meet(self) -> None:
        """Wait for all ranks without turning round in a loop at full speed, as MPI's own waiting does."""
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(_POLL_SECONDS)


def together(ranks: Ranks, function: Callable[[], Value]) -> Value:
    """Let rank 0 do something, and all ranks have its value, or its error.

    Raises:
        MegapintsError: what rank 0 raised, on every rank.
    """
    value: Value | None = None
    error: MegapintsError | OSError | None = None
    if ranks.rank == 0:
        try:
            value = function()
        except (MegapintsError, OSError) as caught:
            error = caught
    value, told = ranks.broadcast((value, error))
    if error is not None:
        raise error
    if told is not None:
        raise told
    return value


def share_out(items: Iterable[Item], weight: Callable[[Item], int], *, size: int) -> list[list[Item]]:
    """Share items out to `size` ranks: the heaviest first, each to the rank that has least; ties by order."""
    shares: list[list[Item]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for item in sorted(items, key=lambda item: -weight(item)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (load + weight(item), rank))
    return shares


def check_folder_is_shared(ranks: Ranks, folder: Path) -> None:
    """Check that all ranks see the folder that rank 0 writes to.

    Raises:
        LaunchError: on every rank, if one of them does not.
    """
    token = folder / ranks.broadcast(f"token-{uuid.uuid4().hex}.partial-0")
    if ranks.rank == 0:
        token.touch()
    ranks.broadcast(None)
    until = time.monotonic() + _SHARED_SECONDS
    while not (seen := token.exists()) and time.monotonic() < until:
        os.listdir(folder) if folder.is_dir() else None
        time.sleep(10 * _POLL_SECONDS)
    blind = [rank for rank, sees in enumerate(ranks.gather(seen)) if not sees]
    if ranks.rank == 0:
        token.unlink(missing_ok=True)
    if blind:
        raise LaunchError(
            f"{folder}: ranks {', '.join(map(str, blind))} do not see what rank 0 writes there; "
            "put the output prefix on a file system that all nodes share."
        )
