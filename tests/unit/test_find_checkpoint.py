"""Which checkpoint of a run is found, and what is said of those that are not whole or cannot be looked at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.errors import CheckpointError
from tests.unit.test_layout import save, unmounted


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_newest_of_a_missing_directory_is_none(checkpoints):
    assert layout.find_newest(checkpoints) == (None, ())


def test_newest_is_that_of_the_highest_iteration(checkpoints):
    for iteration in (9_999_999, 10_000_000, 500):
        save(checkpoints, iteration)
    assert layout.find_newest(checkpoints).path == checkpoints / "iter_10000000"


def test_newest_does_not_depend_on_the_file_latest(checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    (checkpoints / "latest").write_text("iter_0000010\n")
    assert layout.find_newest(checkpoints).path == checkpoints / "iter_0000020"


def test_newest_passes_over_a_damaged_one(checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    (checkpoints / "iter_0000020" / ".metadata").unlink()
    assert layout.find_newest(checkpoints).path == checkpoints / "iter_0000010"


def test_newest_names_the_damaged_ones_that_it_passed_over(checkpoints):
    for iteration in (10, 20, 30):
        save(checkpoints, iteration)
    for iteration in ("20", "30"):
        (checkpoints / f"iter_00000{iteration}" / ".metadata").unlink()
    rejected = layout.find_newest(checkpoints).rejected
    assert [(r.path.name, r.reason) for r in rejected] == [
        ("iter_0000030", ".metadata is missing"),
        ("iter_0000020", ".metadata is missing"),
    ]


def test_newest_says_nothing_of_older_damaged_ones(checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    (checkpoints / "iter_0000010" / ".metadata").unlink()
    assert layout.find_newest(checkpoints).rejected == ()


UNREADABLE = {
    "link_into_nothing": (unmounted, "is a link to /archive/that/is/not/mounted, which is not there"),
    "link_to_itself": (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
    "file": (lambda path: path.write_text("x"), "is not a directory"),
}
unreadable = pytest.mark.parametrize(("make", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())


@unreadable
def test_newest_that_is_no_readable_directory_is_rejected_with_its_reason(make, reason, checkpoints):
    older = save(checkpoints, 10)
    newest = checkpoints / "iter_0000020"
    make(newest)
    assert layout.find_newest(checkpoints) == (older, ((newest, reason),))


@unreadable
def test_only_checkpoint_that_is_no_readable_directory_is_rejected_with_its_reason(make, reason, checkpoints):
    checkpoints.mkdir(parents=True)
    only = checkpoints / "iter_0000020"
    make(only)
    assert layout.find_newest(checkpoints) == (None, ((only, reason),))


def test_newest_that_the_file_system_fails_to_look_at_is_rejected_with_its_reason(checkpoints, monkeypatch):
    older, newest = save(checkpoints, 10), save(checkpoints, 20)
    look = Path.stat

    def fails(self: Path, **options: bool) -> os.stat_result:
        if self == newest:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return look(self, **options)

    monkeypatch.setattr(Path, "stat", fails)
    assert layout.find_newest(checkpoints) == (older, ((newest, "cannot be read (Input/output error)"),))


@unreadable
def test_checkpoints_that_are_no_readable_directory_are_an_error(make, reason, checkpoints):
    checkpoints.parent.mkdir()
    make(checkpoints)
    with pytest.raises(CheckpointError) as caught:
        layout.find_newest(checkpoints)
    assert str(caught.value).startswith(f"{checkpoints}: {reason}, so whether the run has checkpoints is not known")


def test_other_file_beside_the_checkpoints_is_not_judged(checkpoints):
    path = save(checkpoints, 10)
    (checkpoints / "iter_notes.txt").write_text("x")
    assert layout.find_newest(checkpoints) == (path, ())


@unreadable
def test_resolve_of_a_run_whose_checkpoints_are_unreadable_says_why(make, reason, checkpoints):
    checkpoints.parent.mkdir()
    make(checkpoints)
    with pytest.raises(CheckpointError) as caught:
        layout.resolve(checkpoints.parent)
    assert reason in str(caught.value)


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/iter_0000020"])
def test_resolve_finds_the_checkpoint_from_the_run_and_from_within(given, checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    assert layout.resolve(checkpoints.parent / given) == checkpoints / "iter_0000020"


def test_resolve_of_an_older_checkpoint_gives_that_one(checkpoints):
    for iteration in (10, 20):
        save(checkpoints, iteration)
    assert layout.resolve(checkpoints / "iter_0000010") == checkpoints / "iter_0000010"


def test_resolve_of_a_damaged_checkpoint_is_refused(checkpoints):
    path = save(checkpoints, 10)
    (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"iter_0000010: not a whole checkpoint: \.metadata is missing\."):
        layout.resolve(path)


def test_resolve_of_a_run_whose_checkpoints_are_damaged_says_what_is_wrong_with_each(checkpoints):
    (save(checkpoints, 10) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint \(iter_0000010: \.metadata is missing\)"):
        layout.resolve(checkpoints.parent)


def test_resolve_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: does not exist; give a run directory"):
        layout.resolve(tmp_path / "nowhere")


def test_resolve_of_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        layout.resolve(tmp_path)


def test_run_of_a_checkpoint_is_two_levels_up(checkpoints):
    assert layout.run_of(save(checkpoints, 10)) == checkpoints.parent
