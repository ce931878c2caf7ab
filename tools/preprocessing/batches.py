"""What readers give: batches of texts, and the records that hold none."""

from __future__ import annotations

from typing import NamedTuple

SHOWN_RECORD_CHARACTERS = 2000
"""How much of a bad record is kept."""


class BadRecord(NamedTuple):
    """A record that gives no text."""

    where: str
    """"file:line" with lines counted from 1, or "file: row N" from 0; with the record's id where that is known."""
    problem: str
    """What it is and must be: "is not valid JSON (...)."."""
    record: str
    """The record as it stands, shortened."""


class Batch(NamedTuple):
    """Some neighbouring records."""

    texts: tuple[list[str], ...]
    """One list per key, of equal lengths."""
    bad: list[BadRecord]
    """In order; what is neither here nor in `texts` was a blank line."""
    weight: int
    """Bytes of input on disk that the batch stands for."""


def shorten(record: bytes | str) -> str:
    """Keep the beginning of a bad record."""
    head = record[: 4 * SHOWN_RECORD_CHARACTERS]  # a character is at most 4 bytes
    text = head.decode("utf-8", errors="backslashreplace") if isinstance(head, bytes) else head
    whole = len(text) <= SHOWN_RECORD_CHARACTERS and len(head) == len(record)
    return text.rstrip("\r\n") if whole else f"{text[:SHOWN_RECORD_CHARACTERS]}..."


def say_id(value: object) -> str:
    return f" (id {value!r})" if isinstance(value, str | int) else ""
