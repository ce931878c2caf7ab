#!/usr/bin/env python3
"""Look into a `.bin/.idx` pair: header, counts, document lengths, samples with loss masks; or verify it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
BLOCK = 1 << 20
"""Documents in memory at a time."""

EPILOG = """\
A sample is seq-length inputs and, one further on, their labels. Samples are shown where they lie in the file,
evenly spread; training draws them shuffled. With --eod-mask-loss a position whose input is the
end-of-document token does not count in the loss (it would have to guess the next document).

--verify checks every length, pointer and document entry of the index, all sizes and counts against the
manifest, and every id against the vocabulary (the manifest's, or --tokenizer's); it prints, for each kind of
fault, the first bad place and how many more there are, and exits with status 2 if there is one.

--json prints one JSON object instead: what would be shown, with the histogram as [low, high, documents], and
"faults" (a list of lines) with --verify.

examples:
  python tools/inspect_data.py data/corpus_text_document --tokenizer tokenizers/pints --eod-mask-loss
  python tools/inspect_data.py data/corpus_text_document --verify
  python tools/inspect_data.py data/corpus_text_document --samples 0 --json
"""


class Bucket(NamedTuple):
    """How many documents have a length from `low` to `high`."""

    low: int
    high: int
    documents: int


class Lengths(NamedTuple):
    """The lengths of all documents, in tokens."""

    empty: int
    longest: int
    buckets: list[Bucket]
    """By powers of two, from the first that holds a document to the last."""


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


def measure_lengths(file: IndexedFile) -> Lengths:
    """Look at all documents' lengths; the index must be sound."""
    import numpy as np

    counts = np.zeros(64, dtype=np.int64)
    longest = 0
    for start in range(0, file.num_documents, BLOCK):
        first = np.array(file.document_indices[start : start + BLOCK + 1])
        ends = np.zeros(first[-1] - first[0] + 1, dtype=np.int64)
        np.cumsum(file.sequence_lengths[first[0] : first[-1]], out=ends[1:])
        lengths = np.diff(ends[first - first[0]])
        # The bucket of n > 0 holds 2^(n-1) to 2^n - 1 tokens; bucket 0 the empty documents.
        counts += np.bincount(np.ceil(np.log2(lengths + 1.0)).astype(int), minlength=counts.size)
        longest = max(longest, int(lengths.max()))
    used = np.flatnonzero(counts)
    numbers = range(used[0], used[-1] + 1) if used.size else range(0)
    buckets = [Bucket((1 << number) >> 1, (1 << number) - 1, int(counts[number])) for number in numbers]
    return Lengths(int(counts[0]), longest, buckets)


def describe(file: IndexedFile, lengths: Lengths | None, manifest: Manifest | None) -> Iterator[str]:
    """Describe header, counts and origin, line by line; without `lengths`, which a damaged index does not tell."""
    yield f"{file.prefix}"
    yield f"  ids         {file.dtype.name}, {file.tokens.size:,} tokens, {file.bin_bytes:,} bytes (.bin)"
    yield f"  index       {file.sequence_lengths.size:,} sequences, {file.idx_bytes:,} bytes (.idx)"
    if lengths is None:
        yield f"  documents   {file.num_documents:,}"
    else:
        yield f"  documents   {file.num_documents:,}, of them {lengths.empty:,} empty"
        mean = file.tokens.size / max(file.num_documents, 1)
        yield f"  length      mean {mean:,.1f}, longest {lengths.longest:,} tokens"
    if manifest is None:
        yield "  manifest    none: made by another tool"
        return
    tokenizer = manifest.tokenizer
    options = ", ".join(f"{name}={value}" for name, value in manifest.options.items())
    yield f"  tokenizer   {tokenizer.folder}, {tokenizer.vocab_size:,} ids, eod {tokenizer.eod}"
    yield f"              sha256 {tokenizer.sha256}"
    yield f"  options     {options}"
    yield f"  skipped     {manifest.skipped_documents:,} bad records"
    yield f"  made by     {manifest.encoder or 'encoder not recorded'}, {manifest.code or 'code not recorded'}"
    for record in manifest.inputs:
        yield f"  input       {record.path}, {record.size:,} bytes, sha256 {record.sha256}"


