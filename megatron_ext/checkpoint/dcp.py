"""Read and write a `torch_dist` checkpoint directory with torch.distributed.checkpoint (DCP) alone.

No megatron, no process group, no GPU. The directory holds `.metadata` (a pickle: which file has which part
of which tensor), `*.distcp` (the parts, each by torch.save), `common.pt` (plain values) and `metadata.json`
(Megatron's format version). Tensors of all layers lie stacked under one key, layers on axis 0, cut in any way
by the tensor- and pipeline-parallel layout that wrote them; `CheckpointReader.read` puts a tensor, or one
layer of it, together.

Both directions stream: one tensor, or one layer of a stacked tensor, is in memory at a time.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_ext.errors import CheckpointError

METADATA = ".metadata"
# megatron/core/dist_checkpointing/core.py, CheckpointingConfig, of 0.16.1 and 0.19.2.
_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# All that DCP (torch 2.11 to 2.13) and megatron-core (0.16.1, 0.19.2) put into `.metadata`. Data classes and
# enums only: building one runs no code of the file's choosing. torch dtypes are admitted besides.
_ADMITTED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "builtins": {"dict", "frozenset", "list", "set", "tuple"},
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}


class TensorInfo(NamedTuple):
    """Global shape and type of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The tensors of one `torch_dist` directory, whatever layout wrote it."""

    def __init__(self, directory: Path) -> None:
        """Read the directory's index; tensors are read one by one, later.

        Raises:
            CheckpointError: it is not a torch_dist checkpoint, or its `.metadata` is damaged or holds foreign
                objects.
        """
        self.directory = directory
        _check_format(directory)
        self._metadata = _read_metadata(directory / METADATA)
        self._storage = _MetadataGivenReader(directory)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, TensorInfo] = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, *, layer: int | None = None) -> torch.Tensor:
        """Read one tensor, or one layer of a stacked one (without the layer axis), in its stored type.

        Raises:
            CheckpointError: there is no such tensor, or its data is missing, cut short or damaged.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.directory}: holds no tensor {key}; it is not a checkpoint of this model.")
        shape, dtype = self.tensors[key]
        if layer is None:
            wanted = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=torch.Size(shape))
        else:
            wanted = ChunkStorageMetadata(
                offsets=torch.Size([layer] + [0] * (len(shape) - 1)), sizes=torch.Size([1, *shape[1:]])
            )
        target = torch.empty(wanted.sizes, dtype=dtype)
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        self._check_parts(key, items, target.numel())
        try:
            self._storage.read_data(LoadPlan(items), _OneTensorLoadPlanner(target)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, AssertionError, pickle.UnpicklingError) as error:
            files = sorted({self._part(item)[0] for item in items})
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.directory}: {key}: damaged data in {', '.join(files)} ({reason}).") from None
        return target if layer is None else target[0]

    def _check_parts(self, key: str, items: list[ReadItem], numel: int) -> None:
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != numel:
            raise CheckpointError(
                f"{self.directory}: {key}: the stored parts cover {covered} of {numel} numbers; "
                f"the checkpoint is damaged, use another."
            )
        for item in items:
            name, end = self._part(item)
            if Path(name).name != name:
                raise CheckpointError(f"{self.directory}: {key}: {name!r} is not a file of the checkpoint.")
            file = self.directory / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing; the checkpoint is incomplete, use another.")
            size = file.stat().st_size
            if size < end:
                raise CheckpointError(f"{file}: cut short ({size} bytes, {end} needed); use another checkpoint.")

    def _part(self, item: ReadItem) -> tuple[str, int]:
        """Name the file that holds a part, and the byte at which the part ends."""
        info = self._storage.storage_data.get(item.storage_index)
        if info is None:
            raise CheckpointError(f"{self.directory / METADATA}: does not say where {item.storage_index.fqn} lies.")
        return str(info.relative_path), int(info.offset) + int(info.length)


def _check_format(directory: Path) -> None:
    file = directory / "metadata.json"
    try:
        found = json.loads(file.read_text())
        backend = found["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a torch_dist checkpoint (no metadata.json).") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    if backend != "torch_dist":
        raise CheckpointError(f"{file}: format {backend!r} is not supported; it must be torch_dist.")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ADMITTED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"holds a foreign object ({module}.{name}), which loading could let run code; do not trust this checkpoint."
        )


