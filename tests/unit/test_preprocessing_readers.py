"""tools/preprocessing/readers.py and tables.py: every record once, in order, and the place of each bad one."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ext.errors import DataError
from tools.preprocessing import readers, tables
from tools.preprocessing.inputs import Unit, cut_into_units, find_inputs
from tools.preprocessing.readers import BadRecord, Batch, first_texts, read_unit

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
}


def write(path: Path, content: bytes) -> Path:
    """Write a file."""
    path.write_bytes(content)
    return path


def lines(texts: Sequence[str]) -> bytes:
    """Write texts as JSON Lines."""
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def batches(
    *paths: Path,
    unit_bytes: int = 1 << 20,
    batch_bytes: int = 1 << 20,
    keys: Sequence[str] = ("text",),
    id_key: str | None = None,
) -> list[Batch]:
    """Read files whole, unit after unit."""
    units = cut_into_units(find_inputs([str(path) for path in paths]), unit_bytes=unit_bytes)
    return [batch for unit in units for batch in read_unit(unit, keys=keys, id_key=id_key, batch_bytes=batch_bytes)]


def texts(*paths: Path, **options: int) -> list[str]:
    """Read the texts of files that have no bad record."""
    found = batches(*paths, **options)  # type: ignore[arg-type]
    assert [bad for batch in found for bad in batch.bad] == []
    return [text for batch in found for text in batch.texts[0]]


def bad(path: Path, **options: object) -> list[BadRecord]:
    """Read the bad records of a file."""
    return [record for batch in batches(path, **options) for record in batch.bad]  # type: ignore[arg-type]


def refusal(path: Path, **options: object) -> str:
    """Give the message that a file is refused with."""
    with pytest.raises(DataError) as caught:
        batches(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ JSON Lines


def odd_texts(seed: int) -> list[str]:
    """Make texts of many lengths with what JSON must escape and UTF-8 must encode."""
    chance = random.Random(seed)
    pieces = ["", "a", "\n", "\r\n", '"', "\\", "\u2028", "é", "漢", "😀", "\x00", "\x7f", " "]
    return ["".join(chance.choices(pieces, k=chance.choice([0, 1, 5, 60]))) for _ in range(120)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 333, 1 << 20])
def test_plain_file_in_units_of_any_size_gives_every_text_once(tmp_path: Path, unit_bytes: int) -> None:
    expected = odd_texts(unit_bytes)
    path = write(tmp_path / "a.jsonl", lines(expected))
    for batch_bytes in (1, 64, 1 << 20):
        assert texts(path, unit_bytes=unit_bytes, batch_bytes=batch_bytes) == expected


def test_units_of_plain_file_can_be_read_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([str(n) for n in range(100)]))
    units = cut_into_units(find_inputs([str(path)]), unit_bytes=97)
    found = {unit.number: [t for b in read_unit(unit, keys=["text"]) for t in b.texts[0]] for unit in reversed(units)}
    assert [text for number in sorted(found) for text in found[number]] == [str(n) for n in range(100)]


def test_line_longer_than_several_units_belongs_to_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(["a", "b" * 1000, "c"]))
    units = cut_into_units(find_inputs([str(path)]), unit_bytes=100)
    counts = [sum(len(batch.texts[0]) for batch in read_unit(unit, keys=["text"])) for unit in units]
    assert counts == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("ending", PACK)
def test_file_without_last_line_end_gives_its_last_text(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.jsonl{ending}", PACK[ending](b'{"text": "one"}\n{"text": "two"}'))
    assert texts(path) == ["one", "two"]


def test_blank_lines_byte_order_mark_and_dos_line_ends_are_no_texts(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n \t\n{"text": "two"}\r\n\n'
    assert texts(write(tmp_path / "a.jsonl", content)) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "first", "text": "last"}', "last"),
        (b'{"text": "nan", "score": NaN}', "nan"),
        (b'{"text": "big", "n": 123456789012345678901234567890}', "big"),
        (b'{"text": "inf", "n": 1e999}', "inf"),
        (b'{"text": "pair \\ud83d\\ude00"}', "pair \U0001f600"),
        (b'{"text": "nul \\u0000 end"}', "nul \x00 end"),
    ],
)
def test_line_that_json_takes_gives_what_json_gives(tmp_path: Path, line: bytes, text: str) -> None:
    assert json.loads(line)["text"] == text
    assert texts(write(tmp_path / "a.jsonl", line)) == [text]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "is not valid JSON (Unterminated string"),
        (b'{"text": "a"} {"text": "b"}', "is not valid JSON (Extra data"),
        (b'{"text": "tab\there"}', "is not valid JSON (Invalid control character"),
        (b'{"text": "\xff"}', "is not UTF-8 (byte 10 of the line)."),
        (b'["text"]', "is a JSON list, must be an object."),
        (b"7", "is a JSON int, must be an object."),
        (b'"text"', "is a JSON str, must be an object."),
        (b"{}", "has no key 'text'; keys found: none."),
        (b'{"id": 1, "Text": "a"}', "has no key 'text'; keys found: 'id', 'Text'. Did you mean 'Text'?"),
        (b'{"id": 1, "txt": "a"}', "has no key 'text'; keys found: 'id', 'txt'. Did you mean 'txt'?"),
        (b'{"body": "a"}', "has no key 'text'; keys found: 'body'."),
        (b'{"text": null}', "key 'text' is null, must be a string."),
        (b'{"text": ["a"]}', "key 'text' is list, must be a string."),
        (b'{"text": "half \\ud800"}', "key 'text' holds a lone surrogate (character 5), which is no text."),
        (b"[" * 100_000, "is nested too deep to be a record."),
    ],
)
def test_bad_line_is_told_and_its_neighbours_are_read(tmp_path: Path, line: bytes, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", b'\n{"text": "one"}\n' + line + b'\r\n{"text": "two"}\n')
    (batch,) = batches(path)
    assert batch.texts == (["one", "two"],)
    (record,) = batch.bad
    assert record.where == f"{path}:3"
    assert record.problem.startswith(problem)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_bad_line_far_down_is_told_by_its_number(tmp_path: Path, ending: str, batch_bytes: int) -> None:
    content = b"".join(b"oops\n" if n in (57, 58, 91) else b'\n{"text": "%d"}\n' % n for n in range(100))
    numbers = [number for number, line in enumerate(content.split(b"\n"), start=1) if line == b"oops"]
    path = write(tmp_path / f"a.jsonl{ending}", PACK[ending](content))
    found = bad(path, unit_bytes=64, batch_bytes=batch_bytes)
    assert [record.where for record in found] == [f"{path}:{number}" for number in numbers]
    assert {record.record for record in found} == {"oops"}


def test_bad_lines_of_units_read_backwards_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"oops\n" * 40)
    units = cut_into_units(find_inputs([str(path)]), unit_bytes=50)
    found = [
        record.where for unit in reversed(units) for batch in read_unit(unit, keys=["text"]) for record in batch.bad
    ]
    assert sorted(found, key=lambda where: int(where.rpartition(":")[2])) == [f"{path}:{n}" for n in range(1, 41)]


def test_several_keys_give_a_list_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": "1", "b": "2"}\n{"a": "3"}\n{"b": "6", "a": "5"}\n')
    (batch,) = batches(path, keys=("b", "a"))
    assert batch.texts == (["2", "6"], ["1", "5"])
    assert [record.where for record in batch.bad] == [f"{path}:2"]


def test_long_bad_line_is_kept_shortened(tmp_path: Path) -> None:
    (record,) = bad(write(tmp_path / "a.jsonl", b'{"text": "' + b"x" * 100_000))
    assert record.record == '{"text": "' + "x" * 1990 + "..."


def test_bad_record_with_an_id_is_told_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"id": "d1", "text": 7}\noops\n{"id": 12}\n')
    assert [record.where for record in bad(path, id_key="id")] == [
        f"{path}:1 (id 'd1')",
        f"{path}:2",
        f"{path}:3 (id 12)",
    ]


def test_first_record_without_the_id_ends_the_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\n{"uid": "d1", "text": "a"}\n')
    assert refusal(path, id_key="id") == f"{path}:2: has no key 'id'; keys found: 'uid', 'text'. Did you mean 'uid'?"


def test_weights_of_a_file_add_up_to_its_size(tmp_path: Path) -> None:
    content = lines([str(n) * n for n in range(200)])
    for ending, pack in PACK.items():
        path = write(tmp_path / f"a.jsonl{ending}", pack(content))
        found = batches(path, unit_bytes=1000, batch_bytes=300)
        assert sum(batch.weight for batch in found) == path.stat().st_size


# ------------------------------------------------------------------------------------------------ packed files


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_packed_file_of_several_members_is_read_whole(tmp_path: Path, ending: str) -> None:
    members = [lines([f"{member}-{n}" for n in range(500)]) for member in range(5)]
    path = write(tmp_path / f"a.jsonl{ending}", b"".join(map(PACK[ending], members)))
    assert texts(path) == [f"{member}-{n}" for member in range(5) for n in range(500)]


def test_packed_members_that_meet_at_the_end_of_a_read_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ending in (".gz", ".zst", ".bz2"):
        path = write(tmp_path / f"a.jsonl{ending}", b"".join(PACK[ending](lines([str(n)])) for n in range(20)))
        for size in (1, 2, 3, 17, 40):
            monkeypatch.setattr("tools.preprocessing.compression.READ_BYTES", size)
            assert texts(path) == [str(n) for n in range(20)]


def test_gzip_members_padded_with_zeros_are_read_whole(tmp_path: Path) -> None:
    content = gzip.compress(lines(["a"])) + bytes(100_000) + gzip.compress(lines(["b"])) + bytes(7)
    assert texts(write(tmp_path / "a.jsonl.gz", content)) == ["a", "b"]


def test_zstd_frames_without_data_and_without_size_are_read(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    frame = stream.compress(lines(["a"])) + stream.flush()
    assert texts(write(tmp_path / "a.jsonl.zst", skippable + frame + skippable + zstandard.compress(lines(["b"])))) == [
        "a",
        "b",
    ]


def test_zstd_of_a_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = write(tmp_path / "a.jsonl.zst", stream.compress(lines(["a"])) + stream.flush())
    assert texts(path) == ["a"]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("left", [1, 9])
def test_cut_off_packed_file_is_refused(tmp_path: Path, ending: str, left: int) -> None:
    chance = random.Random(0)
    packed = PACK[ending](lines([chance.randbytes(50).hex() for _ in range(3000)]))
    path = write(tmp_path / f"a.jsonl{ending}", packed[:-left])
    assert f"{path}: ends in the middle of compressed data" in refusal(path)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
def test_damaged_packed_file_is_refused(tmp_path: Path, ending: str) -> None:
    chance = random.Random(0)
    # As the zstd tool does; Python's zstandard leaves the checksum out, and then most damage cannot be seen.
    pack = zstandard.ZstdCompressor(write_checksum=True).compress if ending == ".zst" else PACK[ending]
    packed = bytearray(pack(lines([chance.randbytes(50).hex() for _ in range(3000)])))
    packed[len(packed) // 2 : len(packed) // 2 + 400] = b"\xff" * 400
    path = write(tmp_path / f"a.jsonl{ending}", bytes(packed))
    assert f"{path}: is damaged" in refusal(path)


def test_packed_file_with_something_else_behind_it_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(lines(["a"])) + b"more")
    assert f"{path}: is damaged gzip data" in refusal(path)


# ------------------------------------------------------------------------------------------------ changed files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_file_that_changed_since_it_was_found_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pq.write_table(pa.table({"text": ["a"]}), path)
    if not name.endswith("parquet"):
        write(path, gzip.compress(lines(["a"])) if name.endswith("gz") else lines(["a"]))
    (unit,) = cut_into_units(find_inputs([str(path)]), unit_bytes=1 << 20)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=f"{name}: has changed since the run began"):
        list(read_unit(unit, keys=["text"]))
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read any more"):
        list(read_unit(unit, keys=["text"]))


def test_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(["a"] * 1000))
    (unit,) = cut_into_units(find_inputs([str(path)]), unit_bytes=1 << 20)
    reading = read_unit(unit, keys=["text"], batch_bytes=100)
    next(reading)
    write(path, lines(["a"] * 20))
    with pytest.raises(DataError, match="became shorter while it was read"):
        list(reading)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_file_without_line_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / f"a.jsonl{ending}", PACK[ending](b"x" * (3 << 20)))
    assert "has a line of more than 1 MiB" in refusal(path, unit_bytes=1000, batch_bytes=1000)


# ------------------------------------------------------------------------------------------------ tables


def save_stream(table: pa.Table, path: Path, rows: int = 10) -> Path:
    """Write a table as an Arrow stream."""
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def save_file(table: pa.Table, path: Path) -> Path:
    """Write a table as an Arrow file."""
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


def save_parquet(table: pa.Table, path: Path) -> Path:
    """Write a table as a Parquet file of small row groups."""
    pq.write_table(table, path, row_group_size=17)
    return path


SAVE = [(save_parquet, "a.parquet"), (save_stream, "a.arrow"), (save_file, "a.arrow")]


@pytest.mark.parametrize(("save", "name"), SAVE)
@pytest.mark.parametrize("unit_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("batch_bytes", [1, 100, 1 << 20])
def test_table_in_units_of_any_size_gives_every_text_once(
    tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str, unit_bytes: int, batch_bytes: int
) -> None:
    expected = odd_texts(1)
    path = save(pa.table({"n": range(len(expected)), "text": expected, "more": expected}), tmp_path / name)
    found = batches(path, unit_bytes=unit_bytes, batch_bytes=batch_bytes)
    assert [text for batch in found for text in batch.texts[0]] == expected
    assert sum(batch.weight for batch in found) == path.stat().st_size


@pytest.mark.parametrize(("save", "name"), SAVE)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_text_of_any_arrow_type_is_read(
    tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str, kind: pa.DataType
) -> None:
    expected = ["one", "two", "", "a text that is too long to be inlined in a view", "one"]
    path = save(pa.table({"text": pa.array(expected).cast(kind)}), tmp_path / name)
    assert texts(path) == expected


@pytest.mark.parametrize(("save", "name"), SAVE)
def test_null_in_a_table_is_told_by_its_row(tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str) -> None:
    table = pa.table(
        {"id": [f"d{n}" for n in range(50)], "text": [None if n in (3, 40) else str(n) for n in range(50)]}
    )
    path = save(table, tmp_path / name)
    found = batches(path, unit_bytes=1, id_key="id")
    assert [text for batch in found for text in batch.texts[0]] == [str(n) for n in range(50) if n not in (3, 40)]
    problem = "column 'text' is null, must be a string."
    assert [record for batch in found for record in batch.bad] == [
        BadRecord(f"{path}: row {n} (id 'd{n}')", problem, '{"text": null}') for n in (3, 40)
    ]


def test_null_in_a_dictionary_encoded_column_is_told(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["a", None, "a"]).dictionary_encode()})
    assert [record.where for record in bad(save_stream(table, tmp_path / "a.arrow"))] == [f"{tmp_path}/a.arrow: row 1"]


@pytest.mark.parametrize(("save", "name"), SAVE)
def test_text_in_a_table_that_is_not_utf8_is_told(
    tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str
) -> None:
    column = pa.array([b"one", b"t\xffo", b"three"]).view(pa.string())
    (batch,) = batches(save(pa.table({"text": column}), tmp_path / name))
    assert batch.texts == (["one", "three"],)
    problem = "column 'text' is not UTF-8 (byte 1 of the text)."
    assert batch.bad == [BadRecord(f"{tmp_path}/{name}: row 1", problem, '{"text": "t\\\\xffo"}')]


@pytest.mark.parametrize(("save", "name"), SAVE)
@pytest.mark.parametrize(
    ("column", "kind"), [([b"a"], "binary"), ([1], "int64"), ([["a"]], "list<element: string>|list<item: string>")]
)
def test_column_that_holds_no_text_is_refused(
    tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str, column: list[object], kind: str
) -> None:
    path = save(pa.table({"text": column}), tmp_path / name)
    assert refusal(path) in [
        f"{path}: column 'text' is {one}, must be text (string); cast it first." for one in kind.split("|")
    ]


@pytest.mark.parametrize(("save", "name"), SAVE)
def test_missing_column_is_refused_with_those_found(
    tmp_path: Path, save: Callable[[pa.Table, Path], Path], name: str
) -> None:
    path = save(pa.table({"id": [1], "txt": ["a"]}), tmp_path / name)
    assert refusal(path) == f"{path}: has no column 'text'; columns found: 'id', 'txt'. Did you mean 'txt'?"
    assert refusal(path, keys=("txt",), id_key="uid").endswith("columns found: 'id', 'txt'. Did you mean 'id'?")


def test_one_row_group_is_read_in_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "a.parquet", use_dictionary=False)
    found = batches(tmp_path / "a.parquet", batch_bytes=100_000)
    assert max(len(batch.texts[0]) for batch in found) <= 101
    assert sum(len(batch.texts[0]) for batch in found) == 1000


def test_rows_that_a_dictionary_makes_small_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROWS", 64)
    pq.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "a.parquet")
    assert max(len(batch.texts[0]) for batch in batches(tmp_path / "a.parquet")) == 64


def test_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [chance.randbytes(50).hex() for _ in range(1000)]})
    pq.write_table(table, path, compression="gzip", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[20_000:20_400] = b"\xff" * 400
    assert f"{path}: is damaged Parquet data" in refusal(write(path, bytes(content)))


def test_table_without_rows_gives_no_text(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([], pa.string())})
    assert texts(save_parquet(table, tmp_path / "a.parquet"), save_stream(table, tmp_path / "b.arrow")) == []


# ------------------------------------------------------------------------------------------------ samples


def test_sample_of_small_files_is_all_their_texts(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", lines(["a", "b"]) + b"oops\n")
    b = write(tmp_path / "b.jsonl.gz", gzip.compress(lines(["c"])))
    empty = write(tmp_path / "c.jsonl", b"")
    files = find_inputs([str(a), str(b), str(empty)])
    assert first_texts(files, keys=("text",), limit_bytes=10_000) == (["a", "b", "c"],)
    assert first_texts(files[2:], keys=("text",), limit_bytes=10_000) == ([],)


def test_sample_of_a_large_file_is_bounded_and_from_all_over_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([f"{n:05d}" * 20 for n in range(20_000)]))
    (sample,) = first_texts(find_inputs([str(path)]), keys=("text",), limit_bytes=32_000)
    assert 16_000 < sum(map(len, sample)) <= 32_000
    places = [int(text[:5]) for text in sample if len(text) == 100]
    assert min(places) == 0 and max(places) > 18_000


def test_sample_of_one_huge_text_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(["x" * 1_000_000]))
    (sample,) = first_texts(find_inputs([str(path)]), keys=("text",), limit_bytes=16_000)
    assert 0 < sum(map(len, sample)) <= 16_000


def test_unit_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(["a"]))
    (file,) = find_inputs([str(path)])
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        list(read_unit(Unit(number=0, file=file, start=0, end=1, weight=1), keys=["text"]))
