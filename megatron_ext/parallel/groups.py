"""Process groups: made once, asked here. The only door to `megatron.core.parallel_state`.

Every rank calls `initialize`; afterwards the functions below answer for the calling rank.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ext.config.tree import ParallelConfig
from megatron_ext.errors import MegapintsError
from megatron_ext.parallel import cpu_adapter, device
from megatron_ext.parallel.launch import Launch

LONG_PHASE_FACTOR = 3
"""A start, a save or a first iteration may let a collective wait so many times longer than others."""


class Place(NamedTuple):
    """Where a rank stands in the layout."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    context_rank: int
    context_size: int


def initialize(parallel: ParallelConfig, launch: Launch, *, seed: int) -> Place:
    """Join all ranks, build Megatron's groups, and seed this rank's generators. Every rank calls it once.

    `seed` fixes the generators that dropout and the like would use; the weights do not depend on it
    being the same on all ranks (model/init.py draws them by name).
    """
    device.select(launch.local_rank)
    # training/watchdog.py ends what hangs, and knows who hung. The groups' own limits stand behind it, one minute after
    # the last that it waits for, and in whole minutes, because Megatron takes no others.
    minutes = math.ceil(LONG_PHASE_FACTOR * parallel.distributed_timeout_minutes) + 1
    dist.init_process_group(
        device.backend(),
        init_method=f"tcp://{launch.master_addr}:{launch.master_port}",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=datetime.timedelta(minutes=minutes),
    )
    cpu_adapter.install()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=minutes,  # subgroups do not inherit that of init_process_group
        create_gloo_process_groups=True,
    )
    place = where_am_i()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * place.pipeline_rank)
    return place


def where_am_i() -> Place:
    """Read this rank's coordinates."""
    from megatron.core import parallel_state as ps

    return Place(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=ps.get_pipeline_model_parallel_world_size(),
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
        context_rank=ps.get_context_parallel_rank(),
        context_size=ps.get_context_parallel_world_size(),
    )


def destroy() -> None:
    """Leave all groups. Every rank calls it at the end."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block that may fail on some ranks so that it fails on all of them or on none.

    Every rank enters it. A `MegapintsError` (or an `OSError`, as one) on any rank is raised on every rank when the
    block ends, so no rank walks on into a collective that the failed one will never join.
    """
    error: MegapintsError | None = None
    try:
        yield
    except MegapintsError as raised:
        error = raised
    except OSError as raised:
        error = MegapintsError(f"{raised.filename or 'a file'}: {raised.strerror or raised}.")
    errors: list[MegapintsError | None] = gather_objects(error)
    for found in errors:
        if found is not None:
            found.everywhere = True
            raise found


def any_rank(flag: bool) -> bool:
    """Say whether the flag is set on at least one rank. Every rank calls it."""
    if dist.get_world_size() == 1:
        return flag
    found = torch.tensor([int(flag)], device=device.current())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def gather_objects(value: Any) -> list[Any]:
    """Collect one small picklable value from each rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Give rank 0's small picklable value to every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device.current() if device.is_cuda() else None)
    return box[0]


def sum_over_data_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor over the data- and context-parallel ranks, in place, and return it."""
    dist.all_reduce(values, group=data_context_group())
    return values


def broadcast_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Give the last pipeline stage's tensor to all stages of the same pipeline, in place."""
    from megatron.core import parallel_state as ps

    if ps.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(values, src=ps.get_pipeline_model_parallel_last_rank(), group=pipeline_group())
    return values


def broadcast_over_tensor_ranks(values: torch.Tensor) -> torch.Tensor:
    """Give the first tensor-parallel rank's tensor to the others of its group, in place."""
    from megatron.core import parallel_state as ps

    if ps.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(values, src=ps.get_tensor_model_parallel_src_rank(), group=ps.get_tensor_model_parallel_group())
    return values


def data_context_group() -> dist.ProcessGroup:
    """Ranks that hold the same weights: data parallel times context parallel."""
    from megatron.core import parallel_state as ps

    return ps.get_data_parallel_group(with_context_parallel=True)


def pipeline_group() -> dist.ProcessGroup:
    """Ranks of one pipeline."""
    from megatron.core import parallel_state as ps

    return ps.get_pipeline_model_parallel_group()


def axis_groups() -> dict[str, dist.ProcessGroup]:
    """Groups of several ranks that this rank communicates in, by axis; `data` is the one that reduces gradients."""
    from megatron.core import parallel_state as ps

    found = {
        "tensor": ps.get_tensor_model_parallel_group(),
        "context": ps.get_context_parallel_group(),
        "data": data_context_group(),
        "pipeline": pipeline_group(),
    }
    return {axis: group for axis, group in found.items() if dist.get_world_size(group) > 1}


def is_first_stage(chunk: int, num_chunks: int) -> bool:
    """Say whether this rank's model chunk holds the embedding."""
    from megatron.core import parallel_state as ps

    return ps.get_pipeline_model_parallel_rank() == 0 and chunk == 0


def is_last_stage(chunk: int, num_chunks: int) -> bool:
    """Say whether this rank's model chunk holds the output layer."""
    from megatron.core import parallel_state as ps

    last = ps.get_pipeline_model_parallel_world_size() - 1
    return ps.get_pipeline_model_parallel_rank() == last and chunk == num_chunks - 1


def describe_ranks(places: Sequence[Place]) -> str:
    """Put the layout into one line for the log."""
    first = places[0]
    return (
        f"{first.world_size} ranks: tp {first.tensor_size} x pp {first.pipeline_size} "
        f"x cp {first.context_size} x dp {first.data_size}"
    )