def _read_metadata(file: Path) -> Metadata:
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; the checkpoint was never finished, use another.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    # A damaged pickle raises whatever the first wrong opcode leads to.
    except Exception as error:
        raise CheckpointError(f"{file}: damaged ({type(error).__name__}: {error}).") from None
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.state_dict_metadata, dict)
        or not isinstance(metadata.storage_data, dict)
    ):
        raise CheckpointError(f"{file}: not an index of torch.distributed.checkpoint.")
    return metadata


class _MetadataGivenReader(FileSystemReader):
    """FileSystemReader that never unpickles `.metadata` itself: it is handed the one that was read safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        raise AssertionError("metadata is read by _read_metadata only")


class _OneTensorLoadPlanner(LoadPlanner):
    """Puts the parts that are read into their places in one target tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are asked for")

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        raise AssertionError("the plan is made by CheckpointReader.read")

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("the plan is made by CheckpointReader.read")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise AssertionError("the plan is made by CheckpointReader.read")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise AssertionError("the plan is made by CheckpointReader.read")


class WriteRequest(NamedTuple):
    """One tensor, or one layer of a stacked one, to be written."""

    key: str
    layer: int | None


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    requests: list[WriteRequest],
    produce: Callable[[WriteRequest], torch.Tensor],
    *,
    common: Mapping[str, Any],
) -> None:
    """Write a directory that megatron-core loads into any layout, holding one request's tensor at a time.

    Args:
        directory: an empty directory; the caller publishes it.
        tensors: global shape (layers on axis 0 of a stacked tensor) and type of each key.
        requests: what to produce, in this order; together they must cover every tensor.
        produce: called once per request, right before its tensor is written; the result has the tensor's
            type and shape, without the layer axis where `layer` is given.
        common: plain values for `common.pt`, so that it loads with weights_only.
    """
    covered = {key: 0 for key in tensors}
    for request in requests:
        info = tensors[request.key]
        covered[request.key] += math.prod(info.shape if request.layer is None else info.shape[1:])
    missing = [key for key, numel in covered.items() if numel != math.prod(tensors[key].shape)]
    assert not missing, f"requests do not cover {missing} exactly"
    torch.save(dict(common), directory / "common.pt")
    # per_thread_copy_ahead=0 and one thread: DCP then asks for each tensor just before it writes it, in our
    # order, with a CUDA device present too.
    writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = _StreamingSavePlanner(tensors, requests, produce)
        save({}, storage_writer=writer, planner=planner, no_dist=True)
    (directory / "metadata.json").write_text(json.dumps(_MEGATRON_FORMAT))


class _StreamingSavePlanner(SavePlanner):
    """Plans from shapes alone, and makes each tensor only when DCP is about to write it."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        requests: list[WriteRequest],
        produce: Callable[[WriteRequest], torch.Tensor],
    ) -> None:
        self._tensors = tensors
        self._requests = requests
        self._produce = produce
        self._request_of: dict[MetadataIndex, WriteRequest] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert not state_dict, "tensors come from the requests"

    def create_local_plan(self) -> SavePlan:
        items = []
        for request in self._requests:
            chunk = self._chunk(request)
            index = MetadataIndex(request.key, chunk.offsets)
            self._request_of[index] = request
            info = self._tensors[request.key]
            data = TensorWriteData(chunk, TensorProperties(dtype=info.dtype), torch.Size(info.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {}
        for request in self._requests:
            info = self._tensors[request.key]
            entry = entries.setdefault(
                request.key,
                TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), []),
            )
            entry.chunks.append(self._chunk(request))
        return all_plans, Metadata(entries)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        request = self._request_of[write_item.index]
        info = self._tensors[request.key]
        tensor = self._produce(request)
        if request.layer is not None:
            tensor = tensor.unsqueeze(0)
        expected = (self._chunk(request).sizes, info.dtype)
        assert (tensor.shape, tensor.dtype) == expected, f"{request}: {tensor.shape}, {tensor.dtype}, not {expected}"
        return tensor.contiguous()

    def _chunk(self, request: WriteRequest) -> ChunkStorageMetadata:
        shape = self._tensors[request.key].shape
        if request.layer is None:
            return ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
        rest = len(shape) - 1
        return ChunkStorageMetadata(torch.Size([request.layer] + [0] * rest), torch.Size([1, *shape[1:]]))
