#!/usr/bin/env python3
"""What a checkpoint costs beyond moving its bytes.

A real model with its optimizer is saved and loaded through the training library's own class, on 1 process and on 2.
In turns with it, in the same folder and as many files at a time, the same number of bytes is only written and flushed,
only read, or only copied in memory. Both reads find the page cache emptied of their files. A round is A B B A; printed
is the median of its ratios, and the lowest and highest.

    python bench/checkpoint.py [--gb 0.3] [--ranks 1 2] [--rounds 5] [--folder /tmp]
    python bench/checkpoint.py --hashes

  write   raw write and fsync / synchronous save       1.00: as fast as the disk
  read    raw read / load, digests verified            1.00: as fast as the disk
  block   async save until training goes on / one copy of the state in memory

Needs 4 to 6 times --gb of memory, and 2 times --gb of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.parallel.launch import Launch, free_port

BYTES_PER_PARAMETER = 16
"""fp32: weight, the optimizer's copy, two moments."""
_BLOCK = 4 * 2**20


class Setting(NamedTuple):
    """What is measured."""

    gb: float
    ranks: int
    rounds: int
    folder: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3, help="size of the checkpoint (default 0.3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="times that A B B A is played (default 5)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such files)")
    parser.add_argument("--hashes", action="store_true", help="compare hash functions instead")
    arguments = parser.parse_args(argv)
    if arguments.hashes:
        compare_hashes()
        return 0
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-checkpoint-") as folder:
            _run(Setting(arguments.gb, ranks, arguments.rounds, Path(folder)))
    return 0


