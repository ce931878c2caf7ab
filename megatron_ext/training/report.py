"""What a run says of itself before its first iteration."""

from __future__ import annotations

import logging

import torch

from megatron_ext.config.tree import Config
from megatron_ext.data.blend import DataSplits
from megatron_ext.errors import ConfigError
from megatron_ext.model.flops import parameter_count
from megatron_ext.model.transformer_config import uses_transformer_engine
from megatron_ext.optim.schedule import total_samples
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place
from megatron_ext.training.run_dir import run_directory
from megatron_ext.training.state import TrainState

_LOG = logging.getLogger(__name__)


def report_start(config: Config, place: Place, data: DataSplits, state: TrainState) -> None:
    """Log the layout, the model and the data, with the passes over each source that this run will make.

    Every rank calls it.

    Raises:
        ConfigError: a source would be read more often than data.max_epochs allows.
    """
    with groups.together():
        _check_epochs(config, data)
    if place.rank != 0:
        return
    engine = "Transformer Engine" if uses_transformer_engine(config) else "local modules"
    _LOG.info(
        "%s on %s, torch %s, %s, %s", groups.describe_ranks([place]), device.name(), torch.__version__, engine,
        config.precision.dtype,
    )  # fmt: skip
    _LOG.info("model: %s parameters", f"{parameter_count(config.model).total:,}")
    epochs = data.train.blend.epochs(total_samples(config.train))
    for prefix, size, passes in zip(data.train.prefixes, data.train.blend.sizes, epochs, strict=True):
        _LOG.info("data: %s: %s samples, %.2f passes over the run", prefix, f"{size:,}", passes)
    if data.valid is not None:
        _LOG.info("validation: %s samples", f"{data.valid.size:,}")
    if state.iteration:
        _LOG.info(
            "continuing after iteration %d of %d, at sample %s", state.iteration, config.train.train_iters,
            f"{state.consumed_samples:,}",
        )  # fmt: skip
    _LOG.info("run directory: %s", run_directory(config))


def _check_epochs(config: Config, data: DataSplits) -> None:
    limit = config.data.max_epochs
    if limit is None:
        return
    epochs = data.train.blend.epochs(total_samples(config.train))
    problems = [
        f"data.max_epochs ({limit:g}) would be passed: {prefix} is read {passes:.2f} times in "
        f"{config.train.train_iters} iterations; train for fewer, or add data."
        for prefix, passes in zip(data.train.prefixes, epochs, strict=True)
        if passes > limit
    ]
    if problems:
        raise ConfigError(problems)
