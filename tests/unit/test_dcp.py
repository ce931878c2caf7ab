"""Reading and writing torch_dist directories, against torch's own reader and writer."""

from __future__ import annotations

import itertools
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_ext.checkpoint.dcp import CheckpointReader, TensorInfo, WriteRequest, write_checkpoint
from megatron_ext.errors import CheckpointError


class _GridPlanner(dcp.DefaultSavePlanner):
    """Cuts each tensor into a grid of parts, as tensor- and pipeline-parallel ranks would leave them."""

    def __init__(self, tensors: dict[str, torch.Tensor], grids: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.tensors, self.grids = tensors, grids

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, tensor in self.tensors.items():
            steps = [size // parts for size, parts in zip(tensor.shape, self.grids[key], strict=True)]
            for corner in itertools.product(*(range(parts) for parts in self.grids[key])):
                offsets = torch.Size(index * step for index, step in zip(corner, steps, strict=True))
                chunk = ChunkStorageMetadata(offsets, torch.Size(steps))
                data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.shape)
                items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {}
        for item in all_plans[0].items:
            assert item.tensor_data is not None
            properties, size = item.tensor_data.properties, item.tensor_data.size
            entry = entries.setdefault(item.index.fqn, TensorStorageMetadata(properties, size, []))
            entry.chunks.append(item.tensor_data.chunk)
        return all_plans, Metadata(entries)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        place = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[write_item.index.fqn][place].clone()


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "stacked": torch.randn(4, 6, 8, generator=generator),
        "half": torch.randn(12, 4, generator=generator).bfloat16(),
        "norm": torch.randn(4, 8, generator=generator),
    }


def _write_grid(directory: Path, grids: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    tensors = _tensors()
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False)
    dcp.save({}, storage_writer=writer, planner=_GridPlanner(tensors, grids), no_dist=True)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return tensors


def _write(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write with the code under test: three-dimensional tensors and "norm" by layer, the rest whole."""
    requests = []
    for key, tensor in tensors.items():
        layers = range(tensor.size(0)) if key in ("stacked", "norm") else [None]
        requests += [WriteRequest(key, layer) for layer in layers]
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}

    def produce(request: WriteRequest) -> torch.Tensor:
        tensor = tensors[request.key]
        return tensor if request.layer is None else tensor[request.layer]

    directory.mkdir()
    write_checkpoint(directory, infos, requests, produce, common={"iteration": 3})


@pytest.mark.parametrize(
    "grids",
    [
        {"stacked": (1, 1, 1), "half": (1, 1), "norm": (1, 1)},
        {"stacked": (4, 1, 1), "half": (2, 1), "norm": (4, 1)},
        {"stacked": (2, 3, 2), "half": (3, 2), "norm": (2, 4)},
    ],
    ids=["whole", "by_layer", "by_tp_and_pp"],
)
def test_reader_of_any_cut_gives_the_tensors(tmp_path: Path, grids: dict[str, tuple[int, ...]]) -> None:
    tensors = _write_grid(tmp_path, grids)
    reader = CheckpointReader(tmp_path)
    assert reader.tensors == {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}
    for key, tensor in tensors.items():
        assert torch.equal(reader.read(key), tensor)
    for layer in range(4):
        assert torch.equal(reader.read("stacked", layer=layer), tensors["stacked"][layer])
        assert torch.equal(reader.read("norm", layer=layer), tensors["norm"][layer])


def test_write_checkpoint_read_by_torch_gives_the_tensors(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path / "c", tensors)
    found = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor)


def test_write_checkpoint_common_values_load_as_weights_only(tmp_path: Path) -> None:
    _write(tmp_path / "c", _tensors())
    assert torch.load(tmp_path / "c" / "common.pt", weights_only=True) == {"iteration": 3}


def test_write_checkpoint_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    requests = [WriteRequest("stacked", layer) for layer in range(6)]
    storages: list[Any] = []
    alive: list[int] = []

    def produce(request: WriteRequest) -> torch.Tensor:
        alive.append(sum(storage() is not None for storage in storages))
        tensor = torch.full((5, 5), float(request.layer or 0))
        storages.append(weakref.ref(tensor))
        return tensor

    write_checkpoint(tmp_path, {"stacked": TensorInfo((6, 5, 5), torch.float32)}, requests, produce, common={})
    # DCP's loop still names the tensor it wrote last while it asks for the next.
    assert len(alive) == 6 and max(alive) <= 1


def test_write_checkpoint_requests_that_leave_a_layer_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="stacked"):
        write_checkpoint(
            tmp_path,
            {"stacked": TensorInfo((2, 3), torch.float32)},
            [WriteRequest("stacked", 0)],
            lambda request: torch.zeros(3),
            common={},
        )


# --- damaged and foreign directories ------------------------------------------------------------------------


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def _edit_metadata(directory: Path, edit: Callable[[Metadata], object]) -> None:
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def _move_data_outside(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"


def _drop_a_part(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["stacked"]
    assert isinstance(entry, TensorStorageMetadata)
    entry.chunks.pop()


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _overwrite(file: Path) -> None:
    file.write_bytes(b"\x07" * file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "metadata.json").unlink(), "not a torch_dist checkpoint (no metadata.json)"),
        (lambda d: (d / "metadata.json").write_text("{"), "metadata.json: cannot be read"),
        (
            lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "'zarr' is not supported",
        ),
        (lambda d: (d / ".metadata").unlink(), ".metadata: missing; the checkpoint was never finished"),
        (lambda d: _truncate(d / ".metadata"), ".metadata: damaged"),
        (
            lambda d: (d / ".metadata").write_bytes(pickle.dumps({"a": 1})),
            "not an index of torch.distributed",
        ),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps(_RunsCode())), "foreign object (posix.mkdir)"),
        (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
        (lambda d: _truncate(d / "__0_0.distcp"), "__0_0.distcp: cut short"),
        (lambda d: _overwrite(d / "__0_0.distcp"), "damaged data in __0_0.distcp"),
        (lambda d: _edit_metadata(d, _move_data_outside), "is not a file of the checkpoint"),
        (lambda d: _edit_metadata(d, lambda m: m.storage_data.clear()), "does not say where"),
        (
            lambda d: _edit_metadata(d, _drop_a_part),
            "the stored parts cover 144 of 192 numbers",
        ),
    ],
)
def test_reader_of_a_damaged_directory_tells_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "c", _tensors())
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError) as raised:
        reader = CheckpointReader(tmp_path / "c")
        for key in reader.tensors:
            reader.read(key)
    assert message in str(raised.value)
    assert str(tmp_path / "c") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("function", ["posix.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.save"])
def test_reader_of_metadata_naming_a_function_refuses_it(tmp_path: Path, function: str) -> None:
    _write(tmp_path / "c", _tensors())
    module, name = function.rsplit(".", 1)
    (tmp_path / "c" / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(CheckpointError, match="foreign object"):
        CheckpointReader(tmp_path / "c")


def test_reader_of_a_missing_tensor_names_it(tmp_path: Path) -> None:
    _write(tmp_path / "c", _tensors())
    with pytest.raises(CheckpointError, match="holds no tensor absent"):
        CheckpointReader(tmp_path / "c").read("absent")