def _run(setting: Setting) -> None:
    context = multiprocessing.get_context("spawn")
    port = free_port()
    others = [context.Process(target=measure, args=(setting, rank, port)) for rank in range(setting.ranks)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    if any(process.exitcode for process in others):
        raise SystemExit("a rank failed; see above")


def measure(setting: Setting, rank: int, port: int) -> None:
    """Be one rank: build the model, take turns, and print the ratios on rank 0."""
    import torch

    from megatron_ext.parallel import groups

    logging.disable()
    torch.set_num_threads(1)
    launch = Launch(
        rank=rank, world_size=setting.ranks, local_rank=rank, local_world_size=setting.ranks,
        master_addr="127.0.0.1", master_port=port, launcher="bare",
    )  # fmt: skip
    config = _config(setting, asynchronous=False)
    place = groups.initialize(config.parallel, launch, seed=1)
    saved = Saved(setting, place)
    turns = {
        "write": (saved.save, saved.raw_write, False),
        "read": (saved.load, saved.raw_read, False),
        "block": (saved.save_behind, saved.copy, True),
    }
    if rank == 0:
        print(f"{setting.ranks} ranks, {saved.total / 1e9:.2f} GB in {saved.num_files} files")
    for name, (ours, raw, over) in turns.items():
        for turn in (ours, raw):
            turn()  # once for the caches and the memory that is kept
        rounds = [_round(ours, raw) for _ in range(setting.rounds)]
        ratios = [
            ours_seconds / raw_seconds if over else raw_seconds / ours_seconds for ours_seconds, raw_seconds in rounds
        ]
        if rank == 0:
            seconds = [statistics.median(one) for one in zip(*rounds, strict=True)]
            print(
                f"  {name:6s} ratio {statistics.median(ratios):5.2f} (rounds from {min(ratios):.2f} to "
                f"{max(ratios):.2f})   ours {seconds[0]:7.3f} s   raw {seconds[1]:7.3f} s "
                f"= {saved.total / seconds[1] / 1e9:.2f} GB/s",
                flush=True,
            )
    groups.destroy()


def _round(ours: Callable[[], float], raw: Callable[[], float]) -> tuple[float, float]:
    first, second, third, fourth = ours(), raw(), raw(), ours()
    return (first + fourth) / 2, (second + third) / 2


class Saved:
    """A model with its optimizer, its checkpoint on the disk, and the same bytes without any meaning."""

    def __init__(self, setting: Setting, place: Any) -> None:
        import torch

        from megatron_ext.checkpoint.save_load import Checkpoints
        from megatron_ext.model.gpt import build_model, wrap_for_training
        from megatron_ext.optim.build import build_optimizer, set_rates

        self._place = place
        self._run = setting.folder / "checkpoints"
        self._raw = setting.folder / "raw"
        config = _config(setting, asynchronous=False)
        model = wrap_for_training(config, build_model(config))
        optimizer = build_optimizer(config, model.wrapped)
        for chunk in model.bare:
            for parameter in chunk.parameters():
                parameter.main_grad.normal_()
        set_rates(optimizer, lr=0.01, weight_decay=0.1)
        optimizer.step()
        self._sync, self._behind = (
            Checkpoints(
                _config(setting, asynchronous=asynchronous), place, directory=self._run, bare_chunks=model.bare,
                optimizer=optimizer, tokenizer_sha256="",
            )
            for asynchronous in (False, True)
        )  # fmt: skip
        self._iteration = 0
        self.save()
        files = sorted(self._newest().glob("*.distcp"))
        sizes = {file.name: file.stat().st_size for file in files}
        self.total, self.num_files = sum(sizes.values()), len(sizes)
        self._mine = {name: size for name, size in sizes.items() if name.startswith(f"__{place.rank}_")}
        self._content = {name: torch.randint(256, (size,), dtype=torch.uint8) for name, size in self._mine.items()}
        self._target = {name: torch.zeros_like(content) for name, content in self._content.items()}

    def save(self) -> float:
        """Save synchronously; seconds of the slowest rank."""
        progress = self._next()
        return self._timed(lambda: self._sync.save(progress))

    def save_behind(self) -> float:
        """Begin to save in the background; seconds until training could go on."""
        progress = self._next()
        seconds = self._timed(lambda: self._behind.save(progress))
        self._behind.wait()
        return seconds

    def load(self) -> float:
        """Load from a disk whose cache does not hold the checkpoint."""
        self._forget(self._newest())
        return self._timed(self._sync.resume)

    def raw_write(self) -> float:
        """Write and flush as many bytes in as many files."""
        self._raw.mkdir(exist_ok=True)

        def write(name: str) -> None:
            with (self._raw / name).open("wb", buffering=0) as stream:
                view = self._content[name].numpy().data
                for begin in range(0, len(view), _BLOCK):
                    stream.write(view[begin : begin + _BLOCK])
                os.fsync(stream.fileno())

        for name in self._mine:
            (self._raw / name).unlink(missing_ok=True)
        return self._timed(lambda: _each(write, self._mine))

    def raw_read(self) -> float:
        """Read as many bytes from as many files."""
        if not self._raw.exists():
            self.raw_write()
        self._forget(self._raw)

        def read(name: str) -> None:
            with (self._raw / name).open("rb", buffering=0) as stream:
                view = self._target[name].numpy().data
                offset = 0
                while count := stream.readinto(view[offset : offset + _BLOCK]):
                    offset += count

        return self._timed(lambda: _each(read, self._mine))

    def copy(self) -> float:
        """Copy as many bytes in memory."""

        def copy() -> None:
            for name, content in self._content.items():
                self._target[name].copy_(content)

        return self._timed(copy)

    def _next(self) -> Any:
        from megatron_ext.checkpoint.save_load import Progress

        if self._place.rank == 0 and self._iteration > 0:  # the raw files are removed outside the measurement too
            shutil.rmtree(self._newest())
        self._iteration += 1
        return Progress(self._iteration, self._iteration, self._iteration)

    def _newest(self) -> Path:
        return max(path for path in self._run.iterdir() if path.is_dir())

    def _forget(self, folder: Path) -> None:
        for file in folder.iterdir():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # a page that is not on the disk yet cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _timed(self, work: Callable[[], Any]) -> float:
        from megatron_ext.parallel import groups

        groups.gather_objects(None)
        begin = time.perf_counter()
        work()
        return float(max(groups.gather_objects(time.perf_counter() - begin)))


def _each(work: Callable[[str], None], names: Sequence[str] | dict[str, int]) -> None:
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _config(setting: Setting, *, asynchronous: bool) -> Any:
    """Configure layers of 12.6 M parameters, as many as fill a checkpoint of the size wanted."""
    from megatron_ext.config.tree import (
        CheckpointConfig,
        Config,
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        TrainConfig,
    )

    layers = max(1, round(setting.gb * 1e9 / BYTES_PER_PARAMETER / 12.6e6))
    return Config(
        name="bench",
        model=ModelConfig(
            num_layers=layers, hidden_size=1024, ffn_hidden_size=2732, num_attention_heads=16, num_query_groups=16,
            vocab_size=1000, max_position_embeddings=128,
        ),
        precision=PrecisionConfig(dtype="fp32"),
        data=DataConfig(tokenizer="", train_data=()),
        train=TrainConfig(seq_length=128, micro_batch_size=1, global_batch_size=setting.ranks, train_iters=1),
        optimizer=OptimizerConfig(lr=0.01),
        checkpoint=CheckpointConfig(async_save=asynchronous),
    )  # fmt: skip


def compare_hashes(size: int = 2**28) -> None:
    """Print what hash functions read per second of CPU time, beside a plain copy."""
    import xxhash

    content = os.urandom(2**20) * (size // 2**20)
    target = bytearray(size)
    functions: dict[str, Callable[[], Any]] = {
        "xxhash xxh3_128": lambda: xxhash.xxh3_128(content).digest(),
        "xxhash xxh3_64": lambda: xxhash.xxh3_64(content).digest(),
        "zlib crc32": lambda: zlib.crc32(content),
        "hashlib sha256": lambda: hashlib.sha256(content).digest(),
        "hashlib sha1": lambda: hashlib.sha1(content).digest(),
        "hashlib blake2b": lambda: hashlib.blake2b(content).digest(),
        "a copy": lambda: memoryview(target).__setitem__(slice(None), content),
    }
    for name, function in functions.items():
        best = min(_cpu_seconds(function) for _ in range(3))
        print(f"{name:16s} {size / best / 1e9:6.2f} GB/s")


def _cpu_seconds(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


if __name__ == "__main__":
    sys.exit(main())
