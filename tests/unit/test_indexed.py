"""megatron_ext/data/indexed.py against megatron-core's builder and reader, and bytes written by hand."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import indexed
from megatron_ext.data.indexed import IndexedFile, IndexedWriter, Numbers, token_dtype
from megatron_ext.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [1], [65499, 0], [], []]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> Path:
    with IndexedWriter(prefix, dtype=token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add_document(document)
        writer.publish()
    return prefix


def numbers(*values: int) -> Numbers:
    return np.array(values, dtype=np.int32)


def write_with_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


def test_writer_one_document_gives_bytes_written_by_hand(tmp_path: Path) -> None:
    write(tmp_path / "a", [[3, 258]])
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", 2, 0, 0, 1)
    assert ((tmp_path / "a.bin").read_bytes(), (tmp_path / "a.idx").read_bytes()) == (b"\3\0\2\1", index)


@pytest.mark.parametrize("vocab_size", [1000, 65499, 65500, 70000])
@pytest.mark.parametrize("documents", [DOCUMENTS, [], [[]], [[], [9]]], ids=["mixed", "none", "empty", "late"])
def test_writer_files_equal_megatron_builders(tmp_path: Path, documents: list[list[int]], vocab_size: int) -> None:
    write(tmp_path / "ours", documents, vocab_size)
    write_with_megatron(tmp_path / "theirs", documents, vocab_size)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_writer_parts_equal_single_documents(tmp_path: Path) -> None:
    write(tmp_path / "single", DOCUMENTS)
    np.array([5, 6, 7, 1], dtype="<u2").tofile(tmp_path / "one")
    np.array([65499, 0], dtype="<u2").tofile(tmp_path / "two")
    with IndexedWriter(tmp_path / "parts", dtype=token_dtype(1000)) as writer:
        writer.add_part(tmp_path / "one", [numbers(3, 0), numbers(1)])
        writer.add_part(tmp_path / "two", [numbers(2, 0, 0)])
        writer.publish()
    for ending in ("bin", "idx"):
        assert (tmp_path / f"parts.{ending}").read_bytes() == (tmp_path / f"single.{ending}").read_bytes()


SENTENCES = [[[5, 6], [7]], [], [[1]], [[2], [3, 4], [65499]], []]


def write_sentences_with_megatron(prefix: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(1000))
    for document in SENTENCES:
        ids = [number for sentence in document for number in sentence]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(sentence) for sentence in document])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("block", [1, 2, 1 << 20])
def test_writer_documents_of_several_sequences_equal_megatron_builders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """In parts of two and three documents, and with an index that is written in blocks of any size."""
    monkeypatch.setattr(indexed, "_BLOCK", block)
    with IndexedWriter(tmp_path / "ours", dtype=token_dtype(1000)) as writer:
        for number, documents in enumerate((SENTENCES[:2], SENTENCES[2:])):
            sentences = [sentence for document in documents for sentence in document]
            np.array([number for sentence in sentences for number in sentence], dtype="<u2").tofile(
                tmp_path / f"{number}"
            )
            writer.add_part(
                tmp_path / f"{number}",
                [numbers(len(sentence)) for sentence in sentences],
                [numbers(*map(len, documents))],
            )
        totals = writer.publish()
    write_sentences_with_megatron(tmp_path / "theirs")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    assert (totals.documents, totals.empty_documents, totals.tokens) == (5, 2, 8)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_writer_index_in_blocks_equals_megatron_builders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(indexed, "_BLOCK", block)
    write(tmp_path / "ours", DOCUMENTS)
    write_with_megatron(tmp_path / "theirs", DOCUMENTS, 1000)
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_writer_keeps_unfinished_files_in_the_folder_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000), aside=tmp_path / "work") as writer:
        writer.add_document([1])
        assert [path.name for path in tmp_path.iterdir()] == ["work"]
        writer.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "work"]
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("sealed", [False, True])
def test_writer_goes_on_with_ids_that_it_is_given(tmp_path: Path, sealed: bool) -> None:
    write(tmp_path / "single", DOCUMENTS)
    ids = tmp_path / "ids"
    np.array([5, 6, 7, 1], dtype="<u2").tofile(ids)
    np.array([65499, 0], dtype="<u2").tofile(tmp_path / "two")
    with IndexedWriter(tmp_path / "parts", dtype=token_dtype(1000), ids=ids) as writer:
        writer.add_lengths([numbers(3, 0), numbers(1)])
        writer.add_part(tmp_path / "two", [numbers(2, 0, 0)])
        writer.flush_ids()
        if sealed:
            writer.publish()
    assert ids.exists() != sealed
    if not sealed:
        assert ids.read_bytes() == (tmp_path / "single.bin").read_bytes()
        return
    for ending in ("bin", "idx"):
        assert (tmp_path / f"parts.{ending}").read_bytes() == (tmp_path / f"single.{ending}").read_bytes()


def test_writer_sealed_keeps_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer:
        writer.add_document([3])
        writer.seal()
    assert IndexedFile.open(tmp_path / "a").document(0).tolist() == [1, 2]


def test_writer_copies_parts_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "not between these")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    np.array([5, 6, 7], dtype="<u2").tofile(tmp_path / "part")
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer:
        writer.add_document([1])
        writer.add_part(tmp_path / "part", [numbers(1, 2)])
        writer.add_document([9])
        writer.publish()
    assert IndexedFile.open(tmp_path / "a").tokens.tolist() == [1, 5, 6, 7, 9]


def test_writer_part_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"123")
    with (
        IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer,
        pytest.raises(DataError, match="holds 3 bytes, must hold 4"),
    ):
        writer.add_part(tmp_path / "part", [numbers(2)])


def test_writer_totals_count_what_was_written(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
        totals = writer.publish()
    sizes = [(tmp_path / f"a.{ending}").stat().st_size for ending in ("bin", "idx")]
    assert totals == (6, 6, 3, *sizes)


def test_writer_not_published_leaves_nothing(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer:
        writer.add_document([1])
    assert list(tmp_path.iterdir()) == []


def test_writer_not_published_keeps_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer:
        writer.add_document([3])
        raise ZeroDivisionError
    assert IndexedFile.open(tmp_path / "a").document(0).tolist() == [1, 2]


def test_writer_publish_removes_the_old_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.manifest.json").write_text("{}")
    write(tmp_path / "a", [[1]])
    assert not (tmp_path / "a.manifest.json").exists()


def test_writer_id_beyond_the_type_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", dtype=token_dtype(1000)) as writer, pytest.raises(OverflowError):
        writer.add_document([65536])


def test_reader_gives_the_documents_back(tmp_path: Path) -> None:
    file = IndexedFile.open(write(tmp_path / "a", DOCUMENTS))
    assert [file.document(number).tolist() for number in range(file.num_documents)] == DOCUMENTS


def test_reader_document_lengths_count_empty_ones(tmp_path: Path) -> None:
    assert IndexedFile.open(write(tmp_path / "a", DOCUMENTS)).document_lengths().tolist() == [
        3,
        0,
        1,
        2,
        0,
        0,
    ]


def test_reader_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4]), [1, 3])
    builder.add_document(torch.tensor([5, 6]), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    file = IndexedFile.open(tmp_path / "a")
    assert [file.document(number).tolist() for number in range(2)] == [[1, 2, 3, 4], [5, 6]]


def test_megatron_reader_reads_the_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(write(tmp_path / "a", DOCUMENTS)))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [[5, 6, 7], [1], [65499, 0]]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_reader_missing_file_is_refused(tmp_path: Path, missing: str) -> None:
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / f"a.{missing}").unlink()
    with pytest.raises(DataError, match=rf"a\.{missing}: no such file"):
        IndexedFile.open(tmp_path / "a")


@pytest.mark.parametrize("size", [0, 1, 11])
def test_reader_truncated_bin_is_refused(tmp_path: Path, size: int) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:size])
    with pytest.raises(DataError, match=rf"a\.bin: holds {size} bytes, the index promises 12"):
        IndexedFile.open(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "no MMIDIDX header"),
        (lambda content: b"X" + content[1:], "no MMIDIDX header"),
        (lambda content: content[:20], "no MMIDIDX header"),
        (lambda content: content[:9] + b"\2" + content[10:], "format version is 2"),
        (lambda content: content[:17] + b"\7" + content[18:], "type code is 7"),
        (lambda content: content[:17] + b"\x63" + content[18:], "type code is 99"),
        (lambda content: content[:-1], "its header promises"),
        (lambda content: content + b"\0\0\0", "sequence modes"),
        (lambda content: content[:26] + bytes(8), "has no document index"),
    ],
)
def test_reader_damaged_index_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.idx") as caught:
        IndexedFile.open(prefix)
    assert message in str(caught.value)
