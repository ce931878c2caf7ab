"""What a run starts from: its own newest checkpoint, other weights, or its fresh initialisation."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from megatron_ext.checkpoint import hf_convert, hf_llama, layout, removal
from megatron_ext.checkpoint.hf_folder import HfReader
from megatron_ext.checkpoint.save_load import Checkpoints, Progress
from megatron_ext.config.tree import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel import groups
from megatron_ext.training.run_dir import run_directory
from megatron_ext.training.state import TrainState

_LOG = logging.getLogger(__name__)


def starting_state(config: Config, checkpoints: Checkpoints) -> TrainState:
    """Load what the run starts from, and say where it stands. Every rank calls it.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    settings, reliability = config.checkpoint, config.reliability
    kept_losses = reliability.spike_window_iters if reliability.spike_deviations is not None else 0
    if settings.resume:
        progress = checkpoints.resume()
        if progress is not None:
            return TrainState.from_progress(progress, kept_losses=kept_losses)
    else:
        with groups.together():
            if groups.where_am_i().rank == 0:
                _refuse_to_overwrite(run_directory(config) / layout.CHECKPOINTS)
    if settings.init_from is not None:
        checkpoints.load_weights(_weights(config, Path(settings.init_from)))
    elif groups.where_am_i().rank == 0:
        _LOG.info("starting from random weights (seed %d)", config.train.seed)
    return TrainState.from_progress(Progress(0, 0, 0), kept_losses=kept_losses)


def _refuse_to_overwrite(checkpoints: Path) -> None:
    removal.put_back_replaced(checkpoints)
    found = layout.find_newest(checkpoints)
    damaged = [one.path for one in found.rejected if layout.iteration_of(one.path) is not None]
    if held := found.path or next(iter(damaged), None):
        raise CheckpointError(
            f"{held}: the run directory already holds a checkpoint and checkpoint.resume is false; "
            "name another run_dir, or remove it."
        )
    removal.remove_leftovers(checkpoints, None)


def _weights(config: Config, source: Path) -> Path:
    """Find the checkpoint directory to take weights from; a Hugging Face folder is converted into the run first."""
    is_folder = (source / "config.json").is_file() and not (source / layout.CHECKPOINTS).is_dir()
    path: Path | None = None
    with groups.together():
        if groups.where_am_i().rank == 0:
            path = _convert(config, source) if is_folder else layout.resolve(source)
    found = groups.broadcast_object(path)
    assert found is not None
    return found


def _convert(config: Config, folder: Path) -> Path:
    reader = HfReader(folder)
    found = hf_llama.model_from_hf(reader.config, where=str(reader.config_path))
    for note in found.notes:
        _LOG.info("%s: %s", folder, note)
    model = replace(found.model, make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by)
    _LOG.info("converting %s", folder)
    return hf_convert.import_folder(
        reader, model, run_directory(config) / "init_from", tokenizer_sha256=None, on_bytes=lambda _: None
    )
