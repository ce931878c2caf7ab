"""megatron_ext/data/records.py: the place of a bad line, the key that was probably meant, texts of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.data.records import missing_name, read_texts
from megatron_ext.errors import DataError


def test_texts_of_a_file_come_in_order_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "tw\xc3\xb6"}')
    assert list(read_texts(path, "text")) == ["one", "tw\u00f6"]


def test_bad_line_of_a_file_is_told_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"txt": "two"}\n')
    reading = read_texts(path, "text")
    assert next(reading) == "one"
    with pytest.raises(DataError) as caught:
        next(reading)
    assert str(caught.value) == f"{path}:3: has no key 'text'; keys found: 'txt'. Did you mean 'txt'?"


def test_byte_order_mark_below_the_first_line_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: is not valid JSON \(Unexpected UTF-8 BOM"):
        list(read_texts(path, "text"))


@pytest.mark.parametrize(
    ("name", "found", "said"),
    [
        ("txt", ["id", "text"], "has no key 'txt'; keys found: 'id', 'text'. Did you mean 'text'?"),
        ("TEXT", ["Text", "text"], "has no key 'TEXT'; keys found: 'Text', 'text'. Did you mean 'Text'?"),
        ("body", ["id", "text"], "has no key 'body'; keys found: 'id', 'text'."),
        ("text", [], "has no key 'text'; keys found: none."),
    ],
)
def test_missing_key_is_told_with_the_one_probably_meant(name: str, found: list[str], said: str) -> None:
    assert missing_name(name, found) == said


def test_missing_key_among_many_names_some_of_them() -> None:
    names = [f"column_{number}" for number in range(300)]
    said = missing_name("body", names, "column")
    assert said.startswith("has no column 'body'; columns found: 'column_0', ")
    assert said.endswith("'column_19' and 280 more.")
