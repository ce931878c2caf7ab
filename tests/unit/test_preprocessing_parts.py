"""tools/preprocessing/parts.py and ranks.py: parts are whole or not there, plans are compared, work is shared out."""

from __future__ import annotations

import errno
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import DataError
from tools.preprocessing.batches import BadRecord
from tools.preprocessing.encode import Documents
from tools.preprocessing.inputs import InputFile, Unit
from tools.preprocessing.parts import PartWriter, WorkFolder, difference, group_units, writing
from tools.preprocessing.ranks import share_out

FILE = InputFile(path="a.jsonl", format="jsonl", compression=None, size=100, mtime_ns=1)


def unit(number: int, weight: int) -> Unit:
    return Unit(number=number, file=FILE, start=0, end=weight, weight=weight)


def documents(*lengths: int, sequences: list[int] | None = None) -> Documents:
    counts = None if sequences is None else np.array(sequences, dtype=np.int32)
    return Documents(np.arange(sum(lengths), dtype="<u2"), np.array(lengths, dtype=np.int32), counts)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("weights", "groups"),
    [
        ([], []),
        ([10, 10, 10], [[0, 1, 2]]),
        ([30, 1, 29, 1], [[0], [1, 2], [3]]),
        ([100, 1, 100], [[0], [1], [2]]),
        ([0, 0, 31], [[0, 1], [2]]),
    ],
)
def test_units_are_grouped_up_to_the_size_of_a_part(weights: list[int], groups: list[list[int]]) -> None:
    parts = group_units([unit(number, weight) for number, weight in enumerate(weights)], 30)
    assert [[unit.number for unit in part.units] for part in parts] == groups
    assert [part.number for part in parts] == list(range(len(groups)))


def test_part_that_is_finished_has_its_files_and_counts(tmp_path: Path) -> None:
    with PartWriter(tmp_path, 12, num_keys=2, sentences=False) as writer:
        writer.add([documents(3, 0), documents(1, 1)])
        writer.add([documents(2), documents(0)])
        record = writer.finish()
    assert (record.number, record.documents, record.skipped) == (12, 3, 0)
    assert record.sizes == {"00000012.0.bin": 10, "00000012.0.len": 12, "00000012.1.bin": 4, "00000012.1.len": 12}
    assert names_in(tmp_path) == [*record.sizes, "00000012.part"]
    assert record.checksums == {name: zlib.crc32((tmp_path / name).read_bytes()) for name in record.sizes}
    assert np.fromfile(tmp_path / "00000012.0.len", dtype="<i4").tolist() == [3, 0, 2]
    assert np.fromfile(tmp_path / "00000012.0.bin", dtype="<u2").tolist() == [0, 1, 2, 0, 1]


def test_part_of_sentences_counts_documents_not_sentences(tmp_path: Path) -> None:
    with PartWriter(tmp_path, 0, num_keys=1, sentences=True) as writer:
        writer.add([documents(3, 2, 1, sequences=[2, 0, 1])])
        record = writer.finish()
    assert record.documents == 3
    assert np.fromfile(tmp_path / "00000000.0.doc", dtype="<i4").tolist() == [2, 0, 1]


def test_part_keeps_skipped_records_beside(tmp_path: Path) -> None:
    with PartWriter(tmp_path, 0, num_keys=1, sentences=False) as writer:
        writer.add([documents(3)])
        writer.skip([BadRecord("a:1", "is bad.", "{ü")])
        record = writer.finish()
    assert record.skipped == 1
    lines = (tmp_path / "00000000.skipped").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"where": "a:1", "problem": "is bad.", "record": "{ü"}]


def test_part_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), PartWriter(tmp_path, 0, num_keys=1, sentences=False) as writer:
        writer.add([documents(3)])
        writer.skip([BadRecord("a:1", "is bad.", "{")])
        raise ZeroDivisionError
    assert names_in(tmp_path) == []


def claim(prefix: Path, *, restart: bool = False) -> Any:
    return WorkFolder(str(prefix)).claimed(restart=restart)


def finished(folder: WorkFolder, *, clean: bool = True) -> list[int]:
    return list(folder.finished(num_keys=1, clean=clean).records)


def finish_part(folder: Path, number: int, *, skipped: int = 0) -> None:
    with PartWriter(folder, number, num_keys=1, sentences=False) as writer:
        writer.add([documents(3)])
        writer.skip([BadRecord("a:1", "is bad.", "{")] * skipped)
        writer.finish()


