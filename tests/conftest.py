"""Fixtures that many tests share: a small tokenizer, small token files, and the commands that train on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_ext.parallel.launch import free_port

ROOT = Path(__file__).resolve().parents[1]

TINY_TOML = """
name = "tiny"
run_dir = "{run_dir}"

[model]
num_layers = 4
hidden_size = 32
ffn_hidden_size = 64
num_attention_heads = 4
num_query_groups = 2
vocab_size = 97
make_vocab_size_divisible_by = 16
max_position_embeddings = 32

[precision]
dtype = "fp32"

[data]
tokenizer = "{data}/tokenizer"
train_data = ["{data}/a", "{data}/b"]
split = "90,10"

[train]
seq_length = 16
micro_batch_size = 1
global_batch_size = 8
train_iters = 5
eval_interval = 5
eval_iters = 2

[optimizer]
lr = 1e-2
min_lr = 1e-3
lr_warmup_iters = 2

[checkpoint]
save_interval = "none"

[log]
interval = 1
tensorboard = false
"""


@dataclass(frozen=True)
class Finished:
    """A training command that ended."""

    returncode: int
    output: str
    run_dir: Path

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        """Read the metrics of one kind; none where the run was refused before its first row."""
        metrics = self.run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind]


@dataclass(frozen=True)
class Trainer:
    """Runs the real `pretrain_pints.py` on the tiny data."""

    data: Path
    work: Path

    def config(self, run: str) -> Path:
        """Write the tiny configuration for a run directory of this name."""
        path = self.work / f"{run}.toml"
        path.write_text(TINY_TOML.format(run_dir=self.work / run, data=self.data))
        return path

    def command(self, run: str, *overrides: str, ranks: int = 1) -> list[str]:
        """The command line of a run, under torchrun where it has several ranks."""
        script = [str(ROOT / "pretrain_pints.py"), str(self.config(run)), *overrides]
        if ranks == 1:
            return [sys.executable, *script]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        return [sys.executable, *launcher, *script]

    def train(
        self,
        run: str,
        *overrides: str,
        ranks: int = 1,
        fails: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run to the end; its exit code is checked unless it is expected to fail."""
        done = subprocess.run(
            self.command(run, *overrides, ranks=ranks),
            capture_output=True, text=True, timeout=280, cwd=self.work,
            env=child_environment() | dict(environment or {}),
        )  # fmt: skip
        output = done.stdout + done.stderr
        if not fails:
            assert done.returncode == 0, output[-6000:]
        return Finished(done.returncode, output, self.work / run)


def child_environment() -> dict[str, str]:
    """Environment of a command under test: no launcher's variables, one thread (sums in one order)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def build_tiny_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE of 97 tokens into a folder; returns its size."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    alphabet = [c for c in "abcdefghijklmnopqrstuvwxyz .,:;()_=\"'0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=97, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(json.__file__).read_text()], trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = tokenizer.get_vocab_size()
    assert size == 97, size
    return size


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and two token files a, b whose tokens repeat themselves, so that loss can fall."""
    from megatron_ext.data.indexed import IndexedWriter

    folder = tmp_path_factory.mktemp("tiny_data")
    size = build_tiny_tokenizer(folder / "tokenizer")
    generator = np.random.default_rng(20)
    for name, documents in (("a", 300), ("b", 200)):
        with IndexedWriter(folder / name, dtype=np.dtype("<u2")) as writer:
            for _ in range(documents):
                period = generator.integers(3, size, int(generator.integers(2, 9)))
                writer.add_document(np.resize(period, int(generator.integers(5, 60))))
            writer.publish()
    return folder


@pytest.fixture
def trainer(tiny_data: Path, tmp_path: Path) -> Trainer:
    """Trains on the tiny data in this test's own folder."""
    return Trainer(tiny_data, tmp_path)


@pytest.fixture(scope="module")
def module_trainer(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trains on the tiny data in a folder that the tests of a module share."""
    return Trainer(tiny_data, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def in_one_process(trainer: Trainer) -> Callable[[Sequence[str]], int]:
    """Run pretrain_pints.main in this process, for what stops before torch is needed."""
    import pretrain_pints

    return pretrain_pints.main
