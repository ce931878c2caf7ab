"""Layer 4: JSON Lines records: one JSON object per line, UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse_record(line: bytes, keys: Sequence[str], *, path: str | Path, number: int) -> tuple[str, ...]:
    """Take the texts under `keys` out of one line.

    Args:
        line: the line's bytes, with or without its end.
        keys: top-level keys, each of which must hold a string.
        path: file that the line is from, for messages.
        number: line number, counted from 1.

    Raises:
        DataError: says `file:line: what`.
    """
    where = f"{path}:{number}"
    if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {error.start} of the line).") from error
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deep to be a record.") from error
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: is a JSON {type(record).__name__}, must be an object.")
    return tuple(_text(record, key, where) for key in keys)


def _text(record: dict[str, object], key: str, where: str) -> str:
    """Take one text out of a record."""
    if key not in record:
        found = ", ".join(repr(name) for name in record) or "none"
        raise DataError(f"{where}: has no key {key!r}; keys found: {found}.")
    text = record[key]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: key {key!r} is {kind}, must be a string.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; UTF-8 cannot.
            raise DataError(
                f"{where}: key {key!r} holds a lone surrogate (character {error.start}), which is no text."
            ) from error
    return text


def read_texts(path: Path, key: str) -> Iterator[str]:
    """Read the texts under one key of a JSON Lines file, in order; blank lines are no records."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_record(line, (key,), path=path, number=number)[0]