def test_folder_without_a_finished_part_is_removed(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        folder.check_plan({"option": {}, "inputs": []})
        assert names_in(tmp_path) == ["out.partial"]
    assert names_in(tmp_path) == []


def test_folder_with_a_finished_part_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        raise ZeroDivisionError
    with claim(tmp_path / "out") as folder:
        assert finished(folder) == [0]


def test_folder_that_is_discarded_is_removed(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        folder.discard()
    assert names_in(tmp_path) == []


def test_folder_drops_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        (folder.path / "00000001.0.bin.partial-123").write_bytes(b"half")
    with claim(tmp_path / "out") as folder:
        assert "00000001.0.bin.partial-123" not in names_in(folder.path)
        assert finished(folder) == [0]


def test_folder_with_restart_drops_the_parts(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
    with claim(tmp_path / "out", restart=True) as folder:
        assert names_in(folder.path) == ["lock"]


def test_folder_gives_parts_with_skips_only_where_these_are_allowed(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        finish_part(folder.path, 1, skipped=2)
        assert finished(folder, clean=False) == [0, 1]
        assert finished(folder) == [0]
        assert finished(folder, clean=False) == [0], "the part is to be made again"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"number": 0}', '{"number": 0, "documents": 1, "skipped": 0, "sizes": 3}']
)
def test_folder_passes_over_a_damaged_record(tmp_path: Path, damage: str) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        (folder.path / "00000000.part").write_text(damage)
        assert finished(folder) == []


@pytest.mark.parametrize("name", ["00000001.0.bin", "00000001.0.len", "00000001.skipped"])
@pytest.mark.parametrize("damage", [b"", b"\0", b"?more"])
def test_folder_drops_a_part_with_a_damaged_file(tmp_path: Path, name: str, damage: bytes) -> None:
    with claim(tmp_path / "out") as folder:
        for number in range(3):
            finish_part(folder.path, number, skipped=1)
        path = folder.path / name
        content = path.read_bytes()
        place = next(place for place, byte in enumerate(content) if byte)
        path.write_bytes(content[:place] + damage + content[place + 1 :])
        assert finished(folder, clean=False) == [0, 2]
        assert finished(folder, clean=False) == [0, 2]


@pytest.mark.parametrize("name", ["00000001.0.len", "00000001.skipped"])
def test_folder_drops_a_part_that_lacks_a_file(tmp_path: Path, name: str) -> None:
    with claim(tmp_path / "out") as folder:
        for number in range(3):
            finish_part(folder.path, number, skipped=1)
        (folder.path / name).unlink()
        assert finished(folder, clean=False) == [0, 2]


@pytest.mark.parametrize(
    ("gone", "size", "expected"),
    [
        ([], 0, ([0, 1, 2, 3], 0, 0)),
        ([], 99, ([0, 1, 2, 3], 0, 0)),
        ([0], 6, ([0, 1, 2, 3], 1, 6)),
        ([0, 1], 12, ([0, 1, 2, 3], 2, 12)),
        ([0, 1], 13, ([0, 1, 2, 3], 2, 12)),
        ([0, 1], 11, ([0, 2, 3], 1, 6)),
        ([0, 1], None, ([2, 3], 0, 0)),
        ([1], 12, ([0, 2, 3], 0, 0)),
        ([0, 2], 18, ([0, 1, 3], 1, 6)),
        ([0, 1, 2, 3], 24, ([0, 1, 2, 3], 4, 24)),
    ],
)
def test_folder_takes_parts_without_ids_as_far_as_the_joined_file_holds_them(
    tmp_path: Path, gone: list[int], size: int | None, expected: tuple[list[int], int, int]
) -> None:
    """Each part holds six bytes of ids."""
    with claim(tmp_path / "out") as folder:
        for number in range(4):
            finish_part(folder.path, number)
        for number in gone:
            folder.part_file(number, 0, "bin").unlink()
        if size is not None:
            folder.joined_file(0).write_bytes(bytes(size))
        found = folder.finished(num_keys=1, clean=True)
        assert (list(found.records), found.joined, *found.joined_bytes) == expected


def test_folder_takes_joined_parts_of_two_keys_though_one_has_its_ids_still(tmp_path: Path) -> None:
    """A kill may come between dropping the first key's and the second's."""
    with claim(tmp_path / "out") as folder:
        with PartWriter(folder.path, 0, num_keys=2, sentences=False) as writer:
            writer.add([documents(3), documents(1)])
            writer.finish()
        folder.part_file(0, 0, "bin").unlink()
        folder.joined_file(0).write_bytes(bytes(6))
        assert folder.finished(num_keys=2, clean=True) == ({}, 0, (0, 0))
        with PartWriter(folder.path, 0, num_keys=2, sentences=False) as writer:
            writer.add([documents(3), documents(1)])
            record = writer.finish()
        folder.part_file(0, 0, "bin").unlink()
        folder.joined_file(1).write_bytes(bytes(2))
        assert folder.finished(num_keys=2, clean=True) == ({0: record}, 1, (6, 2))


@pytest.mark.parametrize("reason", ["", "manifest", "joined file", "part"])
def test_folder_takes_back_ids_of_a_pair_that_was_half_published_only(tmp_path: Path, reason: str) -> None:
    with claim(tmp_path / "out") as folder:
        finish_part(folder.path, 0)
        published = tmp_path / "out_text_document.bin"
        published.write_bytes(b"123456")
        if reason != "part":
            folder.part_file(0, 0, "bin").unlink()
        if reason == "manifest":
            (tmp_path / "out_text_document.manifest.json").touch()
        if reason == "joined file":
            folder.joined_file(0).touch()
        folder.take_back(0, tmp_path / "out_text_document")
        assert published.exists() == bool(reason)
        assert (folder.joined_file(0).exists() and folder.joined_file(0).read_bytes() == b"123456") == (not reason)


PLAN = {
    "json keys": ["text"],
    "option": {"append_eod": True, "lang": "english"},
    "tokenizer": {"sha256": "ab", "eod": 2},
    "inputs": [["/a", 10, 1], ["/b", 20, 2]],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"json keys": ["text", "title"]}, "json keys is ['text', 'title'], was ['text']."),
        ({"option": {"append_eod": False, "lang": "english"}}, "--append-eod is False, was True."),
        ({"option": {"append_eod": True}}, "--lang is None, was 'english'."),
        ({"option": {**PLAN["option"], "keep_newlines": True}}, "--keep-newlines is True, was None."),
        ({"tokenizer": {"sha256": "cd", "eod": 2}}, "tokenizer: sha256 is 'cd', was 'ab'."),
        ({"sentence model": "ef"}, "sentence model is 'ef', was None."),
        ({"inputs": [["/a", 11, 1], ["/b", 20, 2]]}, "/a: has changed (11 bytes, was 10)."),
        ({"inputs": [["/a", 10, 3], ["/b", 20, 2]]}, "/a: has changed (another time of change or content, same size)."),
        ({"inputs": [["/a", 10, 1]]}, "/b: is no longer among the inputs."),
        ({"inputs": [*PLAN["inputs"], ["/c", 1, 1]]}, "/c: was not among the inputs."),
        ({"inputs": [["/b", 20, 2], ["/a", 10, 1]]}, "the inputs are in another order."),
    ],
)
def test_plans_that_differ_are_told_apart(change: dict[str, Any], message: str | None) -> None:
    assert difference(PLAN, PLAN | change) == message


