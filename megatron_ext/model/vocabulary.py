"""GPTModel whose loss is over the true vocabulary, not over the rows that pad it.

Shapes: s sequence, b micro batch, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

# Far below every logit, and finite in every format: its exponential is 0, and no product with it is NaN.
_NEVER = -1e30


class TrueVocabularyGPT(GPTModel):
    """megatron-core's GPTModel with the padding rows left out of the loss.

    Megatron lets the padding take part in the softmax, so the loss would depend on
    `make_vocab_size_divisible_by`, and a model imported from Hugging Face (whose padding rows are zero) would start
    worse than it is: by ln(112/97) for a vocabulary of 97 padded to 112 and near-uniform logits.
    """

    true_vocab_size: int

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute token losses [b, s] from labels [b, s] and this rank's logits [s, b, v / t]."""
        tensor_rank = self.pg_collection.tp.rank()
        kept = self.true_vocab_size - tensor_rank * logits.size(-1)
        if kept < logits.size(-1):
            logits = _Exclude.apply(logits, max(kept, 0))
        return super().compute_language_model_loss(labels, logits)


class _Exclude(torch.autograd.Function):
    """Overwrite the columns from `kept` on, in place: a masked copy of the logits would double the largest tensor."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, kept: int) -> torch.Tensor:
        ctx.mark_dirty(logits)
        logits[..., kept:] = _NEVER
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The softmax is 0 there, and so is its gradient already.
        return gradient, None
