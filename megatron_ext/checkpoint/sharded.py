"""megatron-core's sharded state: plan its saving, load it, sum it up. The only door to its dist_checkpointing.

Saving goes through the parts of megatron-core's own `save`, not through it: that one writes small files on one rank
ahead of collectives that the others enter, so a full disk there ends in a hang, and it starts processes to write.
Traps of megatron-core 0.16.1 and 0.19.2 that this file walks round are named where it does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ext.checkpoint import weight_sum
from megatron_ext.checkpoint.fit import UNSHARDED
from megatron_ext.checkpoint.writer import ShardPlan, is_quantized
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place

_COMMON = "common.pt"
QUANTIZED = "quantized"
"""Type of weights that lie in memory as FP8: what is saved and loaded is not their bits."""


class Planned(NamedTuple):
    """What one rank writes in a save."""

    shards: ShardPlan
    index: Any
    """torch's Metadata of the whole checkpoint, on rank 0; None elsewhere."""
    small_files: dict[str, bytes]
    """What rank 0 writes beside the shards, by name."""
    weight_keys: frozenset[str]
    """Keys of the tensors that are the model's weights."""
    weight_types: frozenset[str]


class _Plan(NamedTuple):
    signature: Any
    distribution: Any
    items: Any
    index: Any


class SavePlanner:
    """Plans saves. What all ranks must agree on is worked out in the first one and kept while the state's shape is."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def plan(self, state: dict[str, Any], directory: Path, *, metadata: dict[str, Any]) -> Planned:
        """Deal the state out over the ranks that hold it, so that each writes about as much. Every rank calls it.

        Args:
            state: sharded state; consumed.
            directory: where it is to be written.
            metadata: how the optimizer's state is cut (`content_metadata`), recorded for the load.
        """
        from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            distribute_main_replicas_with_precomputed_distribution,
        )
        from megatron.core.dist_checkpointing.strategies.torch import (
            MCoreSavePlanner,
            _replace_state_dict_keys_with_sharded_keys,
            mcore_to_pyt_state_dict,
        )

        rank = torch.distributed.get_rank()
        # The group cannot be stored, and a load makes its own.
        state["content_metadata"] = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
        parts, common = save_preprocess(state, validate_access_integrity=False)
        small_files = _small_files(parts, common)
        plan = self._known(parts)
        if plan is None:
            plan = _Plan(_signature(parts), _distribution(parts), None, None)
        distribute_main_replicas_with_precomputed_distribution(parts, groups.data_context_group(), plan.distribution)
        weights = [part for name in parts if name.startswith("model") for part in _tensors(parts[name])]
        if plan.items is None:
            _validate(parts, common)
        tensors = mcore_to_pyt_state_dict(_replace_state_dict_keys_with_sharded_keys(parts, True)[0], False)
        planner = MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        shards = ShardPlan(directory, rank=rank)
        if plan.items is None:
            plan = plan._replace(**_plan_items(tensors, shards, planner))
        else:
            planner.set_up_planner(tensors, is_coordinator=rank == 0)
            shards.set_up_storage_writer(rank == 0)
            shards.prepare_write_data(plan.items, planner)
        self._plan = plan
        return Planned(
            shards,
            plan.index,
            small_files,
            frozenset(part.key for part in weights),
            frozenset(_type_of(part) for part in weights),
        )

    def _known(self, parts: dict[str, Any]) -> _Plan | None:
        plan = self._plan
        return None if groups.any_rank(plan is None or plan.signature != _signature(parts)) else plan


def _small_files(parts: dict[str, Any], common: dict[str, Any]) -> dict[str, bytes]:
    """Make the files of values that are not sharded; 0.19.2 puts all but the format's description into `parts`."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    files = {"metadata.json": json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()}
    if "common_backend" in CheckpointingConfig.__dataclass_fields__:
        content = io.BytesIO()
        torch.save(common, content)
        files[_COMMON] = content.getvalue()
    else:
        parts["common_state"] = ShardedObject(
            "common_state", common, (1,), (0,), replica_id=torch.distributed.get_rank()
        )
    return files


