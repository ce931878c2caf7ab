"""Where documents begin and end, for data.document_mask = "reset".

A document ends with the tokenizer's end-of-document token, and the next token begins another. Nothing else marks the
boundary inside of a sample, so data without these tokens is refused rather than trained on as one document.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from megatron_ext.config.tree import Config
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.parallel import groups

_LOOKED_AT = 256


def find_document_end(config: Config, tokenizer: Tokenizer) -> int | None:
    """Find the id that keeps documents apart; None where the configuration does not ask for it. Every rank calls it.

    Raises:
        DataError: documents of a source do not end with it; on every rank alike.
    """
    if config.data.document_mask == "none":
        return None
    with groups.together():
        if groups.where_am_i().rank == 0:
            for prefix in (*config.data.train_data, *(config.data.valid_data or ())):
                check_document_ends(prefix, tokenizer.eod)
    return tokenizer.eod


def check_document_ends(prefix: str, eod: int) -> None:
    """Look at the last tokens of up to 256 documents, evenly over a file.

    The ids are the evidence, whoever made the data: there is no manifest beside Megatron-LM's files. What is looked at
    are sequences, which samples are made of: the sentences of data split into such would be documents of their own.

    Raises:
        DataError: one of them is not the end-of-document token.
    """
    file = IndexedFile.open(prefix)
    count = file.sequence_lengths.size
    looked_at = np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(np.int64)
    looked_at = looked_at[file.sequence_lengths[looked_at] > 0]
    ends = file.sequence_pointers[looked_at] // file.dtype.itemsize + file.sequence_lengths[looked_at] - 1
    without = looked_at[file.tokens[ends] != eod]
    if without.size:
        raise DataError(
            f"{prefix}: data.document_mask (reset) needs documents that end with the end-of-document token "
            f"(id {eod}); of {looked_at.size} looked at, {without.size} do not, the first is sequence {without[0]}. "
            "Preprocess again with --append-eod (and without --split-sentences), or set data.document_mask "
            'to "none".'
        )


def find_starts(tokens: torch.Tensor, eod: int) -> torch.Tensor:
    """Find where documents begin in samples that are laid one after another. A sample's first token begins one.

    Args:
        tokens: [b, s] int64.
        eod: id that ends a document.

    Returns:
        [documents + 1] int32 on the tokens' device: the first place of each document, and b s.
    """
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eod
    return F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=tokens.numel()).int()
