"""tools/preprocessing/inputs.py: what words name, what is refused and how, and how files are cut into units."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_ext.errors import DataError
from tools.preprocessing import inputs
from tools.preprocessing.inputs import cut_into_units, find_inputs

LINE = b'{"text": "one"}\n'
PARQUET_TABLE = pa.table({"text": ["one", "two", "three", "four"]})


def write(path: Path, content: bytes = LINE) -> Path:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_dataset(folder: Path, shards: list[list[str]]) -> Path:
    """Write what `Dataset.save_to_disk` of datasets 5.2 writes, as far as a reader needs it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    return folder


def find(*words: Path | str, **options: object) -> list[str]:
    """Find inputs; returns their paths."""
    return [file.path for file in find_inputs([str(word) for word in words], **options)]  # type: ignore[arg-type]


def refusal(*words: Path | str, **options: object) -> str:
    """Give the message that words are refused with."""
    with pytest.raises(DataError) as caught:
        find(*words, **options)
    return str(caught.value)


class Pipe(io.BytesIO):
    """Standard input with some bytes."""

    @property
    def buffer(self) -> Pipe:
        return self


# ------------------------------------------------------------------------------------------------ what words name


@pytest.mark.parametrize(
    ("name", "content", "form", "compression"),
    [
        ("a.jsonl", LINE, "jsonl", None),
        ("a.json", LINE, "jsonl", None),
        ("A.NDJSON", LINE, "jsonl", None),
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0), "jsonl", "gzip"),
        ("a.json.zst", zstandard.compress(LINE), "jsonl", "zstd"),
        ("a.ndjson.bz2", bz2.compress(LINE), "jsonl", "bz2"),
    ],
)
def test_file_by_its_ending_is_recognised(
    tmp_path: Path, name: str, content: bytes, form: str, compression: str | None
) -> None:
    path = write(tmp_path / name, content)
    (file,) = find_inputs([str(path)])
    assert (file.path, file.format, file.compression) == (str(path), form, compression)
    assert (file.size, file.mtime_ns) == (len(content), path.stat().st_mtime_ns)


def test_folder_is_walked_in_name_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/z.jsonl",
        "a/deep/y.jsonl",
        "c.jsonl",
        ".hidden.jsonl",
        "_SUCCESS",
        ".git/x.jsonl",
        "README.md",
    ):
        write(tmp_path / name)
    write(tmp_path / "_tmp" / "x.jsonl")
    assert find(tmp_path) == [str(tmp_path / name) for name in ("a/deep/y.jsonl", "a/z.jsonl", "b.jsonl", "c.jsonl")]


def test_folder_with_a_link_to_itself_is_walked_once(tmp_path: Path) -> None:
    write(tmp_path / "data" / "a.jsonl")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    assert find(tmp_path / "data") == [str(tmp_path / "data" / "a.jsonl")]


def test_pattern_gives_its_files_sorted(tmp_path: Path) -> None:
    for name in ("p2.jsonl", "p10.jsonl", "q.jsonl", "sub/p.jsonl"):
        write(tmp_path / name)
    assert find(tmp_path / "p*.jsonl") == [str(tmp_path / "p10.jsonl"), str(tmp_path / "p2.jsonl")]
    assert len(find(tmp_path / "**" / "*.jsonl")) == 4


def test_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1].jsonl")
    assert find(path) == [str(path)]


def test_list_file_names_inputs_after_the_words(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl") for name in "abc")
    listing = write(tmp_path / "list.txt", f"# corpus\n\n{c}\n  {a}  \n".encode())
    assert find(b, lists=[str(listing)]) == [str(b), str(c), str(a)]


def test_saved_dataset_folder_gives_its_shards_in_order(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "corpus" / "wiki", [["a"], ["b"]])
    expected = [str(folder / "data-00000-of-00002.arrow"), str(folder / "data-00001-of-00002.arrow")]
    assert find(folder) == expected
    assert find(tmp_path / "corpus") == expected  # and inside a folder, where state.json is no input either


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress, bz2.compress])
def test_standard_input_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    content = pack(LINE)  # type: ignore[operator]
    monkeypatch.setattr(sys, "stdin", Pipe(content))
    (file,) = find_inputs(["-"], spool=tmp_path / "work" / "standard-input")
    assert Path(file.path).read_bytes() == content
    assert (file.format, file.size) == ("jsonl", len(content))
    assert file.compression == {bytes: None, gzip.compress: "gzip", zstandard.compress: "zstd"}.get(pack, "bz2")  # type: ignore[call-overload]
    assert os.listdir(tmp_path / "work") == ["standard-input"]


