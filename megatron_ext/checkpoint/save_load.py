"""Save and load the state of a run with megatron-core's distributed checkpoints. Their only door.

Traps of megatron-core 0.16.1 and 0.19.2 that this file walks round are named where it does.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.config.derived import bucket_size, head_size, padded_vocab_size
from megatron_ext.config.tree import Config, ModelConfig, ParallelConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place

_LOG = logging.getLogger(__name__)
_UNSHARDED = "unsharded"
# Settings that decide which sample comes when, and what it is; (section, field).
_SAMPLES = (
    ("train", "seed"), ("train", "seq_length"), ("data", "train_data"), ("data", "train_weights"),
    ("data", "train_weights_unit"), ("data", "split"), ("data", "valid_data"), ("data", "sample_index"),
    ("data", "eod_mask_loss"), ("data", "document_mask"),
)  # fmt: skip


# Fields of the model that fit any weights but change what they mean (CodeLlama is continued with another rotary base).
_MEANING = ("layernorm_epsilon", "rotary_base", "rotary_scaling_factor")


class Progress(NamedTuple):
    """How far a run is."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int


class Checkpoints:
    """Saves, publishes, prunes and loads the checkpoints of one run. Every rank holds one and calls it alike."""

    def __init__(
        self,
        config: Config,
        place: Place,
        *,
        directory: Path,
        bare_chunks: Sequence[Any],
        optimizer: Any,
        tokenizer_sha256: str,
        transformer_engine: bool = False,
    ) -> None:
        """Take what is to be saved and loaded; `optimizer` may be None where only weights are loaded."""
        self._config = config
        self._place = place
        self._directory = directory
        self._chunks = list(bare_chunks)
        self._optimizer = optimizer
        self._tokenizer_sha256 = tokenizer_sha256
        self._transformer_engine = transformer_engine
        self._queue: Any = None
        self.last_saved: int | None = None
        """Iteration of the newest save that was begun or loaded."""

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; with async_save, stage it and let it be written in the background.

        A save that is still being written is waited for first, so at most one copy of the state is in flight.
        """
        from megatron.core import dist_checkpointing

        self.wait()
        with groups.together():
            if self._place.rank == 0:
                try:
                    layout.prepare_temporary(self._directory, progress.iteration)
                except OSError as error:
                    raise CheckpointError(f"{self._directory}: cannot write a checkpoint ({error.strerror}).") from None
        path = layout.temporary_path(self._directory, progress.iteration)
        metadata = _metadata(self._optimizer_format())
        asynchronous = self._config.checkpoint.async_save
        request = dist_checkpointing.save(
            self._state(metadata),
            str(path),
            _save_strategy(),
            async_sharded_save=asynchronous,
            # The group cannot be stored, and a load makes its own.
            content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
            **_async_strategy(dist_checkpointing.save),
        )
        self.last_saved = progress.iteration
        if asynchronous:
            request.add_finalize_fn(lambda: self._publish(progress))
            self._async_queue().schedule_async_request(request)
        else:
            self._publish(progress)

    def poll(self) -> None:
        """Publish a background save that has finished meanwhile. Every rank calls it each iteration."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait until no save is under way."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish what is under way and stop the background writer."""
        self.wait()
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _publish(self, progress: Progress) -> None:
        settings = self._config.checkpoint
        with groups.together():
            if self._place.rank == 0:
                try:
                    path = layout.publish(
                        layout.temporary_path(self._directory, progress.iteration), self._description(progress)
                    )
                    layout.apply_retention(
                        self._directory, keep_last=settings.keep_last, keep_every=settings.keep_every
                    )
                except OSError as error:
                    raise CheckpointError(f"{self._directory}: cannot publish a checkpoint ({error}).") from None
                _LOG.info("saved %s", path)

    def _description(self, progress: Progress) -> CheckpointDescription:
        return CheckpointDescription(
            **progress._asdict(),
            model=asdict(self._config.model),
            config=asdict(self._config),
            optimizer_format=self._optimizer_format(),
            tokenizer_sha256=self._tokenizer_sha256,
            topology={
                "tensor_model_parallel_size": self._place.tensor_size,
                "pipeline_model_parallel_size": self._place.pipeline_size,
                "context_parallel_size": self._place.context_size,
                "data_parallel_size": self._place.data_size,
                "transformer_engine": int(self._transformer_engine),
            },
        )

    def _optimizer_format(self) -> str:
        distributed = self._config.parallel.use_distributed_optimizer
        return self._config.checkpoint.optimizer_format if distributed else _UNSHARDED

    def _async_queue(self) -> Any:
        if self._queue is None:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()
        return self._queue

    # --- loading --------------------------------------------------------------------------------------------------

    def resume(self) -> Progress | None:
        """Load the newest whole checkpoint of this run, if there is one. Every rank calls it.

        Raises:
            CheckpointError: it does not fit this configuration or layout.
        """
        found = layout.find_newest(self._directory)
        if self._place.rank == 0:
            for rejected in found.rejected:
                _LOG.warning("ignored %s: %s", rejected.path, rejected.reason)
        path = groups.broadcast_object(found.path)  # one rank decides; a slow file system must not split the ranks
        if path is None:
            return None
        with groups.together():
            description = layout.read_description(path)
            self._check_resumable(path, description)
        self._load(path, description, weights_only=False)
        self.last_saved = description.iteration
        if self._place.rank == 0:
            _LOG.info("resumed from %s", path)
        return Progress(description.iteration, description.consumed_samples, description.consumed_tokens)

    def load_weights(self, path: Path) -> None:
        """Load only the weights of a checkpoint directory, of any layout. Every rank calls it.

        Raises:
            CheckpointError: the weights are of another model.
        """
        with groups.together():
            description = layout.read_description(path)
            self._check_model(path, description, meaning=False)
        self._load(path, description, weights_only=True)
        if self._place.rank == 0:
            _LOG.info("took the weights of %s (iteration %d)", path, description.iteration)

    def _load(self, path: Path, description: CheckpointDescription, *, weights_only: bool) -> None:
        from megatron.core import __version__ as version
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.validation import StrictHandling

        if not (path / "common.pt").exists() and version.startswith("0.16"):
            raise CheckpointError(
                f"{path}: written by megatron-core 0.18 or later, which {version} cannot read; resume it with Python "
                "3.12 or later, or take its weights through tools/convert_checkpoint.py to-hf and from-hf."
            )
        metadata = _metadata(description.optimizer_format or _UNSHARDED)
        same_grid = description.topology == self._description(Progress(0, 0, 0)).topology
        state = self._state(metadata, loading=True, weights_only=weights_only, rng=same_grid)
        # Leaf parameters are written in place (fp32 with dp_reshardable), hence no_grad.
        with torch.no_grad():
            loaded = dist_checkpointing.load(
                state,
                str(path),
                _load_strategy(str(path)),
                # What is asked for must be there; the optimizer of a weights-only load need not be asked for.
                strict=StrictHandling.RAISE_UNEXPECTED,
            )
            for name, chunk in self._named_chunks():
                missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
                missing = [key for key in missing if not key.endswith("_extra_state")]
                if missing or unexpected:
                    raise CheckpointError(f"{path}: missing {missing}, unexpected {unexpected}.")
            if weights_only:
                if self._optimizer is not None:  # its fp32 copies
                    self._optimizer.reload_model_params()
            else:
                _adopt_rates(loaded["optimizer"], self._optimizer.param_groups[0])
                self._optimizer.load_state_dict(loaded["optimizer"])
        if not weights_only and same_grid:
            _set_rng_states(loaded["rng"])

    def _check_resumable(self, path: Path, description: CheckpointDescription) -> None:
        self._check_model(path, description, meaning=True)
        mine, theirs = self._optimizer_format(), description.optimizer_format
        if theirs is None:
            raise CheckpointError(f"{path}: holds weights only; start from it with checkpoint.init_from.")
        if (mine == _UNSHARDED) != (theirs == _UNSHARDED):
            raise CheckpointError(
                f"{path}: saved with parallel.use_distributed_optimizer = {str(theirs != _UNSHARDED).lower()}, this "
                "run has the other; use the same, or start anew with checkpoint.init_from."
            )
        there = _cut(description.config["parallel"] | description.topology)
        here = _cut(asdict(self._config.parallel))
        moved = [f"parallel.{name} {there[name]} -> {here[name]}" for name in here if there[name] != here[name]]
        if description.topology.get("transformer_engine", 0) != self._transformer_engine:
            # Their layers hold the same parameters in another order, and this format goes by order.
            moved.append("model.transformer_impl: local to Transformer Engine, or back")
        if moved and theirs == "dp_reshardable":
            raise CheckpointError(
                f"{path}: saved as dp_reshardable, so only the number of data-parallel ranks may change "
                f"({', '.join(moved)}); resume with the saved settings, save once with checkpoint.optimizer_format "
                "fully_reshardable, then change."
            )
        if description.tokenizer_sha256 not in (None, self._tokenizer_sha256):
            raise CheckpointError(
                f"{path}: trained with another tokenizer than data.tokenizer ({self._config.data.tokenizer})."
            )
        if self._place.rank == 0:
            for line in sample_changes(description.config, self._config):
                _LOG.warning("samples or their order are not those of %s: %s", path, line)

    def _check_model(self, path: Path, description: CheckpointDescription, *, meaning: bool) -> None:
        try:
            theirs = ModelConfig(**description.model)
        except TypeError as error:
            raise CheckpointError(f"{path}: its model is of another version of megapints ({error}).") from None
        there, here = _identity(theirs), _identity(self._config.model)
        differing = [f"{name} {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
        shaping = [line for line in differing if not line.startswith(_MEANING)]
        if shaping or (meaning and differing):
            raise CheckpointError(f"{path}: of another model: {'; '.join(differing)}.")
        if differing and self._place.rank == 0:
            _LOG.warning("the weights of %s were trained with %s", path, "; ".join(differing))

    # --- state ----------------------------------------------------------------------------------------------------

    def _named_chunks(self) -> list[tuple[str, Any]]:
        if len(self._chunks) == 1:
            return [("model", self._chunks[0])]
        return [(f"model{index}", chunk) for index, chunk in enumerate(self._chunks)]

    def _state(
        self,
        metadata: dict[str, Any],
        *,
        loading: bool = False,
        weights_only: bool = False,
        rng: bool = True,
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, chunk in self._named_chunks():
            sharded = chunk.sharded_state_dict(metadata=metadata)
            # `_extra_state` is the scaling history of FP8's delayed recipe, as a pickle; it builds up again in a few
            # iterations. Elsewhere it is an empty object that would tie a checkpoint to one implementation.
            state[name] = {k: v for k, v in sharded.items() if not k.endswith("_extra_state")}
        if not weights_only:
            state["optimizer"] = self._optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
            if rng:
                state["rng"] = _sharded_rng_states(self._place)
        return state


def _cut(parallel: dict[str, Any]) -> dict[str, Any]:
    """What decides how dp_reshardable optimizer state is cut: the stage's parameters, and their buckets."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    known = {name: parallel[name] for name in ParallelConfig.__dataclass_fields__ if name in parallel}
    return {**{name: parallel[name] for name in sizes}, "ddp_bucket_size": bucket_size(ParallelConfig(**known))}