def test_plan_of_a_folder_without_parts_is_replaced(tmp_path: Path) -> None:
    with claim(tmp_path / "out") as folder:
        folder.check_plan(PLAN)
        folder.check_plan(PLAN | {"json keys": ["title"]})
        finish_part(folder.path, 0)
        with pytest.raises(DataError, match=r"json keys is \['text'\], was \['title'\]\. 1 finished parts"):
            folder.check_plan(PLAN)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_writing_to_a_full_disk_says_so(number: int) -> None:
    with (
        pytest.raises(DataError, match=r"^/x/out: the disk is full \(nothing left\); free some space"),
        writing("/x/out"),
    ):
        raise OSError(number, "nothing left")


def test_writing_where_it_is_forbidden_names_the_file() -> None:
    with pytest.raises(DataError, match=r"^/y: cannot be written \(no\)\.$"), writing("/x"):
        raise PermissionError(errno.EACCES, "no", "/y")


def test_work_is_shared_out_by_weight() -> None:
    weights = [5, 1, 1, 1, 9, 3]
    shares = share_out(list(enumerate(weights)), lambda item: item[1], size=2)
    assert shares == [[(4, 9), (2, 1)], [(0, 5), (5, 3), (1, 1), (3, 1)]]


def test_work_that_is_shared_out_is_all_there() -> None:
    shares = share_out(range(100), lambda item: item * item % 17, size=7)
    assert sorted(item for share in shares for item in share) == list(range(100))


def test_work_for_more_ranks_than_items_leaves_some_idle() -> None:
    assert share_out(["a"], lambda item: 1, size=3) == [["a"], [], []]
