"""Measure what a run stands on: devices, links, clocks, the run directory as each rank sees it.

Every rank calls each probe, in the same order. Probes only measure; training/preflight.py says what is too slow.
Each has a budget of time that its ranks agree on, so that a slow link costs little more than a fast one.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_ext.errors import LostRankError
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.launch import Launch, expand_nodelist, recorded_environment

_LEAST_REPEATS, _MOST_REPEATS = 3, 10
_ROUND_TRIPS = 8
"""For a clock; the shortest counts. Queues and schedulers only ever add to a trip."""
_PATIENCE_SECONDS = 3.0
"""How long a file that another node wrote may take to be seen: NFS looks again after some seconds."""


class Effort(NamedTuple):
    """How much is moved and computed for one figure."""

    message_bytes: int
    matmul_size: int
    matmuls: int
    """Products queued at a time, so that starting a kernel is not what is measured."""
    budget_seconds: float


# 64 MiB and 4096 bring NCCL and cuBLAS near their peak rates; on the CPU it is enough to tell ranks apart.
_CUDA = Effort(message_bytes=64 << 20, matmul_size=4096, matmuls=10, budget_seconds=0.2)
_CPU = Effort(message_bytes=1 << 20, matmul_size=256, matmuls=1, budget_seconds=0.02)


class GroupRate(NamedTuple):
    """All-reduce over one group."""

    ranks: tuple[int, ...]
    bytes_per_second: float
    """What each rank sends: 2 (n - 1) / n of the message in the time it takes, as nccl-tests' bus bandwidth."""


class Rates(NamedTuple):
    """What one rank measured."""

    matmul: float
    """FLOP/s: bf16 on CUDA, fp32 on the CPU."""
    all_reduce: dict[str, GroupRate]
    """By axis, `world` among them; only groups of several ranks."""
    pairs: dict[str, dict[int, float]]
    """By kind of ring (`rings`), and partner: bytes/s each way, both ways at once."""


class ClockOffset(NamedTuple):
    """A clock against that of rank 0."""

    seconds: float
    """Positive: ahead."""
    uncertainty: float
    """Half of the shortest round trip."""


def node_name(launch: Launch) -> str:
    """Name this process's node: as Slurm does where srun started it (what --exclude takes), else as the host does."""
    if launch.launcher == "srun":
        environment = recorded_environment()
        return expand_nodelist(environment["SLURM_STEP_NODELIST"])[int(environment["SLURM_NODEID"])]
    return socket.gethostname()


def first_ranks(nodes: Sequence[str]) -> list[int]:
    """Give the first rank of each node; `nodes` has the node of each rank."""
    return sorted({node: rank for rank, node in reversed(list(enumerate(nodes)))}.values())


def rates(nodes: Sequence[str]) -> Rates:
    """Measure this rank's device, its groups, and its pairs. Every rank calls it; `nodes` has the node of each."""
    # The world first: NCCL makes a communicator at its first use, with all of its ranks.
    return Rates(all_reduce=all_reduce_rates(), pairs=pair_rates(nodes), matmul=matmul_rate())


def matmul_rate() -> float:
    """Measure matrix products of this rank's device in FLOP/s."""
    effort = _effort()
    shape = (effort.matmul_size, effort.matmul_size)
    where = device.current()
    dtype = torch.bfloat16 if device.is_cuda() else torch.float32
    # A generator of its own: the run's must not be moved. Random numbers, as GPUs clock higher on constant ones.
    generator = torch.Generator(device=where).manual_seed(0)
    left, right = (torch.rand(shape, generator=generator, dtype=dtype, device=where) for _ in range(2))
    product = torch.empty(shape, dtype=dtype, device=where)

    def multiply() -> None:
        for _ in range(effort.matmuls):
            torch.mm(left, right, out=product)

    seconds = _best_seconds(multiply, lambda first: first)
    return 2.0 * effort.matmul_size**3 * effort.matmuls / seconds


