"""Compare a run's bf16 logits on the GPU with transformers'. Run by test_export.py, in a process of its own.

    python tests/gpu/logits.py RUN HF TOKENS [--section.field VALUE ...]

RUN's checkpoint is read with the fields overridden; HF is its export; TOKENS is a .npy of ids [b, s]. Prints JSON:
the relative error |x - y| / |y| of ours and of transformers' bf16 logits x against transformers' fp32 logits y, and
how often the most probable token is the one of y.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.config.load import load_config
from megatron_ext.model.gpt import build_model
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.launch import single_process


@contextmanager
def our_model(run: Path, overrides: Sequence[str]) -> Iterator[Any]:
    """Build a run's GPTModel as training would, with the weights of its checkpoint, for evaluation."""
    config = load_config(run / "config.toml", overrides)
    place = groups.initialize(config.parallel, single_process(), seed=1)
    chunks = build_model(config)
    checkpoints = Checkpoints(
        config,
        place,
        directory=run / layout.CHECKPOINTS,
        bare_chunks=chunks,
        optimizer=None,
        tokenizer_sha256="",
    )
    checkpoints.load_weights(layout.resolve(run))
    yield chunks[0].eval()
    groups.destroy()


def our_logits(run: Path, tokens: torch.Tensor, overrides: Sequence[str]) -> torch.Tensor:
    """Run the checkpoint, [b, s, v] float32."""
    positions = torch.arange(tokens.size(1), device=tokens.device).expand(tokens.shape)
    with our_model(run, overrides) as model:
        return model(tokens, positions, None).float()[..., : model.true_vocab_size]


def their_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run the exported folder in transformers, [b, s, v] float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(tokens.device).eval()
    return model(tokens).logits.float()


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    run, folder, file, *overrides = argv
    tokens = torch.from_numpy(np.load(file)).to(device.current())
    theirs, truth = (their_logits(Path(folder), tokens, dtype) for dtype in (torch.bfloat16, torch.float32))
    ours = our_logits(Path(run), tokens, overrides)
    found = {
        name: {
            "error": float((logits - truth).norm() / truth.norm()),
            "top1": float((logits.argmax(-1) == truth.argmax(-1)).float().mean()),
        }
        for name, logits in (("ours", ours), ("theirs", theirs))
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
