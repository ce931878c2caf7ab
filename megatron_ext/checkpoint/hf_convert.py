"""Stream weights between a `torch_dist` checkpoint and a Hugging Face folder, a layer's tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_ext.checkpoint import hf_llama, layout
from megatron_ext.checkpoint.dcp import CheckpointReader, TensorInfo, WriteRequest, write_checkpoint
from megatron_ext.checkpoint.hf_folder import HfReader, HfWriter
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.config.tree import ModelConfig
from megatron_ext.errors import CheckpointError

OnBytes = Callable[[int], None]
"""Called with the number of bytes just written."""


def model_of(description: CheckpointDescription, *, where: Path) -> ModelConfig:
    """Rebuild the model's configuration from `megapints.json`.

    Raises:
        CheckpointError: it was written by a version with other fields.
    """
    try:
        return ModelConfig(**description.model)
    except TypeError as error:
        raise CheckpointError(f"{where / layout.DESCRIPTION}: its model is of another version ({error}).") from None


def stored_dtype(reader: CheckpointReader, model: ModelConfig) -> torch.dtype:
    """Check that a checkpoint holds every tensor of the model, and return the type of its weights.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type than the rest.
    """
    problems = []
    for key, shape in hf_llama.megatron_shapes(model).items():
        found = reader.tensors.get(key)
        if found is None:
            problems.append(f"{reader.directory}: tensor {key} is missing.")
        elif found.shape != shape:
            problems.append(
                f"{reader.directory}: {key} has shape {list(found.shape)}; by its model it is {list(shape)}."
            )
    if problems:
        raise CheckpointError("\n".join(problems))
    dtypes = {reader.tensors[key].dtype for key in hf_llama.megatron_shapes(model)}
    if len(dtypes) > 1:
        raise CheckpointError(f"{reader.directory}: mixed types of weights ({', '.join(map(str, dtypes))}).")
    return dtypes.pop()


def export_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Size of the exported weights."""
    return sum(math.prod(shape) for shape in hf_llama.hf_shapes(model).values()) * dtype.itemsize


def export_weights(
    reader: CheckpointReader,
    model: ModelConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    on_bytes: OnBytes,
) -> None:
    """Write `model*.safetensors` (and their index) into an existing folder, vocabulary padding stripped.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    stored_dtype(reader, model)
    with HfWriter(folder, hf_llama.hf_shapes(model), dtype, max_shard_bytes=max_shard_bytes) as writer:
        for piece in hf_llama.pieces(model):
            stored = reader.read(piece.key, layer=piece.layer)
            for name, tensor in hf_llama.to_hf(piece, stored, model).items():
                writer.write(name, tensor)
                on_bytes(tensor.numel() * dtype.itemsize)


def import_bytes(reader: HfReader, model: ModelConfig) -> int:
    """Size of the weights as a checkpoint, vocabulary padding included."""
    itemsize = reader.tensors[next(iter(hf_llama.hf_shapes(model)))].dtype.itemsize
    return sum(math.prod(shape) for shape in hf_llama.megatron_shapes(model).values()) * itemsize


def import_weights(reader: HfReader, model: ModelConfig, directory: Path, *, on_bytes: OnBytes) -> None:
    """Write a Hugging Face folder's weights into an empty directory as a `torch_dist` checkpoint, same bits.

    Raises:
        CheckpointError: the folder's tensors are not those of the model, or are damaged.
    """
    shapes = hf_llama.hf_shapes(model)
    reader.check_shapes(shapes)
    dtype = reader.tensors[next(iter(shapes))].dtype
    pieces = {WriteRequest(piece.key, piece.layer): piece for piece in hf_llama.pieces(model)}

    def produce(request: WriteRequest) -> torch.Tensor:
        piece = pieces[request]
        tensor = hf_llama.from_hf(piece, [reader.read(name) for name in piece.hf_names], model)
        on_bytes(tensor.nbytes)
        return tensor

    infos = {key: TensorInfo(shape, dtype) for key, shape in hf_llama.megatron_shapes(model).items()}
    # content_metadata is what Megatron reads to learn how optimizer state was cut; there is none.
    write_checkpoint(directory, infos, list(pieces), produce, common={"content_metadata": {}})


def import_folder(
    reader: HfReader, model: ModelConfig, run: Path, *, tokenizer_sha256: str | None, on_bytes: OnBytes
) -> Path:
    """Publish the weights of a Hugging Face folder as iteration 0 of a run directory. One rank calls it.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: the folder's tensors are not those of the model, or are damaged.
    """
    temporary = layout.prepare_temporary(run / layout.CHECKPOINTS, 0)
    import_weights(reader, model, temporary, on_bytes=on_bytes)
    description = CheckpointDescription(
        iteration=0,
        consumed_samples=0,
        consumed_tokens=0,
        model=asdict(model),
        config={},
        optimizer_format=None,
        tokenizer_sha256=tokenizer_sha256,
        topology={},
    )
    return layout.publish(temporary, description)
