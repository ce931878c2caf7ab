"""Save and load the state of a run: what a checkpoint consists of, when it counts, what is taken from it.

megatron-core's sharded state is behind sharded.py, the writing of files behind writer.py.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_ext.checkpoint import fit, layout, removal, sharded, verify
from megatron_ext.checkpoint.buckets import bucket_padding_kept
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.checkpoint.sharded import Planned, WeightSum
from megatron_ext.checkpoint.writer import Staging, Writing, Written
from megatron_ext.config.tree import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel import groups
from megatron_ext.parallel.groups import Place

_LOG = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far a run is."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    recent_losses: tuple[float, ...] = ()
    """What the next loss is measured against, newest last."""
    unreported_updates: int = 0
    """Updates since the last row of metrics; the next one says their mean loss."""
    unreported_loss_sum: float = 0.0
    """Of their losses."""
    grad_norm: float = 0.0
    """Of the newest update."""


class Published(NamedTuple):
    """A checkpoint that is whole now."""

    progress: Progress
    path: Path
    blocking_seconds: float
    """For which training stood still."""
    seconds: float
    """From the beginning until it was whole."""
    bytes: int
    """On rank 0; 0 elsewhere."""


@dataclass
class _UnderWay:
    """A save that is being written, and then published."""

    progress: Progress
    begin: float
    """By time.monotonic()."""
    planned: Planned
    writing: Writing
    blocked: float = 0.0
    """Seconds for which training stood still."""
    written: bool = False
    """Whether all ranks have written their shares."""
    publishing: Future[int] | None = None
    """On rank 0, once they have; its result is the size in bytes."""

    @property
    def busy(self) -> bool:
        """Whether this rank has something to wait for."""
        return self.writing.running if not self.written else not (self.publishing is None or self.publishing.done())


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
        self._start: str = groups.broadcast_object(secrets.token_hex(3))
        self._chunks = list(bare_chunks)
        self._optimizer = optimizer
        self._mine = fit.Mine(config, tokenizer_sha256, transformer_engine)
        self._planner = sharded.SavePlanner()
        self._removing: Future[None] = Future()
        self._removing.set_result(None)
        self._staging = Staging()
        self._under_way: _UnderWay | None = None
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._published: list[Published] = []
        self._damaged: dict[Path, str] = {}
        self.last_saved: int | None = None
        """Iteration of the newest save that was begun or loaded."""
        self.last_save_seconds: float | None = None
        """Time that the newest published save took, from its beginning until it was whole."""

    # --- saving ---------------------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> None:
        """Write a checkpoint; with async_save, copy the state and let it be written in the background.

        A save that is still being written is waited for first, so at most one copy of the state is in flight.

        Raises:
            CheckpointError: this save failed, or the one before it did. What was written of it is removed.
        """
        begin = time.monotonic()
        self.wait()
        waited = time.monotonic() - begin
        if waited > 1.0 and self._config.checkpoint.async_save and self._place.rank == 0:
            _LOG.warning("waited %.0f s for the save before to be written; save less often", waited)
        begin = time.monotonic()
        path = layout.temporary_path(self._directory, progress.iteration, self._start)
        with groups.together():
            if self._place.rank == 0:
                self._removing.result()  # its disk space may be needed
                try:
                    layout.prepare_temporary(self._directory, progress.iteration, self._start)
                except OSError as error:
                    raise CheckpointError(f"{self._directory}: cannot write a checkpoint ({error.strerror}).") from None
        metadata = sharded.state_metadata(self._optimizer_format())
        planned = self._planner.plan(self._state(metadata), path, metadata=metadata)
        files = planned.shards.files
        if self._config.checkpoint.async_save:
            files = self._copied(files)
            planned.shards.files = {}  # a gathered state must not lie beside its copy until this is published
        writing = Writing(path, files, weight_keys=planned.weight_keys)
        self._under_way = _UnderWay(progress, begin, planned, writing)
        self.last_saved = progress.iteration
        if not self._config.checkpoint.async_save:
            self.wait()
        blocked = time.monotonic() - begin
        if self._under_way is not None:
            self._under_way.blocked = blocked
        else:
            self._published[-1] = self._published[-1]._replace(blocking_seconds=blocked)

    def poll(self) -> list[Published]:
        """Take a background save a step further if it has come to one. Every rank calls it each iteration.

        Returns:
            What has been published since the last call, also by `save`, `wait` and `close`.

        Raises:
            CheckpointError: the background save failed.
        """
        if self._under_way is not None and not groups.any_rank(self._under_way.busy):
            self._proceed(self._under_way)
        published, self._published = self._published, []
        return published

    def wait(self) -> None:
        """Wait until no save is under way.

        Raises:
            CheckpointError: it failed.
        """
        while self._under_way is not None:
            self._proceed(self._under_way)

    def close(self) -> None:
        """Finish what is under way, and give back the memory that saves were copied into."""
        self.wait()
        self._aside.shutdown()
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._staging = Staging()

    def _copied(self, files: Any) -> Any:
        with groups.together():
            try:
                return self._staging.copy(files)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"checkpoint.async_save: rank {self._place.rank} cannot have the memory for a copy of its state "
                    f"({str(error).splitlines()[0]}); use checkpoint.async_save false, or a node with more."
                ) from None

    def _proceed(self, save: _UnderWay) -> None:
        """Gather what all ranks wrote and begin to publish it, or, when that was done, conclude. Waits if it must."""
        if not save.written:
            written = save.writing.join()
            mine = (written, WeightSum(tuple(save.planned.weight_types), written.weight_sum))
            found: list[Any] | None = [None] * self._place.world_size if self._place.rank == 0 else None
            dist.gather_object(mine, found, dst=0)
            save.written = True
            if found is not None:
                save.publishing = self._aside.submit(self._publish_or_clear, save, found)
            return
        self._under_way = None
        with groups.together():
            size = 0 if save.publishing is None else save.publishing.result()
        path = layout.published_path(self._directory, save.progress.iteration)
        self._damaged.pop(path, None)
        self.last_save_seconds = time.monotonic() - save.begin
        self._published.append(Published(save.progress, path, save.blocked, self.last_save_seconds, size))

    def _publish_or_clear(self, save: _UnderWay, found: list[tuple[Written, WeightSum]]) -> int:
        """Complete a checkpoint that all ranks have written their shares of; returns its size. Beside training."""
        iteration = save.progress.iteration
        temporary = layout.temporary_path(self._directory, iteration, self._start)
        try:
            path = self._publish(temporary, save, found)
            _LOG.info("saved %s", path)
        # Whatever it is: raised on rank 0 alone, it would leave the others waiting.
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk is the likeliest reason: give it back
            raise CheckpointError(
                f"the checkpoint of iteration {iteration} could not be saved, and the run ends here rather than train "
                f"on without: {_reason(error)} {self._what_is_left()}"
            ) from None
        self._removing = self._aside.submit(self._remove_superfluous, path)
        size = 0
        with layout.told(path, "its size cannot be read"):
            size = sum(file.stat().st_size for file in path.iterdir())
        return size

    def _remove_superfluous(self, newest: Path) -> None:
        settings, bad = self._config.checkpoint, self._damaged.keys() - {newest}
        keep = {"keep_last": settings.keep_last, "keep_every": settings.keep_every}
        try:
            removal.remove_expired(self._directory, **keep, bad=bad)
        # Whatever it is: the newer checkpoint is whole, so it is told, and no more.
        except Exception as error:
            _LOG.warning("expired checkpoints cannot be removed, and take up disk space: %s", _reason(error))

    def _publish(self, temporary: Path, save: _UnderWay, found: list[tuple[Written, WeightSum]]) -> Path:
        failed = [f"rank {rank}: {error}" for rank, (written, _) in enumerate(found) for error in written.errors]
        if failed:
            raise CheckpointError(f"{'; '.join(failed)}.")
        save.planned.shards.finish(save.planned.index, [written.results for written, _ in found])
        for name, content in save.planned.small_files.items():
            (temporary / name).write_bytes(content)
        weights = sharded.add_sums([part for _, part in found])
        records = {name: record for written, _ in found for name, record in written.files.items()}
        return layout.publish(temporary, self._description(save.progress, weights=weights._asdict()), records)

    def _what_is_left(self) -> str:
        try:
            newest = layout.find_newest(self._directory, self._damaged).path
        except Exception as error:  # it must not hide why the save failed
            return f"Whether there is an older one could not be seen: {_reason(error)}"
        if newest is None:
            return "There is no older one. Mend that, and start again."
        return f"Older ones are untouched: mend that, start again, and the run goes on from {newest}."

    def _description(self, progress: Progress, weights: dict[str, Any] | None = None) -> CheckpointDescription:
        return CheckpointDescription(
            **progress._asdict(),
            model=asdict(self._config.model),
            config=asdict(self._config),
            optimizer_format=self._optimizer_format(),
            tokenizer_sha256=self._mine.tokenizer_sha256,
            topology={
                "tensor_model_parallel_size": self._place.tensor_size,
                "pipeline_model_parallel_size": self._place.pipeline_size,
                "context_parallel_size": self._place.context_size,
                "data_parallel_size": self._place.data_size,
                "transformer_engine": int(self._mine.transformer_engine),
            },
            weights=weights,
        )

    def _optimizer_format(self) -> str:
        return fit.optimizer_format(self._config)

    # --- loading --------------------------------------------------------------------------------------------------

    def resume(self) -> Progress | None:
        """Load the newest whole checkpoint of this run, if there is one, and clear what dead starts left beside it.

        Every rank calls it, while no save is under way.

        All files are read and compared with their digests first; a checkpoint that is damaged is passed over with a
        warning, and the next older one is tried.

        Raises:
            CheckpointError: it does not fit this configuration or layout, or there are only damaged ones.
        """
        with groups.together():
            if self._place.rank == 0:
                self._removing.result()  # where the run goes back: both would remove the same
                removal.put_back_replaced(self._directory)
        path = verify.find_newest(self._directory, self._damaged, self._place)
        progress = None if path is None else self._resume_from(path)
        if self._place.rank == 0:  # now that one is known to be good
            removal.remove_leftovers(self._directory, path, start=self._start)
        return progress

    def load_all(self, path: Path) -> Progress:
        """Load one checkpoint with its optimizer. Every rank calls it.

        Raises:
            CheckpointError: it is damaged, or does not fit this configuration or layout.
        """
        self._refuse_damaged(path)
        return self._resume_from(path)

    def _resume_from(self, path: Path) -> Progress:
        with groups.together():
            description = layout.read_description(path)
            notes = fit.check_resumable(path, description, self._mine)
        self._load(path, description, weights_only=False)
        self.last_saved = description.iteration
        if self._place.rank == 0:
            for note in notes:
                _LOG.warning("%s", note)
            _LOG.info("resumed from %s", path)
        return Progress(**{name: getattr(description, name) for name in Progress._fields})

    def load_weights(self, path: Path) -> None:
        """Load only the weights of a checkpoint directory, of any layout. Every rank calls it.

        Raises:
            CheckpointError: it is damaged, or the weights are of another model.
        """
        self._refuse_damaged(path)
        with groups.together():
            description = layout.read_description(path)
            notes = fit.check_model(path, description, self._config.model, meaning=False)
        self._load(path, description, weights_only=True)
        if self._place.rank == 0:
            for note in notes:
                _LOG.warning("%s", note)
            _LOG.info("took the weights of %s (iteration %d)", path, description.iteration)

    def _refuse_damaged(self, path: Path) -> None:
        damage = verify.find_damage(path, self._place)
        if damage is not None:
            refusal = CheckpointError(f"{path}: {damage}; take another checkpoint.")
            refusal.everywhere = True  # all ranks have gathered the same
            raise refusal

    def _load(self, path: Path, description: CheckpointDescription, *, weights_only: bool) -> None:
        metadata = sharded.state_metadata(description.optimizer_format or fit.UNSHARDED)
        # Random states are kept by tensor- and pipeline-parallel rank, and are the same on all that share those.
        mine = self._description(Progress(0, 0, 0)).topology
        same_grid = all(
            description.topology.get(f"{axis}_model_parallel_size") == mine[f"{axis}_model_parallel_size"]
            for axis in ("tensor", "pipeline")
        )
        state = self._state(metadata, loading=True, weights_only=weights_only, rng=same_grid)
        # Leaf parameters are written in place (fp32 with dp_reshardable), hence no_grad.
        with torch.no_grad():
            loaded = sharded.load(state, path)
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
            sharded.set_rng_states(loaded["rng"])
        self._check_weights(path, description, metadata)

    def _check_weights(self, path: Path, description: CheckpointDescription, metadata: dict[str, Any]) -> None:
        """Compare the weights in memory with those that were saved, where they are of the same type."""
        if description.weights is None:
            return
        saved = WeightSum(tuple(description.weights["types"]), description.weights["sum"])
        found = sharded.sum_weights([self._chunk_state(chunk, metadata) for _, chunk in self._named_chunks()])
        if sharded.QUANTIZED not in found.types and found.types == saved.types and found.sum != saved.sum:
            refusal = CheckpointError(
                f"{path}: the weights that were loaded are not those that were saved (checksum {found.sum:08x}, "
                f"not {saved.sum:08x}), though its files are as they were written; do not go on from it with this "
                "software or on these devices."
            )
            refusal.everywhere = True  # all ranks have added up the same
            raise refusal

    # --- state ----------------------------------------------------------------------------------------------------

    def _named_chunks(self) -> list[tuple[str, Any]]:
        if len(self._chunks) == 1:
            return [("model", self._chunks[0])]
        return [(f"model{index}", chunk) for index, chunk in enumerate(self._chunks)]

    def _chunk_state(self, chunk: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        sharded_state = chunk.sharded_state_dict(metadata=metadata)
        # `_extra_state` is the scaling history of FP8's delayed recipe, as a pickle; it builds up again in a few
        # iterations. Elsewhere it is an empty object that would tie a checkpoint to one implementation.
        return {k: v for k, v in sharded_state.items() if not k.endswith("_extra_state")}

    def _state(
        self,
        metadata: dict[str, Any],
        *,
        loading: bool = False,
        weights_only: bool = False,
        rng: bool = True,
    ) -> dict[str, Any]:
        state: dict[str, Any] = {name: self._chunk_state(chunk, metadata) for name, chunk in self._named_chunks()}
        if not weights_only:
            with bucket_padding_kept(self._optimizer):
                state["optimizer"] = self._optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
            if rng:
                state["rng"] = sharded.sharded_rng_states(self._place)
        return state


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}."
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}."


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
