"""Fixtures of the GPU tests: real text in Megatron's format, and the training command on it.

All of them need a CUDA device, and most need Transformer Engine; without them they are skipped, saying so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Finished, child_environment

VOCAB_SIZE = 2048
# Every width a multiple of 16, as FP8 wants; heads of 64, as in 1.5-Pints.
SMALL_TOML = """
name = "small"
run_dir = "{run_dir}"

[model]
num_layers = 4
hidden_size = 256
ffn_hidden_size = 768
num_attention_heads = 4
num_query_groups = 2
vocab_size = {vocab_size}
max_position_embeddings = 256
transformer_impl = "transformer_engine"

[precision]
dtype = "bf16"

[data]
tokenizer = "{data}/tokenizer"
train_data = ["{data}/code"]
split = "95,5"

[train]
seq_length = 256
micro_batch_size = 8
global_batch_size = 16
train_iters = 100
eval_interval = 100
eval_iters = 4

[optimizer]
lr = 2e-3
min_lr = 2e-4
lr_warmup_iters = 10

[checkpoint]
save_interval = "none"
optimizer_format = "fully_reshardable"

[log]
interval = 1
tensorboard = false
"""


@pytest.fixture(scope="session", autouse=True)
def _needs_a_gpu() -> None:
    """Skip every test of this folder where it cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine beside the CUDA GPU")


@dataclass(frozen=True)
class GpuTrainer:
    """Runs the real `pretrain_pints.py` with a small model on real text, on one GPU."""

    data: Path
    work: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""

    def train(self, run: str, *overrides: str, fails: bool = False) -> Finished:
        """Run to the end; its exit code is checked unless it is expected to fail."""
        config, run_dir = self.work / f"{run}.toml", self.work / run
        config.write_text(SMALL_TOML.format(run_dir=run_dir, data=self.data, vocab_size=VOCAB_SIZE))
        done = subprocess.run(
            [sys.executable, str(ROOT / "pretrain_pints.py"), str(config), *overrides],
            capture_output=True,
            text=True,
            timeout=280,
            env={**child_environment(), **self.environment},
            cwd=self.work,
        )
        output = done.stdout + done.stderr
        if not fails:
            assert done.returncode == 0, output[-8000:]
        return Finished(done.returncode, output, run_dir)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and a token file `code` of the standard library's sources (some 3 MB of text)."""
    from megatron_ext.data.indexed import IndexedWriter, token_dtype
    from megatron_ext.data.tokenizer import Tokenizer
    from tools import build_tokenizer

    folder = tmp_path_factory.mktemp("real_data")
    texts = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if sum(map(len, texts)) < 3_000_000:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    (folder / "text.txt").write_text("\n".join(texts[::3]), encoding="utf-8")
    content = build_tokenizer.train_tokenizer(
        [folder / "text.txt"], key="text", vocab_size=VOCAB_SIZE, limit_alphabet=128, show_progress=False
    )
    (folder / "tokenizer").mkdir()
    build_tokenizer.write_folder(content, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    with IndexedWriter(folder / "code", dtype=token_dtype(tokenizer.vocab_size)) as writer:
        for ids in tokenizer.encode_batch(texts):
            writer.add_document([*ids, tokenizer.eod])
        writer.publish()
    return folder


@pytest.fixture(scope="session")
def small(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> GpuTrainer:
    """Trains in a folder that all GPU tests share."""
    return GpuTrainer(real_data, tmp_path_factory.mktemp("gpu_runs"))


@pytest.fixture(scope="session")
def trained(small: GpuTrainer) -> Finished:
    """Transformer Engine in bf16 over 100 iterations, with a checkpoint at the end."""
    return small.train("trained")
