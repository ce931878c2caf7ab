#!/usr/bin/env python3
"""Join several `.bin/.idx` pairs into one, with the bytes that Megatron's own merging gives."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from megatron_ext.data.indexed import IndexedFile, IndexedTotals
    from megatron_ext.data.manifest import Manifest

BLOCK = 1 << 20
"""Documents or sequences in memory at a time."""

EPILOG = """\
The pairs are joined in the order given; a folder stands for all pairs in it, sorted by name. Documents, empty ones
included, keep their order and their sequences. The inputs stay as they are, and the output appears whole or not
at all.

Before anything is written, every input is checked: both files there and of one type of ids, a sound index, and a
manifest that fits (tools/inspect_data.py tells more of a faulty one). All must have been made with one tokenizer, as
far as they have manifests; the output gets a manifest, with the sum of the counts and the inputs of all, where every
input has one.

To train on several pairs with weights, do not join them: name them in data.train_data or in a blend file.

examples:
  python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/all
  python tools/merge_datasets.py --input data/shards --output-prefix data/all
"""


class Source(NamedTuple):
    """One input pair."""

    prefix: Path
    manifest: Manifest | None


def find_prefixes(words: Sequence[str]) -> list[Path]:
    """List the pairs that the command line names.

    Raises:
        DataError: a folder holds no pair, or a pair is named twice.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if not path.is_dir():
            found.append(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
            continue
        inside = sorted(index.with_suffix("") for index in path.glob("*.idx"))
        if not inside:
            raise DataError(f"--input {word}: the folder holds no .idx file; name a folder of pairs, or the pairs.")
        found += inside
    resolved = [prefix.resolve() for prefix in found]
    for number, prefix in enumerate(found):
        if resolved.index(prefix.resolve()) != number:
            raise DataError(f"--input {prefix}: is named twice; name it once (weights belong in a blend).")
    return found


def check_sources(prefixes: Sequence[Path], output: Path) -> list[Source]:
    """Open every pair and compare it with its manifest and with the others; reads no id.

    Raises:
        DataError: the first thing that is wrong.
    """
    from megatron_ext.data.indexed import IndexedFile
    from megatron_ext.data.manifest import read_manifest

    sources: list[Source] = []
    kinds: dict[str, Path] = {}
    for prefix in prefixes:
        if prefix.resolve() == output.resolve():
            raise DataError(f"--output-prefix {output}: is one of the inputs; choose another name.")
        file, manifest = IndexedFile.open(prefix), read_manifest(prefix)
        kinds.setdefault(file.dtype.name, prefix)
        if manifest is not None:
            _check_manifest(file, manifest)
        sources.append(Source(prefix, manifest))
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise DataError(
            f"{second}: ids are {other}, those of {first} are {one}; preprocess both with one tokenizer, or train on "
            "them as a blend."
        )
    _check_tokenizers([source for source in sources if source.manifest])
    return sources


def _check_manifest(file: IndexedFile, manifest: Manifest) -> None:
    for name, value in (("documents", file.num_documents), ("tokens", file.tokens.size), ("dtype", file.dtype.name)):
        if value != getattr(manifest, name):
            raise DataError(
                f"{file.prefix}: holds {name} {value}, its manifest says {getattr(manifest, name)}; "
                "preprocess it again, or remove the manifest if it is another's."
            )


def _check_tokenizers(sources: Sequence[Source]) -> None:
    first = sources[0] if sources else None
    for prefix, manifest in sources[1:]:
        assert first and first.manifest and manifest
        mine, theirs = manifest.tokenizer, first.manifest.tokenizer
        if (mine.sha256, mine.eod) != (theirs.sha256, theirs.eod):
            raise DataError(
                f"{prefix}: was made with another tokenizer ({mine.folder}, sha256 {mine.sha256[:12]}, eod {mine.eod}) "
                f"than {first.prefix} ({theirs.folder}, {theirs.sha256[:12]}, eod {theirs.eod}); "
                "preprocess both with one."
            )


def merge(sources: Sequence[Source], output: Path, stream: TextIO) -> IndexedTotals:
    """Check the inputs' indices, then write the joined pair and its manifest.

    Raises:
        DataError: an index is damaged; no output has been touched.
    """
    from megatron_ext.data.indexed import IndexedFile, IndexedWriter, bin_path
    from megatron_ext.data.manifest import write_manifest
    from megatron_ext.data.verify import index_faults

    files = [IndexedFile.open(source.prefix) for source in sources]
    total = sum(file.bin_bytes + file.idx_bytes for file in files)
    progress = Progress(total, stream=stream, interval_seconds=5, label="merged: ")
    output.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        if faults := index_faults(file, lambda size: progress.update(size, documents=0)):
            raise DataError(f"{faults[0]} Preprocess this data again.")
    with IndexedWriter(output, dtype=files[0].dtype) as writer:
        for file in files:
            writer.add_part(bin_path(file.prefix), sequence_lengths(file), sequences_per_document(file))
            progress.update(file.bin_bytes, file.num_documents)
        totals = writer.publish()
    progress.close()
    manifests = [source.manifest for source in sources if source.manifest]
    if len(manifests) == len(sources):
        write_manifest(output, join_manifests(manifests, totals))
    return totals


def sequence_lengths(file: IndexedFile) -> Iterator[npt.NDArray[np.int32]]:
    """Give `[sequences]` tokens of each sequence, in blocks."""
    for start in range(0, file.sequence_lengths.size, BLOCK):
        yield file.sequence_lengths[start : start + BLOCK]


def sequences_per_document(file: IndexedFile) -> Iterator[npt.NDArray[np.int32]]:
    """Count `[documents]` sequences of each document, in blocks."""
    for start in range(0, file.num_documents, BLOCK):
        indices = file.document_indices[start : start + BLOCK + 1]
        yield (indices[1:] - indices[:-1]).astype("<i4")


def join_manifests(manifests: Sequence[Manifest], totals: IndexedTotals) -> Manifest:
    """Describe the joined pair: counts add up, inputs follow one another, each once."""
    options: dict[str, Any] = {}
    for name in dict.fromkeys(name for manifest in manifests for name in manifest.options):
        values = _distinct(manifest.options.get(name) for manifest in manifests)
        options[name] = values[0] if len(values) == 1 else values
    return replace(
        manifests[0],
        options=options,
        inputs=tuple(dict.fromkeys(record for manifest in manifests for record in manifest.inputs)),
        skipped_documents=sum(manifest.skipped_documents for manifest in manifests),
        encoder=", ".join(_distinct(manifest.encoder for manifest in manifests if manifest.encoder)),
        code="; ".join(_distinct(manifest.code for manifest in manifests if manifest.code)),
        **totals._asdict(),
    )


def _distinct(values: Iterator[Any]) -> list[Any]:
    """Keep the first of equal values; they need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def remarks(sources: Sequence[Source]) -> Iterator[str]:
    """Say what a person should know of the inputs, though it is no error."""
    without = [source.prefix for source in sources if source.manifest is None]
    for prefix in without:
        yield f"note: {prefix} has no manifest, so its tokenizer is not known."
    if without:
        yield "note: the output gets no manifest."
    manifests = [source.manifest for source in sources if source.manifest]
    for name in dict.fromkeys(name for manifest in manifests for name in manifest.options):
        values = _distinct(manifest.options.get(name) for manifest in manifests)
        if len(values) > 1:
            yield f"note: the inputs differ in {name}: {', '.join(map(str, values))}."


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Join .bin/.idx pairs of token ids into one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="pairs without .bin or .idx, or folders of pairs")
    add("--output-prefix", required=True, metavar="PREFIX", help="path of the new pair, without .bin or .idx")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    output = Path(args.output_prefix)
    try:
        sources = check_sources(find_prefixes(args.input), output)
        for remark in remarks(sources):
            print(remark, file=sys.stderr)
        totals = merge(sources, output, sys.stderr)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(
        f"{output}: {len(sources)} pairs joined, {totals.documents:,} documents ({totals.empty_documents:,} empty), "
        f"{totals.tokens:,} tokens, {totals.bin_bytes / 1e6:,.1f} MB"
    )
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's TERM cleans up as Ctrl-C does
    sys.exit(main())
