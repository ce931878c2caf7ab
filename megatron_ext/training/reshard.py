"""Write a checkpoint again with its optimizer's state in another format: the part that each rank does.

A dp_reshardable checkpoint only loads at the tensor- and pipeline-parallel sizes that it was saved at, so there must be
as many ranks; one data-parallel rank is enough. They need no GPU, and no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.config.load import config_from_dict
from megatron_ext.config.tree import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer
from megatron_ext.parallel import groups
from megatron_ext.parallel.checksum import tensor_checksums
from megatron_ext.parallel.launch import Launch
from megatron_ext.training.step import connect

Format = Literal["fully_reshardable", "dp_reshardable"]


def reshard_config(checkpoint: Path, description: CheckpointDescription, optimizer_format: Format) -> Config:
    """Rebuild a checkpoint's configuration, for as many ranks as its tensor and pipeline sizes make.

    Raises:
        CheckpointError: it cannot be written again in the format wanted, or there is no need to.
    """
    where = str(checkpoint / layout.DESCRIPTION)
    if description.optimizer_format is None:
        raise CheckpointError(f"{checkpoint}: holds weights only; they load into any layout with checkpoint.init_from.")
    if description.optimizer_format not in get_args(Format):
        raise CheckpointError(
            f"{checkpoint}: saved with parallel.use_distributed_optimizer = false; it resumes in any layout as it is."
        )
    if description.optimizer_format == optimizer_format:
        raise CheckpointError(f"{checkpoint}: its optimizer's state is {optimizer_format} already.")
    if description.topology.get("transformer_engine"):
        raise CheckpointError(
            f"{checkpoint}: trained with Transformer Engine, whose layers hold their parameters in an order of their "
            "own, and it is not there without a GPU. Resume it on GPUs at the saved sizes with "
            f"--checkpoint.optimizer_format {optimizer_format} --train.exit_iters {description.iteration + 1}; what "
            "that saves is in the other format."
        )
    config = config_from_dict(_without_none(description.config), source=where)
    return replace(
        config,
        parallel=replace(config.parallel, context_parallel_size=1),
        checkpoint=replace(config.checkpoint, async_save=False, keep_last=None, optimizer_format=optimizer_format),
        model=replace(config.model, transformer_impl="local"),
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Write None as a configuration file does."""
    return {
        key: _without_none(value) if isinstance(value, dict) else "none" if value is None else value
        for key, value in values.items()
    }


def reshard(
    checkpoint: Path, checkpoints: Path, *, optimizer_format: Format, launch: Launch, on_built: Callable[[], None]
) -> None:
    """Load a checkpoint, save it in the other format, and compare what the new one gives. Every rank calls it.

    Args:
        checkpoint: the directory to load.
        checkpoints: folder to save the new one into.
        optimizer_format: of the new one.
        launch: this process among those of the checkpoint's tensor- and pipeline-parallel sizes.
        on_built: called when the model stands, before anything is read.

    Raises:
        CheckpointError: it is damaged, does not fit this version, or the new one is not the same.
    """
    description = layout.read_description(checkpoint)
    config = reshard_config(checkpoint, description, optimizer_format)
    place = groups.initialize(config.parallel, launch, seed=config.train.seed)
    model = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, model.wrapped)
    connect(config, model, optimizer)
    store = Checkpoints(
        config,
        place,
        directory=checkpoints,
        bare_chunks=model.bare,
        optimizer=optimizer,
        tokenizer_sha256=description.tokenizer_sha256 or "",
    )
    groups.gather_objects(None)  # all of them stand
    on_built()
    progress = store.load_all(checkpoint)
    before = tensor_checksums(_tensors(model.bare, optimizer))
    store.save(progress)
    store.close()
    with torch.no_grad():
        for tensor in _tensors(model.bare, optimizer):
            tensor.zero_()
    store.load_all(layout.published_path(checkpoints, progress.iteration))
    with groups.together():
        if tensor_checksums(_tensors(model.bare, optimizer)) != before:
            raise CheckpointError(
                f"{checkpoint}: loaded again from its new form, weights or optimizer are not the same; nothing was "
                "published. That is a fault of this version: keep the old one, and report it."
            )
    groups.destroy()


def _tensors(chunks: list[Any], optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield this rank's weights, and the fp32 copies and moments of its optimizer."""
    for chunk in chunks:
        yield from (parameter.data for parameter in chunk.parameters())
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                state = one.optimizer.state[parameter]
                yield from (state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor))