def test_standard_input_of_parquet_is_read_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.BytesIO()
    pq.write_table(PARQUET_TABLE, sink)
    monkeypatch.setattr(sys, "stdin", Pipe(sink.getvalue()))
    assert find_inputs(["-"], spool=tmp_path / "spool")[0].format == "parquet"


def test_empty_file_is_an_input_without_units(tmp_path: Path) -> None:
    files = find_inputs([str(write(tmp_path / "a.jsonl", b"")), str(write(tmp_path / "b.jsonl.gz", b""))])
    assert [file.size for file in files] == [0, 0]
    assert cut_into_units(files, unit_bytes=10) == []


# ------------------------------------------------------------------------------------------------ what is refused


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: there is no such file or folder."


def test_pattern_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "*.jsonl") == f"{tmp_path}/*.jsonl: no file fits this pattern."


def test_unknown_ending_is_refused_with_those_known(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.txt"))
    assert message.startswith(f"{tmp_path}/a.txt: its ending is not known; known are .jsonl")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # permission bits do not keep root out

    monkeypatch.setattr(inputs, "open", refuse, raising=False)
    assert refusal(path) == f"{path}: cannot be read (Permission denied)."


def test_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert refusal(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: cannot be read (No such file or directory)."


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is no regular file" in refusal(tmp_path / "a.jsonl")


def test_same_file_twice_is_refused_through_links_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(path)
    assert refusal(path, path) == f"{path}: is there twice; name each input once."
    assert refusal(path, tmp_path / "b.jsonl").startswith(f"{tmp_path}/b.jsonl: is there twice (as {path})")
    assert "is there twice" in refusal(tmp_path)


def test_folder_without_inputs_is_refused_with_the_endings_there(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "LICENSE")
    assert refusal(tmp_path).startswith(f"{tmp_path}: holds no input; endings there: .txt, LICENSE; known are")


def test_json_lines_packed_otherwise_in_a_folder_are_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl.xz", b"\xfd7zXZ\x00")
    assert refusal(tmp_path).startswith(f"{tmp_path}/b.jsonl.xz: is packed in a way that is not known here")


@pytest.mark.parametrize("content", [b"", b"# nothing\n\n"])
def test_empty_list_is_refused(tmp_path: Path, content: bytes) -> None:
    listing = write(tmp_path / "list.txt", content)
    assert refusal(lists=[str(listing)]) == f"{listing}: names no input; it must hold a path per line."


def test_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot be read as a list of inputs" in refusal(lists=[str(tmp_path / "list.txt")])


def test_no_words_are_refused() -> None:
    assert refusal().startswith("no input is named")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", gzip.compress(LINE, mtime=0), "is no text (gzip data), must be JSON Lines"),
        ("a.jsonl", bytes(range(256)) * 8, "is no text (neither text nor anything known)"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "is no text (UTF-16 text)"),
        ("a.jsonl.gz", LINE, "is not gzip data (text)"),
        ("a.jsonl.gz", zstandard.compress(LINE), "is not gzip data (zstd data)"),
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:10], "ends in the middle of compressed data"),
        (
            "a.jsonl.gz",
            gzip.compress(b"PK\x03\x04" + bytes(99), mtime=0),
            "is no text (gzip data that hold a zip archive)",
        ),
        ("a.parquet", LINE, "is no Parquet file (text)"),
        ("a.parquet", b"", "is no Parquet file (empty)"),
        ("a.arrow", LINE, "is no Arrow file (text)"),
        ("a.json", b'[{"text": "one"}]', "is one JSON array, must be JSON Lines (an object per line)"),
        ("a.json", b'\xef\xbb\xbf\n[\n  {"text": "one"}\n]', "is one JSON array"),
        ("a.json.gz", gzip.compress(b'[{"text": "one"}]', mtime=0), "is one JSON array"),
        ("a.json", b'{\n  "text": "one"\n}\n', "is JSON with objects over several lines"),
    ],
)
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = write(tmp_path / name, content)
    assert refusal(path).startswith(f"{path}: {said}")