def all_reduce_rates() -> dict[str, GroupRate]:
    """Measure all-reduce over the world and over each axis, one after the other."""
    found: dict[str, GroupRate] = {}
    if dist.get_world_size() == 1:
        return found
    message = torch.zeros(_effort().message_bytes // 4, device=device.current())
    world = dist.group.WORLD
    assert world is not None
    for axis, group in {"world": world, **groups.axis_groups()}.items():
        ranks = tuple(dist.get_process_group_ranks(group))
        with _named(f"all-reduce over the {axis} group of ranks {', '.join(map(str, ranks))}"):
            seconds = _all_reduce_seconds(message, group)
        sent = 2 * (len(ranks) - 1) / len(ranks) * message.nbytes
        found[axis] = GroupRate(ranks, sent / seconds)
    return found


def _all_reduce_seconds(message: torch.Tensor, group: dist.ProcessGroup) -> float:
    def slowest(seconds: float) -> float:
        box = torch.tensor([seconds], device=message.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
        return float(box.item())

    return _best_seconds(lambda: dist.all_reduce(message, group=group), slowest)


def rings(nodes: Sequence[str], rank: int, pipeline: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Give the rings of ranks in which `rank` exchanges messages with its neighbours; empty ones are left out.

    within nodes: the ranks of its node. between nodes: those with its number on every node, so that each network card
    is used. pipeline: its pipeline's stages.
    """
    by_node: dict[str, list[int]] = {}
    for other, node in enumerate(nodes):
        by_node.setdefault(node, []).append(other)
    number = by_node[nodes[rank]].index(rank)
    found = {
        "within nodes": tuple(by_node[nodes[rank]]),
        "between nodes": tuple(ranks[number] for ranks in by_node.values() if number < len(ranks)),
        "pipeline": tuple(pipeline),
    }
    return {kind: ring for kind, ring in found.items() if len(ring) > 1}


def partners(ring: Sequence[int], rank: int) -> list[int | None]:
    """Give the partner of `rank` in each of three rounds; None: it waits.

    In a round no rank has two partners, so that each figure is of one pair alone.
    """
    found: list[int | None] = [None, None, None]
    size = len(ring)
    for i in range(size if size > 2 else size - 1):
        pair = ring[i], ring[(i + 1) % size]
        if rank in pair:
            # A ring of an odd number needs a third round for the pair that closes it.
            found[2 if size % 2 and i == size - 1 else i % 2] = pair[1] if rank == pair[0] else pair[0]
    return found


def pair_rates(nodes: Sequence[str]) -> dict[str, dict[int, float]]:
    """Exchange messages with each neighbour in this rank's rings, many pairs at a time but never two of one rank."""
    rank, axes = dist.get_rank(), groups.axis_groups()
    stages = dist.get_process_group_ranks(axes["pipeline"]) if "pipeline" in axes else []
    found: dict[str, dict[int, float]] = {}
    for kind, ring in rings(nodes, rank, stages).items():
        group = axes["pipeline"] if kind == "pipeline" else dist.group.WORLD
        for partner in partners(ring, rank):
            if partner is not None:
                with _named(f"exchange with rank {partner} ({nodes[partner]})"):
                    found.setdefault(kind, {})[partner] = _pair_rate(partner, group)
    return found


def _pair_rate(partner: int, group: dist.ProcessGroup | None) -> float:
    out = torch.zeros(_effort().message_bytes // 4, device=device.current())
    into = torch.empty_like(out)

    def slower(seconds: float) -> float:
        mine, theirs = (torch.tensor([seconds], device=out.device) for _ in range(2))
        _exchange(mine, theirs, partner, group)
        return max(seconds, float(theirs.item()))

    seconds = _best_seconds(lambda: _exchange(out, into, partner, group), slower)
    return out.nbytes / seconds


def _exchange(out: torch.Tensor, into: torch.Tensor, partner: int, group: dist.ProcessGroup | None) -> None:
    # In a batch NCCL sends and receives over the group's communicator; alone, it would make one for each pair.
    both = [dist.P2POp(dist.isend, out, partner, group), dist.P2POp(dist.irecv, into, partner, group)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def clock_offset(nodes: Sequence[str]) -> ClockOffset | None:
    """Compare clocks with rank 0, one node after another. Every rank calls it.

    Returns:
        The offset on the first rank of each node but rank 0's own; None elsewhere.
    """
    leaders = first_ranks(nodes)
    if len(leaders) == 1:
        return None
    group = None
    if device.is_cuda():  # NCCL has no messages without the GPU; its queues would blur the trips
        group = dist.new_group(leaders, backend="gloo", timeout=datetime.timedelta(minutes=1))
    rank, found = dist.get_rank(), None
    if rank in leaders:
        with _named("clock comparison with rank 0"):
            if rank == 0:
                _answer_clocks(leaders[1:], group)
            else:
                found = min((_round_trip(group) for _ in range(_ROUND_TRIPS)), key=lambda trip: trip.uncertainty)
        if group is not None:
            dist.destroy_process_group(group)
    return found


def _answer_clocks(others: Sequence[int], group: dist.ProcessGroup | None) -> None:
    box = torch.zeros(1, dtype=torch.float64, device="cpu")
    for other in others:
        for _ in range(_ROUND_TRIPS):
            dist.recv(box, other, group=group)
            box[0] = time.time()
            dist.send(box, other, group=group)


def _round_trip(group: dist.ProcessGroup | None) -> ClockOffset:
    box = torch.zeros(1, dtype=torch.float64, device="cpu")
    begin = time.time()
    dist.send(box, 0, group=group)
    dist.recv(box, 0, group=group)
    end = time.time()
    return ClockOffset((begin + end) / 2 - float(box[0]), (end - begin) / 2)


def shared_directory(directory: Path, nodes: Sequence[str]) -> dict[int, str]:
    """See whether all ranks have the same directory under that path. Every rank calls it.

    Rank 0 writes a file that all others read, and the first rank of each other node one that rank 0 reads. Nothing of
    it is left; a directory that was not there is made, and removed again.

    Returns:
        What is wrong, by rank; the same on every rank. Empty: all is well.
    """
    rank = dist.get_rank()
    token = groups.broadcast_object(secrets.token_hex(8))
    made: list[Path] = []
    wrong: dict[int, str] = groups.broadcast_object(_write(directory, token, made) if rank == 0 else None)
    problem = None
    if not wrong and rank != 0:
        problem = _see(directory, token, 0)
        if problem is None and rank in first_ranks(nodes):
            problem = _write(directory, token, made).get(rank)
    wrong |= {other: text for other, text in enumerate(groups.gather_objects(problem)) if text is not None}
    unseen: dict[int, str] = {}
    if rank == 0 and 0 not in wrong:
        for other in set(first_ranks(nodes)) - {0, *wrong}:
            if _see(directory, token, other) is not None:
                unseen[other] = f"{directory.absolute()} is not seen by rank 0 as it writes it"
    wrong |= groups.broadcast_object(unseen)
    with contextlib.suppress(OSError):
        _token_file(directory, token, rank).unlink(missing_ok=True)
    groups.gather_objects(None)  # all have removed theirs
    with contextlib.suppress(OSError):
        for folder in made:
            folder.rmdir()
    return wrong


def _token_file(directory: Path, token: str, rank: int) -> Path:
    return directory / f".preflight-{token}-{rank}"


def _write(directory: Path, token: str, made: list[Path]) -> dict[int, str]:
    """Write this rank's file; rank 0 makes the directory. Folders that it made go into `made`, innermost first."""
    rank = dist.get_rank()
    try:
        if rank == 0:
            missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            made += missing
        _token_file(directory, token, rank).write_text(token)
    except OSError as error:
        return {rank: f"{directory.absolute()} cannot be written ({error.strerror or error})"}
    return {}


def _see(directory: Path, token: str, writer: int) -> str | None:
    """Read what another rank wrote, waiting a while for it; say what is wrong, or None."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            if _token_file(directory, token, writer).read_text() == token:
                return None
            reason = f"what rank {writer} wrote there reads otherwise"
        except FileNotFoundError:
            reason = f"what rank {writer} wrote there is not seen"
        except OSError as error:
            return f"{directory.absolute()} cannot be read ({error.strerror or error})"
        if time.monotonic() > deadline:
            return f"{directory.absolute()}: {reason}"
        with contextlib.suppress(OSError):
            os.listdir(directory.parent)  # opening a folder makes NFS ask its server again
        time.sleep(0.05)


def _effort() -> Effort:
    return _CUDA if device.is_cuda() else _CPU


def _best_seconds(work: Callable[[], None], agreed: Callable[[float], float]) -> float:
    """Time `work` as often as the budget allows, and return the shortest.

    Args:
        work: what is timed, alike on all ranks that take part.
        agreed: turns this rank's first time into one that all of them have, by which they repeat it equally often.
    """
    work()  # connections and kernels are made at the first use
    repeats = _effort().budget_seconds / max(agreed(_seconds(work)), 1e-9)
    return min(_seconds(work) for _ in range(max(_LEAST_REPEATS, min(_MOST_REPEATS, int(repeats)))))


def _seconds(work: Callable[[], None]) -> float:
    device.synchronize()
    begin = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _named(operation: str) -> Iterator[None]:
    """Turn a broken connection into a line that says who was talking to whom."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise LostRankError(
            f"preflight: rank {dist.get_rank()} ({socket.gethostname()}): {operation} failed: {reason}; look at the "
            "link between these nodes, and at what the other ranks say."
        ) from None
