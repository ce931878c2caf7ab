"""What is removed from a run's checkpoints, and what is not: expired ones, and what dead starts left."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout, removal
from megatron_ext.errors import CheckpointError
from tests.unit.test_layout import IO_ERROR, Killed, cut_off, description, save, write


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


# --- retention ------------------------------------------------------------------------------------------------


def test_removal_cut_off_leaves_nothing_that_looks_whole(checkpoints, monkeypatch):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    with monkeypatch.context() as patched:
        cut_off(patched, shutil, "rmtree")
        with pytest.raises(Killed):
            removal.remove_expired(checkpoints, keep_last=1, keep_every=None)
    assert [p.name for p in checkpoints.iterdir() if layout.why_not_whole(p) is None] == ["iter_0000020"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [
        (None, None, []),
        (2, None, [10, 20, 30]),
        (1, None, [10, 20, 30, 40]),
        (5, None, []),
        (9, None, []),
        (1, 20, [10, 30]),
        (2, 50, [10, 20, 30]),
    ],
)
def test_retention_of_five_checkpoints(keep_last, keep_every, gone):
    found = removal.expired([30, 10, 50, 20, 40], keep_last=keep_last, keep_every=keep_every)
    assert found == gone


def test_retention_removes_the_directories(checkpoints):
    for iteration in (10, 20, 30):
        save(checkpoints, iteration)
    removal.remove_expired(checkpoints, keep_last=1, keep_every=20)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000020", "iter_0000030", "latest"]


def test_retention_says_what_it_removed(checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    assert removal.remove_expired(checkpoints, keep_last=1, keep_every=None) == [checkpoints / "iter_0000010"]


def test_retention_does_not_count_damaged_checkpoints(checkpoints):
    for iteration in (10, 20, 30):
        save(checkpoints, iteration)
    (checkpoints / "iter_0000030" / ".metadata").unlink()
    removal.remove_expired(checkpoints, keep_last=1, keep_every=None)
    assert layout.find_newest(checkpoints).path == checkpoints / "iter_0000020"


def test_retention_leaves_a_save_under_way_alone(checkpoints):
    save(checkpoints, 10)
    temporary = write(checkpoints, 5)
    removal.remove_expired(checkpoints, keep_last=1, keep_every=None)
    assert temporary.is_dir()


def test_retention_removes_nothing_where_the_directory_cannot_be_flushed(checkpoints, monkeypatch):
    # The newer one's name might not outlast a power cut.
    for iteration in (10, 20):
        save(checkpoints, iteration)
    with monkeypatch.context() as patched:
        cut_off(patched, os, "fsync", error=IO_ERROR)
        with pytest.raises(OSError, match="Input/output error"):
            removal.remove_expired(checkpoints, keep_last=1, keep_every=None)
    assert (checkpoints / "iter_0000010").is_dir()


def test_retention_of_a_link_removes_the_link_alone(checkpoints, tmp_path):
    save(checkpoints, 10).rename(tmp_path / "archive")
    (checkpoints / "iter_0000010").symlink_to(tmp_path / "archive")
    save(checkpoints, 20)
    removal.remove_expired(checkpoints, keep_last=1, keep_every=None)
    assert names(checkpoints) == ["iter_0000020", "latest"]
    assert (tmp_path / "archive" / "megapints.json").is_file()


# --- what dead starts left --------------------------------------------------------------------------------------


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


@pytest.fixture
def left(checkpoints) -> Path:
    """A whole checkpoint among all that a start can leave when it dies."""
    save(checkpoints, 10)
    for name in ("iter_0000005.removed", "iter_0000010.replaced", "iter_0000008.tmp", "iter_0000020.a1b2c3.tmp"):
        shutil.copytree(checkpoints / "iter_0000010", checkpoints / name)
    return checkpoints


def test_what_dead_starts_left_is_removed_and_said_once(left, caplog):
    caplog.set_level(logging.INFO)
    removal.remove_leftovers(left, left / "iter_0000010", start="d4e5f6")
    assert names(left) == ["iter_0000010", "latest"]
    (line,) = [record.getMessage() for record in caplog.records]
    gone = "iter_0000005.removed, iter_0000008.tmp, iter_0000010.replaced, iter_0000020.a1b2c3.tmp"
    assert line == f"removed what earlier starts left in {left}: {gone}"


def test_what_this_start_writes_is_not_removed(left):
    removal.remove_leftovers(left, left / "iter_0000010", start="a1b2c3")
    assert names(left) == ["iter_0000010", "iter_0000020.a1b2c3.tmp", "latest"]


def test_only_unfinished_checkpoints_are_removed_where_none_is_known_to_be_whole(left):
    removal.remove_leftovers(left, None, start="d4e5f6")
    assert names(left) == ["iter_0000005.removed", "iter_0000010", "iter_0000010.replaced", "latest"]


def test_what_a_damaged_newer_checkpoint_replaced_is_kept(left):
    save(left, 9)
    removal.remove_leftovers(left, left / "iter_0000009")
    assert "iter_0000010.replaced" in names(left)


def test_other_files_are_not_removed(checkpoints):
    path = save(checkpoints, 10)
    others = ("iter_0000020.mine.old", "iter_0000010.copy", "iter_best.tmp", "notes.tmp")
    for name in others:
        (checkpoints / name).mkdir()
    removal.remove_leftovers(checkpoints, path)
    assert set(others) <= set(names(checkpoints))


def test_leftover_that_a_rank_still_writes_into_is_told_and_no_more(left, monkeypatch, caplog):
    # As of a dead start's rank that was cut off and goes on: a file comes while the directory is emptied.
    real = os.rmdir

    def rmdir(path, **options) -> None:
        if str(path).endswith("iter_0000020.a1b2c3.tmp"):
            (left / "iter_0000020.a1b2c3.tmp" / "__1_0.distcp").write_bytes(b"late")
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    removal.remove_leftovers(left, left / "iter_0000010", start="d4e5f6")
    assert names(left) == ["iter_0000010", "iter_0000020.a1b2c3.tmp", "latest"]
    assert "iter_0000020.a1b2c3.tmp: cannot be removed, and takes up disk space" in caplog.text


def test_run_that_saved_nothing_yet_has_nothing_to_remove(checkpoints, caplog):
    removal.remove_leftovers(checkpoints, None)
    assert not caplog.text


@pytest.mark.parametrize("call", [1, 2, 3])
def test_replacing_cut_off_anywhere_leaves_a_whole_checkpoint_for_the_next_start(call, checkpoints, monkeypatch):
    # The renames: of the former, of the new one, of the former again before it is removed.
    save(checkpoints, 10, b"old")
    temporary = write(checkpoints, 10, b"newer")
    with monkeypatch.context() as patched:
        cut_off(patched, Path, "rename", call=call)
        with pytest.raises(Killed):
            layout.publish(temporary, description(10))
    removal.put_back_replaced(checkpoints)
    found = layout.find_newest(checkpoints).path
    assert found == checkpoints / "iter_0000010"
    assert (found / "__0_0.distcp").read_bytes() == (b"newer" if call == 3 else b"old")
    removal.remove_leftovers(checkpoints, found)
    assert names(checkpoints) == ["iter_0000010", "latest"]


def test_name_that_cannot_be_given_back_is_an_error(checkpoints, monkeypatch):
    save(checkpoints, 10).rename(checkpoints / "iter_0000010.replaced")
    cut_off(monkeypatch, Path, "rename", error=IO_ERROR)
    with pytest.raises(CheckpointError, match=r"iter_0000010\.replaced: cannot get back its name, iter_0000010 .Input"):
        removal.put_back_replaced(checkpoints)
