"""Compare packed documents on the GPU with documents alone. Run by test_document_mask.py, in a process of its own.

    python tests/gpu/documents.py RUN TOKENS EOD [--section.field VALUE ...]

RUN's checkpoint is read with the fields overridden; TOKENS is a .npy of ids [b, s], in which documents end with EOD.
Prints JSON: the relative error |x - y| / |y| of logits and of the embedding's gradient, where y are those of each
document alone through the local modules in fp32, and x those of the model in its own precision on
packed: the packed samples; alone: each document alone; whole: the samples without regard to documents.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.data.batch import share_batch
from megatron_ext.parallel import groups
from tests.gpu.logits import our_model

LOCAL_FP32 = ("--model.transformer_impl", "local", "--precision.dtype", "fp32")


class Found(NamedTuple):
    """What a model computed, in fp32."""

    logits: torch.Tensor
    """[tokens, v]"""
    gradient: torch.Tensor
    """Of the mean loss, in the embedding's weights."""


def cut(tokens: torch.Tensor, eod: int) -> Iterator[torch.Tensor]:
    """Cut [b, s] ids into documents, each [1, length]."""
    for sample in tokens:
        ends = [0, *((sample == eod).nonzero().flatten() + 1).tolist(), len(sample)]
        yield from (sample[None, a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b)


def observe(model: Any, logits: torch.Tensor, tokens: torch.Tensor) -> Found:
    """Take logits and gradient; the labels are the tokens themselves, since any will do."""
    rows = logits.float().flatten(0, 1)[:, : model.true_vocab_size]
    weights = model.embedding.word_embeddings.weight
    (gradient,) = torch.autograd.grad(F.cross_entropy(rows, tokens.flatten()), weights)
    return Found(rows.detach(), gradient.float())


def run_alone(model: Any, tokens: torch.Tensor, eod: int) -> Found:
    """Run each document by itself."""
    rows = [model(ids, torch.arange(ids.size(1), device=ids.device)[None], None) for ids in cut(tokens, eod)]
    return observe(model, torch.cat(rows, dim=1), tokens)


def run_packed(model: Any, tokens: torch.Tensor, eod: int | None) -> Found:
    """Run the samples as training does."""
    host = torch.stack((tokens, tokens, torch.ones_like(tokens))).cpu()
    batch = share_batch(host, groups.where_am_i(), shape=(tokens.size(0), tokens.size(1)), document_end=eod)
    logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.documents)
    return observe(model, logits, tokens)


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    run, file, eod, *overrides = argv
    ids = torch.from_numpy(np.load(file))
    with our_model(Path(run), LOCAL_FP32) as model:
        tokens = ids.to(next(model.parameters()).device)
        truth = run_alone(model, tokens, int(eod))
    with our_model(Path(run), overrides) as model:
        found = {
            "packed": run_packed(model, tokens, int(eod)),
            "alone": run_alone(model, tokens, int(eod)),
            "whole": run_packed(model, tokens, None),
        }
    errors = {
        name: {
            part: float((getattr(x, part) - getattr(truth, part)).norm() / getattr(truth, part).norm())
            for part in Found._fields
        }
        for name, x in found.items()
    }
    print(json.dumps(errors))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
