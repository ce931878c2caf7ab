"""Read and write the tensors of a Hugging Face folder one at a time.

safetensors' own writer wants all tensors of a file in memory, and its reader maps whole files, which then
count as resident memory. The format is small enough to do directly: 8 bytes (little-endian length of the
header), a JSON header {name: {dtype, shape, data_offsets}}, then the raw tensors without gaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from megatron_ext.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library


class HfTensor(NamedTuple):
    """Where a tensor lies in a folder."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


class HfReader:
    """A Hugging Face folder: config.json and safetensors weights, in one file or in shards with an index."""

    def __init__(self, folder: Path) -> None:
        """Read the configuration and the headers of all weight files.

        Raises:
            CheckpointError: a file is missing or damaged, or the weights are not safetensors.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; give a Hugging Face model folder.")
        self.folder = folder
        self.config_path = folder / CONFIG
        self.config: dict[str, Any] = _read_json(
            self.config_path, missing="not a Hugging Face model folder (no config.json)"
        )
        self.tensors: dict[str, HfTensor] = {}
        for file in _weight_files(folder):
            self.tensors.update(_read_header(file))

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and types with what the configuration implies.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is not known; or types are mixed.
        """
        problems = []
        for name, shape in expected.items():
            if name not in self.tensors:
                problems.append(f"{self.folder}: tensor {name} is missing.")
            elif self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape)
                problems.append(
                    f"{self.tensors[name].file}: {name} has shape {found}; by config.json it is {list(shape)}."
                )
        problems += [f"{self.folder}: tensor {name} is not known here." for name in self.unknown(expected)]
        if problems:
            shown = problems[:5] + ([f"... and {len(problems) - 5} more."] if len(problems) > 5 else [])
            raise CheckpointError("\n".join(shown))
        dtypes = {str(self.tensors[name].dtype).removeprefix("torch.") for name in expected}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self.folder}: the tensors have mixed types ({', '.join(sorted(dtypes))}); "
                "save them in one type first."
            )

    def unknown(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        """List tensors that are neither expected nor rotary tables, which old folders carry."""
        tied_head = "lm_head.weight" not in expected
        return [
            name
            for name in self.tensors
            if name not in expected
            and not name.endswith("rotary_emb.inv_freq")
            and not (tied_head and name == "lm_head.weight")
        ]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the type it is stored in.

        Raises:
            CheckpointError: the file ends early.
        """
        file, dtype, shape, start = self.tensors[name]
        raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            if not _fill(stream, raw.numpy().data):
                raise CheckpointError(f"{file}: cut short in tensor {name}; download or convert it again.")
        return raw.view(dtype).view(shape)


def _fill(stream: IO[bytes], buffer: memoryview) -> bool:
    # One read(2) moves at most 2 GiB.
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True


def _read_json(file: Path, *, missing: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: {missing}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a table, not {type(value).__name__}.")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        hint = "save the weights as safetensors first" if any(folder.glob("*.bin")) else "weights are missing"
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}; {hint}.")
    weight_map = _read_json(folder / INDEX, missing=f"no {INDEX}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX}: names {name}, which is not in the folder.")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, HfTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT + 1
        if length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{file}: cut short or not a safetensors file.")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise CheckpointError(f"{file}: damaged header; not a safetensors file.") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(extent) for extent in entry["shape"])
            dtype_name = str(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: damaged header at tensor {name}.") from None
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has type {dtype_name}; it must be one of {', '.join(_DTYPES)}.")
        if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
            raise CheckpointError(f"{file}: damaged header at tensor {name} (size and shape differ).")
        if 8 + length + end > size:
            raise CheckpointError(f"{file}: cut short ({size} bytes, {8 + length + end} needed); get it again.")
        tensors[name] = HfTensor(file, dtype, shape, 8 + length + begin)
    return tensors


class HfWriter:
    """Writes `model*.safetensors` of a folder, tensor by tensor, in the order of the shapes given.

    Use it as a context manager; leaving it without an error flushes everything to disk and, with several
    shards, writes the index.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, max_shard_bytes: int
    ) -> None:
        """Plan the shards of an existing folder: each holds up to max_shard_bytes, or one larger tensor."""
        self._folder = folder
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._shards: list[list[str]] = []
        filled = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            if not self._shards or filled + size > max_shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(name)
            filled += size
        self._next = 0  # position of the next tensor in the current shard
        self._shard = -1
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> HfWriter:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        complete = self._shard == len(self._shards) - 1 and self._next == len(self._shards[-1])
        self._close()
        if kind is None:
            assert complete, "tensors are missing"
            if len(self._shards) > 1:
                self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor; its type becomes the writer's."""
        if self._stream is None or self._next == len(self._shards[self._shard]):
            self._open_next()
        assert self._stream is not None
        expected = self._shards[self._shard][self._next]
        assert name == expected, f"tensor {name} comes where {expected} was planned"
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: {tuple(tensor.shape)}, not {self._shapes[name]}"
        raw = tensor.to(self._dtype).contiguous().view(torch.uint8).flatten()
        remaining = raw.numpy().data
        while remaining:  # one write(2) moves at most 2 GiB
            remaining = remaining[self._stream.write(remaining) :]
        self._next += 1

    def _open_next(self) -> None:
        self._close()
        self._shard += 1
        self._next = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[self._shard]:
            end = offset + math.prod(self._shapes[name]) * self._dtype.itemsize
            header[name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned, as the library writes them
        self._stream = (self._folder / self._file_name(self._shard)).open("wb", buffering=0)
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def _close(self) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _file_name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _write_index(self) -> None:
        numel = sum(math.prod(shape) for shape in self._shapes.values())
        weight_map = {name: self._file_name(shard) for shard, names in enumerate(self._shards) for name in names}
        index = {
            "metadata": {"total_parameters": numel, "total_size": numel * self._dtype.itemsize},
            "weight_map": weight_map,
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
