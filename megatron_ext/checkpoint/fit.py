"""Whether a checkpoint fits a run: its model, its layout, its optimizer, its tokenizer, its order of samples."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.config.derived import bucket_size, head_size, padded_vocab_size
from megatron_ext.config.tree import Config, ModelConfig, ParallelConfig
from megatron_ext.errors import CheckpointError

UNSHARDED = "unsharded"
"""Optimizer format of a run without the distributed optimizer."""
# Settings that decide which sample comes when, and what it is; (section, field).
_SAMPLES = (
    ("train", "seed"), ("train", "seq_length"), ("data", "train_data"), ("data", "train_weights"),
    ("data", "train_weights_unit"), ("data", "split"), ("data", "valid_data"), ("data", "sample_index"),
    ("data", "eod_mask_loss"), ("data", "document_mask"),
)  # fmt: skip
# Fields of the model that fit any weights but change what they mean (CodeLlama is continued with another rotary base).
_MEANING = ("layernorm_epsilon", "rotary_base", "rotary_scaling_factor")


class Mine(NamedTuple):
    """What a run says of itself to a checkpoint."""

    config: Config
    tokenizer_sha256: str
    transformer_engine: bool


def optimizer_format(config: Config) -> str:
    """Name the way in which this run saves its optimizer's state."""
    return config.checkpoint.optimizer_format if config.parallel.use_distributed_optimizer else UNSHARDED


def check_resumable(path: Path, description: CheckpointDescription, mine: Mine) -> list[str]:
    """Check that a run can go on from a checkpoint.

    Returns:
        What is different but allowed, to be told: samples that come in another order, or are others.

    Raises:
        CheckpointError: it cannot; the message says what to do.
    """
    check_model(path, description, mine.config.model, meaning=True)
    here, there = optimizer_format(mine.config), description.optimizer_format
    if there is None:
        raise CheckpointError(f"{path}: holds weights only; start from it with checkpoint.init_from.")
    if (here == UNSHARDED) != (there == UNSHARDED):
        raise CheckpointError(
            f"{path}: saved with parallel.use_distributed_optimizer = {str(there != UNSHARDED).lower()}, this "
            "run has the other; use the same, or start anew with checkpoint.init_from."
        )
    moved = _moved(description, mine)
    if moved and there == "dp_reshardable":
        raise CheckpointError(
            f"{path}: saved as dp_reshardable, so only the number of data-parallel ranks may change "
            f"({', '.join(moved)}); {_remedy(path, description)}"
        )
    if description.tokenizer_sha256 not in (None, mine.tokenizer_sha256):
        raise CheckpointError(
            f"{path}: trained with another tokenizer than data.tokenizer ({mine.config.data.tokenizer})."
        )
    return [
        f"samples or their order are not those of {path}: {line}"
        for line in sample_changes(description.config, mine.config)
    ]


def check_model(path: Path, description: CheckpointDescription, model: ModelConfig, *, meaning: bool) -> list[str]:
    """Check that a checkpoint's weights fit a model.

    Args:
        path: the checkpoint's directory, for messages.
        description: what it says of itself.
        model: the model that they are for.
        meaning: settings that give the same weights another meaning must be equal too.

    Returns:
        What is different but allowed, to be told.

    Raises:
        CheckpointError: they do not.
    """
    try:
        theirs = ModelConfig(**description.model)
    except TypeError as error:
        raise CheckpointError(f"{path}: its model is of another version of megapints ({error}).") from None
    there, here = _identity(theirs), _identity(model)
    differing = [f"{name} {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    shaping = [line for line in differing if not line.startswith(_MEANING)]
    if shaping or (meaning and differing):
        raise CheckpointError(f"{path}: of another model: {'; '.join(differing)}.")
    return [f"the weights of {path} were trained with {'; '.join(differing)}"] if differing else []


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


def _moved(description: CheckpointDescription, mine: Mine) -> list[str]:
    """List what dp_reshardable optimizer state does not follow."""
    there = _cut(description.config["parallel"] | description.topology)
    here = _cut(asdict(mine.config.parallel))
    moved = [f"parallel.{name} {there[name]} -> {here[name]}" for name in here if there[name] != here[name]]
    if description.topology.get("transformer_engine", 0) != mine.transformer_engine:
        # Their layers hold the same parameters in another order, and this format goes by order.
        moved.append("model.transformer_impl: local to Transformer Engine, or back")
    return moved


def _remedy(path: Path, description: CheckpointDescription) -> str:
    if description.topology.get("transformer_engine", 0):
        return (
            "resume with the saved settings on GPUs, save once with checkpoint.optimizer_format fully_reshardable, "
            "then change."
        )
    return (
        "resume with the saved settings, or make it fully_reshardable: python tools/convert_checkpoint.py "
        f"reshard --load {path} --save NEW_RUN, then start the new layout in that run_dir."
    )


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
