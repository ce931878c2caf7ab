"""Digests against xxhash's own; a stream that fails late and loudly."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_ext.checkpoint import digests
from megatron_ext.checkpoint.digests import DigestingFile, FileRecord

CONTENT = bytes(range(256)) * 40_000  # more than two blocks of 4 MiB


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: the system's own way to say that a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def record(content: bytes) -> FileRecord:
    return FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def test_file_is_digested_as_xxhash_does(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert digests.of_file(tmp_path / "file") == record(CONTENT)


@pytest.mark.parametrize("sizes", [(len(CONTENT),), (1, 7, len(CONTENT) - 8), ()])
def test_digest_taken_while_writing_is_that_of_the_file(sizes, tmp_path):
    file, begin = DigestingFile(tmp_path / "file"), 0
    for size in sizes:
        file.write(memoryview(CONTENT)[begin : begin + size])
        begin += size
    assert file.close() == record(CONTENT[:begin]) == digests.of_file(tmp_path / "file")


def test_tensor_written_through_the_digest_is_read_back(tmp_path):
    tensor = torch.randn(300, 40)
    file = DigestingFile(tmp_path / "file")
    torch.save(tensor, file)
    file.close()
    assert torch.equal(torch.load(tmp_path / "file"), tensor)


def test_write_beyond_the_limit_fails_at_close_naming_the_file(tmp_path):
    with file_size_limit(100_000):
        file = DigestingFile(tmp_path / "file")
        torch.save(torch.zeros(1_000_000), file)  # its C++ writer would end the process at an exception
        assert file.failed
        with pytest.raises(OSError) as caught:
            file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))


def test_folder_of_good_files_has_no_damage(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    expected = {name: record(name.encode() * 9) for name in ("a", "b", "c")}
    assert digests.find_damage(tmp_path, expected) is None


def test_all_bytes_that_are_verified_are_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(CONTENT)
    told: list[int] = []
    digests.find_damage(tmp_path, dict.fromkeys(("a", "b"), record(CONTENT)), told.append)
    assert sum(told) == 2 * len(CONTENT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "b cannot be read (No such file or directory)"),
        (b"12345", "b has 5 bytes, not 4"),
        (b"1235", "b is damaged (its content is not what was written)"),
    ],
)
def test_damage_is_named(content, reason, tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    if content is not None:
        (tmp_path / "b").write_bytes(content)
    assert digests.find_damage(tmp_path, {"a": record(b"a"), "b": record(b"1234")}) == reason


@pytest.mark.parametrize(
    ("name", "rank"), [("__0_0.distcp", 0), ("__12_1.distcp", 12), (".metadata", 5), ("__3_x.distcp", 5)]
)
def test_writer_of_a_shard_is_read_from_its_name(name, rank):
    assert digests.writer_of(name, 5) == rank


def test_file_that_cannot_be_created_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        DigestingFile(Path(tmp_path / "missing" / "file"))