def _identity(model: ModelConfig) -> dict[str, Any]:
    """What must be equal for weights to fit a model, resolved (a default spelt out is no difference)."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
             "share_embeddings_and_output_weights", *_MEANING)  # fmt: skip
    resolved = {"kv_channels": head_size(model), "padded vocab_size": padded_vocab_size(model)}
    return {**{name: getattr(model, name) for name in names}, **resolved}


def sample_changes(saved: dict[str, Any], config: Config) -> list[str]:
    """List the settings that changed since a checkpoint and that decide which sample comes when, and what it is."""
    now = asdict(config)
    changes = []
    for section, name in _SAMPLES:
        # A checkpoint from before a setting existed did what is its default now.
        default = {field.name: field.default for field in fields(getattr(config, section))}[name]
        before, after = saved.get(section, {}).get(name, default), now[section][name]
        if (list(before) if isinstance(before, list | tuple) else before) != (
            list(after) if isinstance(after, list | tuple) else after
        ):
            changes.append(f"{section}.{name} {before} -> {after}")
    return changes


def _adopt_rates(saved: Any, group: dict[str, Any]) -> None:
    """Give saved parameter groups this run's bounds of the learning rate, in place.

    megatron-core 0.19.2 tells groups apart by them too, and would find none for a run that is resumed with another
    rate. All groups of a run have the same.
    """
    if isinstance(saved, dict):
        for bound in {"max_lr", "min_lr"} & saved.keys() & group.keys():
            saved[bound] = group[bound]
    for value in saved.values() if isinstance(saved, dict) else saved if isinstance(saved, list) else ():
        _adopt_rates(value, group)


def _metadata(optimizer_format: str) -> dict[str, Any]:
    # Left out, distrib_optim_sharding_type defaults to fully_sharded_model_space, which raises.
    sharding = optimizer_format if optimizer_format != _UNSHARDED else "fully_reshardable"
    return {
        "distrib_optim_sharding_type": sharding,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.data_context_group(),
    }


def _async_strategy(function: Any) -> dict[str, str]:
    # From 0.18 on the default is NVIDIA's resiliency extension, which is not a requirement of ours.
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(function).parameters else {}


def _save_strategy() -> Any:
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    return FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy("torch_dist"), groups.data_context_group()
    )


def _load_strategy(path: str) -> Any:
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(path), groups.data_context_group())


def _sharded_rng_states(place: Place) -> Any:
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


def _set_rng_states(states: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    device.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