def _signature(parts: dict[str, Any]) -> list[Any]:
    """Say of what parts this rank's state consists, and which of them are another rank's too."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [
        (part.key, part.global_shape, part.global_offset, part.replica_id)
        + ((part.local_shape, part.dtype) if isinstance(part, ShardedTensor) else ())
        for part in _sharded(parts)
    ]


def _distribution(parts: dict[str, Any]) -> Any:
    from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution

    return determine_main_replica_uniform_distribution(parts, groups.data_context_group())


def _validate(parts: dict[str, Any], common: dict[str, Any]) -> None:
    """Check that every part of every tensor is written by exactly one rank."""
    from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

    validate_sharding_integrity(determine_global_metadata(parts)[1], common_state_dict=common)


def _plan_items(tensors: dict[str, Any], shards: ShardPlan, planner: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan

    (_, index, _), items, *_ = save_state_dict_async_plan(tensors, shards, None, 0, planner=planner)
    if index is not None:
        vars(index).pop("all_local_plans", None)  # all items once more; nothing here reads them
    return {"items": items, "index": index}


def _type_of(part: Any) -> str:
    return QUANTIZED if is_quantized(part.data) else str(part.dtype).removeprefix("torch.")


def _sharded(parts: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    return (part for part in nested_values(parts) if isinstance(part, ShardedBase))


def _tensors(parts: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return (part for part in _sharded(parts) if isinstance(part, ShardedTensor))


def state_metadata(optimizer_format: str) -> dict[str, Any]:
    """Say how sharded state is to be cut."""
    # Left out, distrib_optim_sharding_type defaults to fully_sharded_model_space, which raises.
    sharding = optimizer_format if optimizer_format != UNSHARDED else "fully_reshardable"
    return {
        "distrib_optim_sharding_type": sharding,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.data_context_group(),
    }


def load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read what `state` asks for, each part once per group of ranks that need it. Every rank calls it.

    Raises:
        CheckpointError: this version of megatron-core cannot read it.
    """
    from megatron.core import __version__ as version
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from megatron.core.dist_checkpointing.validation import StrictHandling

    if not (path / _COMMON).exists() and version.startswith("0.16"):
        raise CheckpointError(
            f"{path}: written by megatron-core 0.18 or later, which {version} cannot read; resume it with Python "
            "3.12 or later, or take its weights through tools/convert_checkpoint.py to-hf and from-hf."
        )
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(path)), groups.data_context_group()
    )
    try:
        # What is asked for must be there; the optimizer of a weights-only load need not be asked for.
        loaded: dict[str, Any] = dist_checkpointing.load(
            state, str(path), strategy, strict=StrictHandling.RAISE_UNEXPECTED
        )
    except CheckpointingException as error:
        raise CheckpointError(f"{path}: does not hold what this run needs: {' '.join(str(error).split())}") from None
    return loaded


class WeightSum(NamedTuple):
    """Checksum of a model's weights, whatever layout they are in; comparable only where the types are the same."""

    types: tuple[str, ...]
    sum: int


def sum_weights(chunk_states: list[dict[str, Any]]) -> WeightSum:
    """Sum up the weights that all ranks hold together, where they lie. Every rank calls it.

    Args:
        chunk_states: `sharded_state_dict` of each model chunk of this rank; consumed.
    """
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    total, types = 0, set()
    for state in chunk_states:
        apply_factories(state)
        for part in _tensors(state):
            types.add(_type_of(part))
            if is_main_replica(part.replica_id) and QUANTIZED not in types:
                whole = part.data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))
                total += weight_sum.sum_of_part(whole, part.key, shape=part.global_shape, offset=part.global_offset)
    return add_sums([WeightSum(tuple(types), total)], everywhere=True)


def add_sums(sums: list[WeightSum], *, everywhere: bool = False) -> WeightSum:
    """Add partial sums; `everywhere`: those of all ranks, which all call it."""
    if everywhere:
        sums = [one for of_rank in groups.gather_objects(sums) for one in of_rank]
    types = sorted({name for one in sums for name in one.types})
    return WeightSum(tuple(types), sum(one.sum for one in sums) % weight_sum.MODULUS)


def sharded_rng_states(place: Place) -> Any:
    """Wrap this rank's generators: one entry per tensor- and pipeline-parallel rank, the same on its replicas."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {
        "cpu": torch.get_rng_state(),
        "device": device.rng_state(),
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    return ShardedObject(
        "rng",
        states,
        (place.pipeline_size, place.tensor_size),
        (place.pipeline_rank, place.tensor_rank),
        replica_id=place.data_rank * place.context_size + place.context_rank,
    )


def set_rng_states(states: dict[str, Any]) -> None:
    """Put back what `sharded_rng_states` took."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    device.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
