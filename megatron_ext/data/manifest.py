"""Layer 4: the manifest beside each `.bin/.idx` pair: which tokenizer, which input, how much of what.

A manifest is written last, so a pair that has one is whole. Standard library only: configuration checks
and tools read it without numpy or torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_ext.durable import write_whole
from megatron_ext.errors import DataError

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerRecord:
    """The tokenizer that made the ids."""

    sha256: str
    """SHA-256 of tokenizer.json, in hexadecimal."""
    vocab_size: int
    """Highest id + 1, added tokens included."""
    eod: int
    """Id that ends a document."""
    folder: str
    """Tokenizer folder, as it was given; for people, never compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputRecord:
    """One input file as it was read."""

    path: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is in one `.bin/.idx` pair."""

    tokenizer: TokenizerRecord
    options: dict[str, Any]
    """Settings that shaped the bytes (json_key, append_eod, split_sentences, ...); not the number of workers."""
    inputs: tuple[InputRecord, ...]
    documents: int
    """Documents in the index, empty ones included."""
    tokens: int
    empty_documents: int
    """Documents that hold no token: they keep their entry in the document index."""
    skipped_documents: int
    """Bad records left out (`--on-error skip`); not counted in documents."""
    dtype: str
    """numpy name of the ids' type: uint16 or int32."""
    bin_bytes: int
    idx_bytes: int
    encoder: str = ""
    """What made the ids: native, tokenizers or transformers. Empty where it was not recorded."""
    code: str = ""
    """Version and commit of megapints, versions of libraries. Empty where it was not recorded."""
    version: int = MANIFEST_VERSION


def manifest_path(prefix: str | Path) -> Path:
    """Name the manifest of the pair PREFIX.bin, PREFIX.idx."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> Path:
    """Write the manifest whole or not at all; returns its path."""
    path = manifest_path(prefix)
    write_whole(path, (json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n").encode())
    return path


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the manifest of a pair; None where there is none (data made by another tool).

    Raises:
        DataError: the file is not a manifest, is damaged, or is of a later version.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); preprocess this data again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object; preprocess this data again.")
    version = content.get("version")
    if version != MANIFEST_VERSION:
        raise DataError(
            f"{path}: version is {version!r}, this code reads {MANIFEST_VERSION}; "
            "preprocess this data again, or use the megapints that wrote it."
        )
    inputs = content.get("inputs")
    if not isinstance(inputs, list):
        raise DataError(f"{path}: 'inputs' must be a list; preprocess this data again.")
    return Manifest(
        **_typed(content, Manifest, path, skip=("tokenizer", "inputs")),
        tokenizer=TokenizerRecord(**_typed(content.get("tokenizer"), TokenizerRecord, path)),
        inputs=tuple(InputRecord(**_typed(item, InputRecord, path)) for item in inputs),
    )


def _typed(content: object, record: type, path: Path, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Take a record's fields out of parsed JSON, each checked for its type; a later addition may be missing."""
    wanted = {"int": int, "str": str, "dict[str, Any]": dict}
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: {record.__name__} must be a JSON object; preprocess this data again.")
    values = {}
    for field in fields(record):
        if field.name in skip or (field.name not in content and field.default is not MISSING):
            continue
        value = content.get(field.name)
        kind = wanted[str(field.type)]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(
                f"{path}: '{field.name}' is {value!r}, must be of type {kind.__name__}; preprocess this data again."
            )
        values[field.name] = value
    return values
