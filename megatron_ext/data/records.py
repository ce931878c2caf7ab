"""Layer 4: JSON Lines records: one JSON object per line, UTF-8."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_ext.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some editors put before the first line of UTF-8 text; no part of it."""

_SHOWN_NAMES = 20


def record_texts(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    """Take the texts under `keys` out of one line.

    Args:
        line: the line's bytes, with or without its end.
        keys: top-level keys, each of which must hold a string.

    Raises:
        DataError: what is wrong with the line, without its place: `is not valid JSON (...).`
    """
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start} of the line).") from error
    except RecursionError as error:
        raise DataError("is nested too deep to be a record.") from error
    except ValueError as error:
        raise DataError(f"is not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"is a JSON {type(record).__name__}, must be an object.")
    return tuple(_text(record, key) for key in keys)


def _text(record: dict[str, object], key: str) -> str:
    """Take one text out of a record."""
    if key not in record:
        raise DataError(missing_name(key, record))
    text = record[key]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"key {key!r} is {kind}, must be a string.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; UTF-8 cannot.
            raise DataError(
                f"key {key!r} holds a lone surrogate (character {error.start}), which is no text."
            ) from error
    return text


def missing_name(name: str, found: Iterable[str], kind: str = "key") -> str:
    """Say that a key (or column) is not there, which ones are, and which was probably meant."""
    names = list(found)
    shown = ", ".join(map(repr, names[:_SHOWN_NAMES])) or "none"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    by_lower = {known.lower(): known for known in reversed(names)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    hint = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
    return f"has no {kind} {name!r}; {kind}s found: {shown}{more}.{hint}"


def read_texts(path: Path, key: str) -> Iterator[str]:
    """Read the texts under one key of a JSON Lines file, in order; blank lines are no records.

    Raises:
        DataError: a bad line, as `file:line: what`.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                texts = record_texts(line, (key,))
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from error
            yield texts[0]
