#!/usr/bin/env python3
"""Look into a `.bin/.idx` pair: header, counts, document lengths, samples with loss masks; or verify it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from megatron_ext.data.indexed import IndexedFile
    from megatron_ext.data.manifest import Manifest
    from megatron_ext.data.tokenizer import Tokenizer

BAR_WIDTH = 40
SHOWN_MASKED = 20

EPILOG = """\
A sample is seq-length inputs and, one further on, their labels. Samples are shown where they lie in the file,
evenly spread; training draws them shuffled. With --eod-mask-loss a position whose input is the
end-of-document token does not count in the loss (it would have to guess the next document).

--verify checks the index within itself, all sizes and counts against the manifest, and every id against the
vocabulary; it prints each fault and exits with status 2 if there is one.

examples:
  python tools/inspect_data.py data/corpus_text_document --tokenizer tokenizers/pints --eod-mask-loss
  python tools/inspect_data.py data/corpus_text_document --verify
"""


class Sample(NamedTuple):
    """Some consecutive tokens of a file as training sees them."""

    start: int
    """Place of the first input in the file."""
    inputs: npt.NDArray[np.int64]
    """`[s]`"""
    labels: npt.NDArray[np.int64]
    """`[s]`"""
    loss_mask: npt.NDArray[np.bool_]
    """`[s]` True where the position counts in the loss."""


def take_samples(file: IndexedFile, *, seq_length: int, samples: int, masked_input: int | None) -> Iterator[Sample]:
    """Cut samples out of the file, evenly spread over it, without overlap as long as there are enough.

    Args:
        file: the opened pair.
        seq_length: inputs per sample; a file with fewer tokens gives one shorter sample.
        samples: how many at most.
        masked_input: id whose positions do not count in the loss; None: all count.
    """
    import numpy as np

    whole = max((file.tokens.size - 1) // seq_length, min(file.tokens.size - 1, 1))
    chosen = min(samples, whole)
    for number in range(chosen):
        start = number * whole // chosen * seq_length
        window = file.tokens[start : start + seq_length + 1].astype(np.int64)
        mask = np.ones(window.size - 1, dtype=bool) if masked_input is None else window[:-1] != masked_input
        yield Sample(start, window[:-1], window[1:], mask)


def describe(file: IndexedFile, manifest: Manifest | None) -> Iterator[str]:
    """Describe header, counts and origin, line by line."""
    lengths = file.document_lengths()
    documents = max(file.num_documents, 1)
    yield f"{file.prefix}"
    yield f"  ids         {file.dtype.name}, {file.tokens.size:,} tokens, {file.bin_bytes:,} bytes (.bin)"
    yield f"  index       {file.sequence_lengths.size:,} sequences, {file.idx_bytes:,} bytes (.idx)"
    yield f"  documents   {file.num_documents:,}, of them {int((lengths == 0).sum()):,} empty"
    longest = int(lengths.max(initial=0))
    yield f"  length      mean {file.tokens.size / documents:,.1f}, longest {longest:,} tokens"
    if manifest is None:
        yield "  manifest    none: made by another tool"
        return
    tokenizer = manifest.tokenizer
    options = ", ".join(f"{name}={value}" for name, value in manifest.options.items())
    yield f"  tokenizer   {tokenizer.folder}, {tokenizer.vocab_size:,} ids, eod {tokenizer.eod}"
    yield f"              sha256 {tokenizer.sha256}"
    yield f"  options     {options}"
    yield f"  skipped     {manifest.skipped_documents:,} bad records"
    for record in manifest.inputs:
        yield f"  input       {record.path}, {record.size:,} bytes, sha256 {record.sha256}"


def histogram(lengths: npt.NDArray[np.int64]) -> Iterator[str]:
    """Draw how many documents have which length, in powers of two."""
    import numpy as np

    # The bucket of n > 0 holds 2^(n-1) to 2^n - 1 tokens; bucket 0 the empty documents.
    buckets = np.bincount(np.ceil(np.log2(lengths + 1.0)).astype(int), minlength=1)
    used = np.flatnonzero(buckets)
    yield "documents by length (tokens)"
    for bucket in range(used[0], used[-1] + 1) if used.size else ():
        low, high = (1 << bucket) >> 1, (1 << bucket) - 1
        count = int(buckets[bucket])
        bar = "#" * -(-count * BAR_WIDTH // int(buckets.max()))
        yield f"  {low:>9,} - {high:>9,}  {count:>11,}  {bar}"


def show_sample(number: int, sample: Sample, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Show one sample: its text or ids, and the positions that the loss leaves out."""
    size = sample.inputs.size
    yield (
        f"sample {number}: tokens {sample.start:,} to {sample.start + size - 1:,} of the file, "
        f"{int(sample.loss_mask.sum()):,} of {size:,} positions count in the loss"
    )
    ids = sample.inputs.tolist()
    text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    yield from (f"  | {line}" for line in text.split("\n"))
    masked = [position for position, counts in enumerate(sample.loss_mask.tolist()) if not counts]
    for position in masked[:SHOWN_MASKED]:
        given, wanted = int(sample.inputs[position]), int(sample.labels[position])
        yield f"  masked: position {position}, {_name(given, tokenizer)} -> {_name(wanted, tokenizer)}"
    if len(masked) > SHOWN_MASKED:
        yield f"  masked: {len(masked) - SHOWN_MASKED:,} more"