def histogram(buckets: Sequence[Bucket]) -> Iterator[str]:
    """Draw how many documents have which length, in powers of two."""
    yield "documents by length (tokens)"
    most = max((bucket.documents for bucket in buckets), default=1)
    for bucket in buckets:
        bar = "#" * -(-bucket.documents * BAR_WIDTH // most)
        yield f"  {bucket.low:>9,} - {bucket.high:>9,}  {bucket.documents:>11,}  {bar}"


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
    masked = masked_positions(sample)
    for position in masked[:SHOWN_MASKED]:
        given, wanted = int(sample.inputs[position]), int(sample.labels[position])
        yield f"  masked: position {position}, {_name(given, tokenizer)} -> {_name(wanted, tokenizer)}"
    if len(masked) > SHOWN_MASKED:
        yield f"  masked: {len(masked) - SHOWN_MASKED:,} more"


def masked_positions(sample: Sample) -> list[int]:
    """List the positions that the loss leaves out."""
    return [position for position, counts in enumerate(sample.loss_mask.tolist()) if not counts]


def _name(token: int, tokenizer: Tokenizer | None) -> str:
    """Spell one id."""
    spelt = tokenizer.backend.id_to_token(token) if tokenizer else None
    return f"{token} {spelt!r}" if spelt else str(token)


def manifest_faults(file: IndexedFile, lengths: Lengths | None, manifest: Manifest | None) -> list[str]:
    """Compare the pair's counts and sizes with its manifest; one line per fault."""
    if manifest is None:
        return []
    found = {
        "documents": file.num_documents,
        "tokens": file.tokens.size,
        "dtype": file.dtype.name,
        "bin_bytes": file.bin_bytes,
        "idx_bytes": file.idx_bytes,
    }
    if lengths is not None:  # a damaged index says nothing of document lengths
        found["empty_documents"] = lengths.empty
    return [
        f"{name}: is {value}, the manifest says {getattr(manifest, name)}."
        for name, value in found.items()
        if value != getattr(manifest, name)
    ]


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
    return (run_verify if args.verify else run_show)(args, file, manifest, tokenizer)


def run_show(
    args: argparse.Namespace, file: IndexedFile, manifest: Manifest | None, tokenizer: Tokenizer | None
) -> int:
    """Show the pair and samples of it."""
    from megatron_ext.data.verify import index_faults

    if faults := index_faults(file, lambda size: None):
        raise DataError(f"{faults[0]} Preprocess this data again; --verify lists all faults.")
    lengths = measure_lengths(file)
    eod = _masked_input(tokenizer, manifest) if args.eod_mask_loss else None
    samples = take_samples(file, seq_length=args.seq_length, samples=args.samples, masked_input=eod)
    if args.json:
        records = [sample_record(sample, tokenizer) for sample in samples]
        print(json.dumps({**pair_record(file, lengths, manifest), "samples": records}, ensure_ascii=False))
        return 0
    print(*describe(file, lengths, manifest), *histogram(lengths.buckets), sep="\n")
    for number, sample in enumerate(samples):
        print(*show_sample(number, sample, tokenizer), sep="\n")
    return 0


def run_verify(
    args: argparse.Namespace, file: IndexedFile, manifest: Manifest | None, tokenizer: Tokenizer | None
) -> int:
    """Check the whole pair; the exit status says whether it is sound."""
    from megatron_ext.data.verify import id_faults, index_faults

    progress = Progress(file.idx_bytes + file.bin_bytes, stream=sys.stderr, interval_seconds=5, label="verified: ")

    def advance(size: int) -> None:
        progress.update(size, documents=0)

    faults = index_faults(file, advance)
    lengths = None if faults else measure_lengths(file)
    faults += manifest_faults(file, lengths, manifest)
    known = tokenizer or (manifest.tokenizer if manifest else None)
    faults += id_faults(file, vocab_size=known.vocab_size if known else None, advance=advance)
    progress.close()
    if args.json:
        print(json.dumps({**pair_record(file, lengths, manifest), "faults": faults}, ensure_ascii=False))
        return EXIT_CODE if faults else 0
    print(*describe(file, lengths, manifest), *(f"fault: {fault}" for fault in faults), sep="\n")
    if known is None:
        print("the vocabulary is not known (no manifest): ids are not checked against it; give --tokenizer")
    against = "the index" if manifest is None else "the index and the manifest"
    print(f"{len(faults)} faults found" if faults else f"no fault: the ids fit {against}")
    return EXIT_CODE if faults else 0


def pair_record(file: IndexedFile, lengths: Lengths | None, manifest: Manifest | None) -> dict[str, Any]:
    """Describe the pair for programs."""
    return {
        "prefix": str(file.prefix),
        "dtype": file.dtype.name,
        "documents": file.num_documents,
        "sequences": int(file.sequence_lengths.size),
        "tokens": int(file.tokens.size),
        "bin_bytes": file.bin_bytes,
        "idx_bytes": file.idx_bytes,
        "empty_documents": lengths.empty if lengths else None,
        "longest": lengths.longest if lengths else None,
        "lengths": lengths.buckets if lengths else None,
        "manifest": asdict(manifest) if manifest else None,
    }


def sample_record(sample: Sample, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Describe a sample for programs."""
    ids = sample.inputs.tolist()
    text = tokenizer.decode(ids) if tokenizer else None
    return {"start": sample.start, "ids": ids, "text": text, "masked": masked_positions(sample)}


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
    add("--json", action="store_true", help="print one JSON object, for programs")
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
