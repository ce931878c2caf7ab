"""megatron_ext/data/verify.py: faults and their places do not depend on the blocks in which a pair is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.data import verify
from megatron_ext.data.indexed import IndexedFile, IndexedWriter, token_dtype

DOCUMENTS = [[1, 2], [], [3], [4, 5, 6], [], [7], [8, 9]]
"""Five sequences: in the index, lengths from byte 34, pointers from 54, the document index from 94."""


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(70000)) as writer:
        for ids in DOCUMENTS:
            writer.add_document(ids)
        writer.publish()
    return tmp_path / "a"


@pytest.fixture(params=[1, 2, 3, 1 << 20])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(verify, "BLOCK", request.param)
    return int(request.param)


Change = Callable[[str, int, bytes], None]


@pytest.fixture
def change(prefix: Path) -> Change:
    def run(ending: str, offset: int, content: bytes) -> None:
        path = Path(f"{prefix}.{ending}")
        old = path.read_bytes()
        path.write_bytes(old[:offset] + content + old[offset + len(content) :])

    return run


def test_verify_sound_pair_has_no_fault_and_counts_every_byte_but_the_header(prefix: Path, block: int) -> None:
    file, seen = IndexedFile.open(prefix), []
    assert verify.index_faults(file, seen.append) == []
    assert verify.id_faults(file, vocab_size=10, advance=seen.append) == []
    assert sum(seen) == file.idx_bytes - 34 + file.bin_bytes


def test_verify_pair_without_documents_has_no_fault(tmp_path: Path, block: int) -> None:
    with IndexedWriter(tmp_path / "b", dtype=token_dtype(70000)) as writer:
        writer.publish()
    file = IndexedFile.open(tmp_path / "b")
    assert verify.index_faults(file, lambda size: None) == []
    assert verify.id_faults(file, vocab_size=10, advance=lambda size: None) == []


@pytest.mark.parametrize(
    ("offset", "content", "fault"),
    [
        (38, struct.pack("<i", -1), "sequence 1: its length is -1, must be at least 1."),
        (54 + 8 * 3, struct.pack("<q", 25), "sequence 3: its pointer is 25, must be 24, where"),
        (54 + 8 * 2, struct.pack("<qq", 0, 0), "sequence 2: its pointer is 0, must be 12, where the sequences before "
         "it end (and 1 more)."),
        (94 + 8 * 3, struct.pack("<q", 5), "document 3: ends at sequence 3, before it begins (5)."),
        (94 + 8 * 7, struct.pack("<q", 3), "document 6: ends at sequence 3, before it begins (4)."),
        (94, struct.pack("<q", -1), "document 0: begins at sequence -1, must begin at 0."),
    ],
)  # fmt: skip
def test_verify_index_fault_is_placed_whatever_the_blocks(
    prefix: Path, change: Change, block: int, offset: int, content: bytes, fault: str
) -> None:
    change("idx", offset, content)
    found = verify.index_faults(IndexedFile.open(prefix), lambda size: None)
    assert any(line.startswith(f"{prefix}.idx: {fault}") for line in found), found


def test_verify_ids_outside_the_vocabulary_are_placed_whatever_the_blocks(
    prefix: Path, change: Change, block: int
) -> None:
    change("bin", 4 * 4, struct.pack("<i", -3))
    change("bin", 4 * 7, struct.pack("<i", 10))
    found = verify.id_faults(IndexedFile.open(prefix), vocab_size=10, advance=lambda size: None)
    place = "token 4 (byte 16, sequence 2, document 3)"
    assert found == [f"{prefix}.bin: {place}: id is -3, must be from 0 to 9 (and 1 more)."]


def test_verify_negative_id_is_a_fault_without_a_vocabulary(prefix: Path, change: Change, block: int) -> None:
    change("bin", 4 * 7, struct.pack("<i", -1))
    found = verify.id_faults(IndexedFile.open(prefix), vocab_size=None, advance=lambda size: None)
    assert found == [f"{prefix}.bin: token 7 (byte 28, sequence 4, document 6): id is -1, must be at least 0."]