def _name(token: int, tokenizer: Tokenizer | None) -> str:
    """Spell one id."""
    spelt = tokenizer.backend.id_to_token(token) if tokenizer else None
    return f"{token} {spelt!r}" if spelt else str(token)


def verify(file: IndexedFile, manifest: Manifest | None, vocab_size: int | None) -> Iterator[str]:
    """Check everything that can be checked; one line per fault."""
    problems = file.problems()
    yield from problems
    if manifest is not None:
        found = {
            "documents": file.num_documents,
            "tokens": file.tokens.size,
            "dtype": file.dtype.name,
            "bin_bytes": file.bin_bytes,
            "idx_bytes": file.idx_bytes,
        }
        if not problems:  # a damaged index says nothing of document lengths
            found["empty_documents"] = int((file.document_lengths() == 0).sum())
        for name, value in found.items():
            if value != getattr(manifest, name):
                yield f"{name}: is {value}, the manifest says {getattr(manifest, name)}."
    yield from _verify_ids(file, vocab_size)


def _verify_ids(file: IndexedFile, vocab_size: int | None) -> Iterator[str]:
    """Check the range of all ids."""
    if not file.tokens.size:
        return
    progress = Progress(file.bin_bytes, stream=sys.stderr, interval_seconds=5, label="ids: ")
    before = 0
    for found in file.scan_ids():
        progress.update((found.tokens - before) * file.dtype.itemsize, documents=0)
        before = found.tokens
    progress.close()
    if found.lowest < 0:
        yield f"ids: the lowest is {found.lowest}, must be at least 0."
    if vocab_size is not None and found.highest >= vocab_size:
        yield f"ids: the highest is {found.highest}, the vocabulary ends at {vocab_size - 1}."


def load_tokenizer(folder: str | None, manifest: Manifest | None) -> Tokenizer | None:
    """Load the tokenizer asked for; refuse one that the data was not made with."""
    from megatron_ext.data.tokenizer import Tokenizer

    if folder is None:
        return None
    tokenizer = Tokenizer.load(folder)
    if manifest is not None and manifest.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(
            f"--tokenizer {folder}: is not the one that the data was made with ({manifest.tokenizer.folder}, "
            f"sha256 {manifest.tokenizer.sha256[:12]}, this one {tokenizer.sha256[:12]}); give that one."
        )
    return tokenizer


def run(args: argparse.Namespace) -> int:
    """Print what was asked for; returns the exit status."""
    from megatron_ext.data.indexed import IndexedFile
    from megatron_ext.data.manifest import read_manifest

    for name in ("seq_length", "samples"):
        if getattr(args, name) < (name == "seq_length"):
            raise DataError(f"--{name.replace('_', '-')}: is {getattr(args, name)}, must be greater.")
    prefix = args.prefix.removesuffix(".bin").removesuffix(".idx")
    manifest = read_manifest(prefix)
    file = IndexedFile.open(prefix)
    tokenizer = load_tokenizer(args.tokenizer, manifest)
    print(*describe(file, manifest), sep="\n")
    if args.verify:
        known = tokenizer or (manifest.tokenizer if manifest else None)
        problems = list(verify(file, manifest, known.vocab_size if known else None))
        print(*(f"fault: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
        against = "the index" if manifest is None else "the index and the manifest"
        print(f"{len(problems)} faults found" if problems else f"no fault: the ids fit {against}")
        return EXIT_CODE if problems else 0
    print(*histogram(file.document_lengths()), sep="\n")
    eod = _masked_input(tokenizer, manifest) if args.eod_mask_loss else None
    samples = take_samples(file, seq_length=args.seq_length, samples=args.samples, masked_input=eod)
    for number, sample in enumerate(samples):
        print(*show_sample(number, sample, tokenizer), sep="\n")
    return 0


def _masked_input(tokenizer: Tokenizer | None, manifest: Manifest | None) -> int:
    """Find the end-of-document id."""
    if tokenizer is not None:
        return tokenizer.eod
    if manifest is not None:
        return manifest.tokenizer.eod
    raise DataError("--eod-mask-loss: this data has no manifest to say which id ends a document; give --tokenizer.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Show or verify a .bin/.idx pair of token ids.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="path of the pair, without or with .bin or .idx")
    add("--tokenizer", metavar="FOLDER", help="decode the samples (default: show ids)")
    add("--seq-length", type=int, default=128, metavar="N", help="tokens per sample (128)")
    add("--samples", type=int, default=2, metavar="N", help="samples to show (2)")
    add("--eod-mask-loss", action="store_true", help="mask as data.eod_mask_loss does")
    add("--verify", action="store_true", help="check the pair instead of showing samples")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
