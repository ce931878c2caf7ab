#!/usr/bin/env python3
"""Unigram and bigram cross-entropy of held-out tokens: what a loss must beat to have learnt anything.

Counts come from training files, the cross-entropy is measured on validation files, both in Megatron's .bin/.idx
format. Numpy only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

import numpy as np

from megatron_ext.data.indexed import IndexedFile
from megatron_ext.errors import EXIT_CODE, MegapintsError


class NgramEntropy(NamedTuple):
    """Cross-entropies in nats per token."""

    unigram: float
    bigram: float
    tokens: int
    """Validation tokens that were scored."""


def ngram_entropy(train: Sequence[np.ndarray], valid: Sequence[np.ndarray], *, vocab_size: int) -> NgramEntropy:
    """Measure validation tokens under n-gram models counted on training tokens.

    The unigram has one added count per token of the vocabulary. The bigram backs off to it by Witten and Bell 1991
    (IEEE Trans. Inf. Theory 37(4), method C): P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h)), with T(h) the number of
    distinct tokens seen after h.

    Args:
        train: streams of ids, counted one by one (no pair spans two streams).
        valid: streams of ids; the first id of each is not scored, as it has no predecessor.
        vocab_size: ids are below it.
    """
    counts = sum((np.bincount(stream, minlength=vocab_size) for stream in train), np.zeros(vocab_size, np.int64))
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs, pair_counts = np.unique(np.concatenate([_pairs(s, vocab_size) for s in train]), return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    after = np.bincount(pairs // vocab_size, weights=pair_counts, minlength=vocab_size)
    scored = np.concatenate([_pairs(s, vocab_size) for s in valid])
    before, token = scored // vocab_size, scored % vocab_size
    place = np.minimum(np.searchsorted(pairs, scored), len(pairs) - 1)
    seen = np.where(pairs[place] == scored, pair_counts[place], 0)
    total = after[before] + followers[before]
    bigram = np.where(total > 0, (seen + followers[before] * unigram[token]) / np.maximum(total, 1), unigram[token])
    return NgramEntropy(float(-np.log(unigram[token]).mean()), float(-np.log(bigram).mean()), len(scored))


def _pairs(stream: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(stream, dtype=np.int64)
    return ids[:-1] * vocab_size + ids[1:]


def from_files(train: Sequence[str], valid: Sequence[str], *, vocab_size: int) -> NgramEntropy:
    """Measure over `.bin/.idx` pairs.

    Raises:
        DataError: a pair is missing or damaged.
    """
    streams = [[IndexedFile.open(prefix).tokens for prefix in prefixes] for prefixes in (train, valid)]
    return ngram_entropy(*streams, vocab_size=vocab_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Print both cross-entropies."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/ngram_entropy.py --train data/train_text_document "
        "--valid data/valid_text_document --vocab-size 32064",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="PREFIX", help="pairs to count")
    parser.add_argument("--valid", nargs="+", required=True, metavar="PREFIX", help="pairs to score")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids are below it")
    arguments = parser.parse_args(argv)
    try:
        found = from_files(arguments.train, arguments.valid, vocab_size=arguments.vocab_size)
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"unigram {found.unigram:.4f}, bigram {found.bigram:.4f} nats per token, over {found.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