def test_dataset_of_several_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    save_dataset(tmp_path / "train", [["a"]])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert refusal(tmp_path).endswith(f"name those to read: {tmp_path}/train, {tmp_path}/test.")


def test_saved_selection_of_rows_is_refused(tmp_path: Path) -> None:
    folder = save_dataset(tmp_path / "wiki", [["a"]])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert "is a selection of rows of a dataset" in refusal(folder)


def test_standard_input_from_a_terminal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipe(LINE)
    monkeypatch.setattr(pipe, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", pipe)
    assert "is a terminal" in refusal("-", spool=tmp_path / "spool")
    assert not list(tmp_path.iterdir())


def test_standard_input_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Pipe(LINE))
    assert "standard input (-): is there twice" in refusal("-", "-", spool=tmp_path / "spool")


# ------------------------------------------------------------------------------------------------ units


def test_plain_file_is_cut_at_multiples(tmp_path: Path) -> None:
    files = find_inputs([str(write(tmp_path / "a.jsonl", LINE * 10)), str(write(tmp_path / "b.jsonl", LINE))])
    units = cut_into_units(files, unit_bytes=64)
    assert [(unit.file.path[-7], unit.start, unit.end, unit.weight) for unit in units] == [
        ("a", 0, 64, 64),
        ("a", 64, 128, 64),
        ("a", 128, 160, 32),
        ("b", 0, 16, 16),
    ]
    assert [unit.number for unit in units] == [0, 1, 2, 3]


def test_packed_file_is_one_unit(tmp_path: Path) -> None:
    (file,) = find_inputs([str(write(tmp_path / "a.jsonl.gz", gzip.compress(LINE * 1000)))])
    (unit,) = cut_into_units([file], unit_bytes=8)
    assert (unit.start, unit.end, unit.weight) == (0, file.size, file.size)


def test_parquet_file_is_cut_between_row_groups(tmp_path: Path) -> None:
    pq.write_table(PARQUET_TABLE, tmp_path / "a.parquet", row_group_size=1)
    (file,) = find_inputs([str(tmp_path / "a.parquet")])
    spans = [(unit.start, unit.end) for unit in cut_into_units([file], unit_bytes=1)]
    assert spans == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert sum(unit.weight for unit in cut_into_units([file], unit_bytes=1)) == file.size
    assert [(unit.start, unit.end) for unit in cut_into_units([file], unit_bytes=1 << 20)] == [(0, 4)]


def test_arrow_file_is_cut_between_record_batches(tmp_path: Path) -> None:
    files = find_inputs([str(save_dataset(tmp_path / "wiki", [["a", "b", "c", "d", "e"], ["f"]]))])
    spans = [(Path(unit.file.path).name[5:10], unit.start, unit.end) for unit in cut_into_units(files, unit_bytes=1)]
    assert spans == [("00000", 0, 1), ("00000", 1, 2), ("00000", 2, 3), ("00001", 0, 1)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_cut_off_table_is_refused(tmp_path: Path, name: str) -> None:
    whole = tmp_path / f"whole-{name}"
    if name.endswith("parquet"):
        pq.write_table(PARQUET_TABLE, whole)
    else:
        with pa.ipc.new_stream(whole, PARQUET_TABLE.schema) as writer:
            writer.write_table(PARQUET_TABLE)
    path = write(tmp_path / name, whole.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{name}: is no whole (Parquet|Arrow) file"):
        cut_into_units(find_inputs([str(path)]), unit_bytes=100)
