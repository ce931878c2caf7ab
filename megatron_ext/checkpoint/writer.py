"""Write one rank's share of a checkpoint: a few files, each by a thread of its own, digested as they are written.

It stands in for megatron-core's writer, which starts processes: a save that loses one of them waits for it for ever,
a background save forks a process that holds CUDA and NCCL, what it could not write is found when all is said to be
done, and its queue's process outlives a killed run. Threads end with the run. torch.save and the digest leave the
interpreter's lock alone while they move bytes, so training goes on beside a background save.

A background save is written from host memory that the state was copied into, once: until that copy is made,
training waits, and no longer. The memory is kept for the next save.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_ext.checkpoint.digests import DigestingFile, FileRecord
from megatron_ext.checkpoint.weight_sum import sum_of_part
from megatron_ext.parallel import device

FILES_PER_RANK = 2
_ALIGNMENT = 64


class Entry(NamedTuple):
    """One piece of state, and where it belongs."""

    item: WriteItem
    data: Any
    """A tensor on any device, or an io.BytesIO."""


@dataclass
class Written:
    """What became of a rank's share."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    weight_sum: int = 0
    """This rank's part of the checksum of the weights (weight_sum.py)."""
    errors: list[str] = field(default_factory=list)


class ShardPlan(FileSystemWriter):
    """Takes what a save plan gives this rank to write, and writes nothing yet: megatron-core's planner asks for it."""

    can_run_decentralized_global_plan = True

    def __init__(self, directory: Path, *, rank: int) -> None:
        super().__init__(str(directory))
        self._rank = rank
        self.files: dict[str, list[Entry]] = {}
        """By file name."""

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        """Leave the plan as it is: file names come from the rank."""
        return local_plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Deal this rank's items out over its files, so that all are about as large."""
        entries = [Entry(item, _plain(planner.resolve_data(item))) for item in plan.items]
        for index, dealt in enumerate(_deal(entries, FILES_PER_RANK)):
            self.files[f"__{self._rank}_{index}.distcp"] = dealt


class Staging:
    """Host memory that a background save is copied into; allocated at the first, kept for the next."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def copy(self, files: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        """Copy all tensors, from whatever device, into this memory; training may change them afterwards.

        Raises:
            OSError: there is not as much memory.
            RuntimeError: likewise, of page-locked memory.
        """
        tensors = [entry.data for entries in files.values() for entry in entries if _is_tensor(entry)]
        needed = sum(_aligned(tensor.nbytes) for tensor in tensors)
        if self._memory is None or self._memory.nbytes < needed:
            self._memory = None  # before there is more of it
            self._memory = device.page_locked(needed) if device.is_cuda() else _allocate(max(needed, 1))
        offset = 0
        copies: dict[str, list[Entry]] = {}
        for name, entries in files.items():
            copies[name] = []
            for entry in entries:
                if _is_tensor(entry):
                    copies[name].append(Entry(entry.item, _copy(entry.data, self._memory[offset:])))
                    offset += _aligned(entry.data.nbytes)
                else:
                    copies[name].append(entry)
        device.synchronize()
        return copies


class Writing:
    """A rank's share on its way to the disk."""

    def __init__(self, directory: Path, files: dict[str, list[Entry]], *, weight_keys: Iterable[str]) -> None:
        """Begin to write `files` into an existing directory.

        Args:
            directory: where to.
            files: entries by file name. On the CPU, tensors must not change before `join` returns.
            weight_keys: keys of the tensors that are the model's weights, for `Written.weight_sum`.
        """
        self._directory = directory
        self._weight_keys = frozenset(weight_keys)
        self._written = Written()
        self._lock = threading.Lock()
        self._give_up = threading.Event()
        self._threads = [
            threading.Thread(target=self._write_file, args=(name, entries), name=f"write {name}", daemon=True)
            for name, entries in files.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> bool:
        """Whether anything is still being written."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> Written:
        """Wait for the end, and say what was written or why it was not."""
        for thread in self._threads:
            thread.join()
        return self._written

    def _write_file(self, name: str, entries: Sequence[Entry]) -> None:
        results: list[WriteResult] = []
        weight_sum = 0
        # torch.save takes a CRC-32 of every tensor, at a sixth of the digest's speed; torch.load does not look at it.
        # The setting is the thread's own (torch 2.13).
        torch.serialization.set_crc32_options(False)
        try:
            file = DigestingFile(self._directory / name)
            try:
                for entry in entries:
                    if file.failed or self._give_up.is_set():
                        break
                    if entry.item.index.fqn in self._weight_keys:
                        weight_sum += _sum_of(entry)
                    results.append(_write_entry(file, name, entry))
            finally:
                record = file.close()
        # Whatever it is: this is the one place where it can be told, and the run must not go on as if all were well.
        except Exception as error:
            self._give_up.set()
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            with self._lock:
                self._written.errors.append(f"{self._directory / name}: {reason}")
            return
        with self._lock:
            self._written.results += results
            self._written.files[name] = record
            self._written.weight_sum += weight_sum


def _write_entry(file: DigestingFile, name: str, entry: Entry) -> WriteResult:
    offset = file.tell()
    if _is_tensor(entry):
        torch.save(_with_own_storage(entry.data), cast(IO[bytes], file))  # it uses write and flush alone
    else:
        file.write(entry.data.getbuffer())
    length = file.tell() - offset
    return WriteResult(index=entry.item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))


def _sum_of(entry: Entry) -> int:
    data = entry.item.tensor_data
    assert data is not None
    return sum_of_part(entry.data, entry.item.index.fqn, shape=data.size, offset=data.chunk.offsets)


def is_quantized(tensor: Any) -> bool:
    """Say whether a tensor is one of Transformer Engine's, which stands for another type than it holds (FP8)."""
    return "dequantize" in vars(type(tensor))


def _plain(data: Any) -> Any:
    return data.dequantize() if is_quantized(data) else data


def _is_tensor(entry: Entry) -> bool:
    return entry.item.type != WriteItemType.BYTE_IO


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor on the CPU whose storage holds it and nothing else, without a copy if it lies on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0:
        return tensor.clone()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _deal(entries: Sequence[Entry], count: int) -> list[list[Entry]]:
    """Deal entries out over files, the largest first, each to the file that is smallest so far."""
    files: list[list[Entry]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for entry in sorted(entries, key=_size, reverse=True):
        size, index = heappop(heap)
        files[index].append(entry)
        heappush(heap, (size + _size(entry), index))
    return [file for file in files if file]


def _size(entry: Entry) -> int:
    return int(entry.data.nbytes) if _is_tensor(entry) else entry.data.getbuffer().nbytes


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _copy(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the beginning of memory, which may not be done before the device has been waited for."""
    if tensor.numel() == 0:
        return tensor.detach().cpu().clone()
    # A storage of its own: torch.save writes the whole storage that a tensor lies in.
    place = torch.frombuffer(memory[: tensor.nbytes].numpy(), dtype=tensor.dtype)
    return place.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)


def _allocate(size: int) -> torch.Tensor:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults in the first copy
    return torch.frombuffer(memory, dtype=torch.uint8)
