"""Put a joined output into place: pairs, skipped records, manifests."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import megatron_ext
from megatron_ext.data.indexed import IndexedTotals, token_dtype
from megatron_ext.data.manifest import InputRecord, Manifest, TokenizerRecord, write_manifest
from megatron_ext.durable import aside_path, publish
from megatron_ext.errors import DataError
from megatron_ext.training.provenance import code_revision
from tools.preprocessing.digests import check_unchanged
from tools.preprocessing.inputs import STANDARD_INPUT
from tools.preprocessing.parts import PartRecord, WorkFolder, writing
from tools.preprocessing.plan import Planned, Request, is_spool

if TYPE_CHECKING:
    from tools.preprocessing.inputs import InputFile
    from tools.preprocessing.joiner import Joiner

SHOWN_SKIPS = 10
"""Skipped records that are shown; all of them are written to a file."""

_ROOT = Path(__file__).resolve().parents[2]


def finish_and_publish(
    request: Request,
    planned: Planned,
    joiner: Joiner,
    records: Mapping[int, PartRecord],
    digests: Mapping[InputFile, str],
    *,
    began: float,
    stream: TextIO,
) -> list[str]:
    """Finish the joined pairs, and put them, then their manifests, into place.

    Returns:
        A line about each pair.

    Raises:
        DataError: there is no document, an input has changed, or the disk is full; the old output is untouched.
    """
    run, folder, keys = planned.run, planned.folder, request.settings.keys
    ordered = [records[part.number] for part in run.parts]
    skipped = sum(record.skipped for record in ordered)
    if not any(record.documents for record in ordered):
        folder.discard()
        left_out = f" ({skipped:,} bad records were left out)" if skipped else ""
        raise DataError(f"the input holds no documents{left_out}; nothing is written.")
    prefixes = [request.prefix(key) for key in keys]
    totals = joiner.seal()
    with writing(request.output_prefix):
        skipped_aside = _join_skipped(folder, ordered, stream, request.skipped_path) if skipped else None
        for file in run.files:
            check_unchanged(file)
        for writer in joiner.writers:
            writer.publish()
        if skipped_aside:
            publish(skipped_aside, request.skipped_path)
        else:
            request.skipped_path.unlink(missing_ok=True)
        inputs = _inputs(planned, digests)
        for key_name, prefix, total in zip(keys, prefixes, totals, strict=True):
            write_manifest(prefix, _manifest(request, planned, key_name, total, inputs=inputs, skipped=skipped))
    folder.discard()
    seconds = time.monotonic() - began
    rate = sum(part.weight for part in run.pending()) / 1e6 / seconds
    return [_line(prefix, total, seconds, rate) for prefix, total in zip(prefixes, totals, strict=True)]


def _join_skipped(folder: WorkFolder, records: Sequence[PartRecord], stream: TextIO, published: Path) -> Path:
    """Join the files of skipped records, and show the first."""
    path = aside_path(folder.path / "skipped")
    shown = 0
    with path.open("wb") as whole:
        for record in records:
            if not record.skipped:
                continue
            with folder.skipped_file(record.number).open("rb") as part:
                for line in part:
                    whole.write(line)
                    if shown < SHOWN_SKIPS:
                        bad = json.loads(line)
                        print(f"skipped: {bad['where']}: {bad['problem']}", file=stream)
                        shown += 1
    total = sum(record.skipped for record in records)
    more = f"{total - shown:,} more; " if total > shown else ""
    print(f"skipped: {more}all {total:,} are in {published}", file=stream, flush=True)
    return path


def _inputs(planned: Planned, digests: Mapping[InputFile, str]) -> tuple[InputRecord, ...]:
    """Describe the input files."""
    return tuple(
        InputRecord(
            path=STANDARD_INPUT if is_spool(file, planned.folder) else file.path,
            size=file.size,
            sha256=digests[file],
        )
        for file in planned.run.files
    )


def _manifest(
    request: Request,
    planned: Planned,
    key: str,
    totals: IndexedTotals,
    *,
    inputs: tuple[InputRecord, ...],
    skipped: int,
) -> Manifest:
    """Describe the pair of one key."""
    tokenizer = planned.loaded.tokenizer
    library = "transformers" if planned.loaded.encoder.name == "transformers" else "tokenizers"
    return Manifest(
        tokenizer=TokenizerRecord(
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            folder=request.settings.tokenizer,
        ),
        options={"json_key": key, **request.settings.options()},
        inputs=inputs,
        skipped_documents=skipped,
        dtype=token_dtype(tokenizer.vocab_size).name,
        encoder=planned.loaded.encoder.name,
        code=(
            f"megapints {megatron_ext.__version__} (commit {code_revision(_ROOT)}), "
            f"Python {platform.python_version()}, {library} {version(library)}"
        ),
        **totals._asdict(),
    )


def _line(prefix: Path, totals: IndexedTotals, seconds: float, rate: float) -> str:
    return (
        f"{prefix}: {totals.documents:,} documents ({totals.empty_documents:,} empty), {totals.tokens:,} tokens, "
        f"{totals.bin_bytes / 1e6:,.1f} MB, {seconds:.1f} s, {rate:.1f} MB/s of input"
    )
