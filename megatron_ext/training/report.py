"""What a run says of itself before its first iteration."""

from __future__ import annotations

import logging

import torch

from megatron_ext.config.tree import Config
from megatron_ext.data import usage
from megatron_ext.data.blend import DataSplits
from megatron_ext.errors import ConfigError
from megatron_ext.model.flops import parameter_count
from megatron_ext.model.transformer_config import uses_transformer_engine
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place
from megatron_ext.training.describe import table
from megatron_ext.training.run_dir import run_directory
from megatron_ext.training.state import TrainState

_LOG = logging.getLogger(__name__)


def report_start(config: Config, place: Place, data: DataSplits, state: TrainState) -> None:
    """Log the layout, the model and the data, with what this run will read of each source.

    Every rank calls it.

    Raises:
        ConfigError: a source would be read more often than data.max_epochs allows, or not as often as planned.
    """
    with groups.together():
        uses = usage.uses_of(config, data.train.prefixes, data.train.blend)
        if problems := usage.problems(config, uses):
            raise ConfigError(problems)
    if place.rank != 0:
        return
    engine = "Transformer Engine" if uses_transformer_engine(config) else "local modules"
    _LOG.info(
        "%s on %s, torch %s, %s, %s", groups.describe_ranks([place]), device.name(), torch.__version__, engine,
        config.precision.dtype,
    )  # fmt: skip
    _LOG.info("model: %s parameters", f"{parameter_count(config.model).total:,}")
    for line in table(usage.rows(uses, seq_length=config.train.seq_length), usage.ALIGNMENT):
        _LOG.info("data: %s", line)
    for warning in usage.warnings(uses):
        _LOG.warning("data: %s", warning)
    if data.valid is not None:
        _LOG.info("validation: %s samples", f"{data.valid.size:,}")
    if state.iteration:
        _LOG.info(
            "continuing after iteration %d of %d, at sample %s", state.iteration, config.train.train_iters,
            f"{state.consumed_samples:,}",
        )  # fmt: skip
    _LOG.info("run directory: %s", run_directory(config))
