"""Checkpoint directories: whole or ignored, at whatever moment a save or a removal was cut off."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.durable import write_whole
from megatron_ext.errors import CheckpointError


class Killed(BaseException):
    """The process ends here, without any clearing up."""


def description(iteration: int = 10) -> CheckpointDescription:
    return CheckpointDescription(
        iteration=iteration,
        consumed_samples=8 * iteration,
        consumed_tokens=128 * iteration,
        model={"num_layers": 2},
        config={"train": {"seed": 1}},
        optimizer_format="dp_reshardable",
        tokenizer_sha256="ab" * 32,
        topology={"tensor_model_parallel_size": 1},
    )


def write(checkpoints: Path, iteration: int, content: bytes = b"weights") -> Path:
    """Write the files of a checkpoint aside."""
    temporary = layout.prepare_temporary(checkpoints, iteration)
    (temporary / "__0_0.distcp").write_bytes(content)
    (temporary / ".metadata").write_bytes(b"metadata")
    return temporary


def save(checkpoints: Path, iteration: int, content: bytes = b"weights") -> Path:
    return layout.publish(write(checkpoints, iteration, content), description(iteration))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


# --- publishing -----------------------------------------------------------------------------------------------


def test_published_checkpoint_is_whole(checkpoints):
    assert layout.why_not_whole(save(checkpoints, 10)) is None


def test_published_checkpoint_is_named_by_its_iteration(checkpoints):
    assert save(checkpoints, 10) == checkpoints / "iter_0000010"


def test_published_checkpoint_leaves_nothing_beside_it_but_latest(checkpoints):
    save(checkpoints, 10)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000010", "latest"]


def test_latest_names_the_newest(checkpoints):
    save(checkpoints, 10)
    save(checkpoints, 20)
    assert (checkpoints / "latest").read_text() == "iter_0000020\n"


def test_description_lists_every_file_with_its_size(checkpoints):
    path = save(checkpoints, 10)
    body = json.loads((path / "megapints.json").read_text())
    assert body["files"] == {".metadata": 8, "__0_0.distcp": 7}


def test_description_is_read_as_it_was_written(checkpoints):
    assert layout.read_description(save(checkpoints, 10)) == description(10)


def test_recent_losses_are_read_bit_for_bit(checkpoints):
    losses = (0.1 + 0.2, 1 / 3, 4.738043241500854)
    path = layout.publish(write(checkpoints, 10), replace(description(), recent_losses=losses))
    assert layout.read_description(path).recent_losses == losses


def test_sums_of_the_next_row_are_read_bit_for_bit(checkpoints):
    sums = {"unreported_updates": 3, "unreported_loss_sum": 0.1 + 0.2 + 1 / 3, "grad_norm": 2 / 3}
    path = layout.publish(write(checkpoints, 10), replace(description(), **sums))
    found = layout.read_description(path)
    assert {name: getattr(found, name) for name in sums} == sums


def test_description_from_before_losses_were_kept_has_none(checkpoints):
    path = save(checkpoints, 10) / layout.DESCRIPTION
    body = json.loads(path.read_text())
    losses = {"recent_losses", "unreported_updates", "unreported_loss_sum", "grad_norm"}
    older = {"format", "files", *vars(description())} - losses  # and without digests
    path.write_text(json.dumps({name: body[name] for name in older}))
    assert layout.read_description(path.parent) == description(10)


def test_preparing_clears_what_a_dead_run_left(checkpoints):
    write(checkpoints, 10)
    assert list(layout.prepare_temporary(checkpoints, 10).iterdir()) == []


def test_publishing_an_iteration_again_replaces_it(checkpoints):
    save(checkpoints, 10, b"old")
    path = save(checkpoints, 10, b"newer")
    assert (path / "__0_0.distcp").read_bytes() == b"newer"
    assert layout.why_not_whole(path) is None


def test_publishing_an_iteration_again_leaves_nothing_of_the_former(checkpoints):
    save(checkpoints, 10)
    save(checkpoints, 10)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000010", "latest"]


def test_every_file_is_flushed_before_the_checkpoint_gets_its_name(checkpoints, monkeypatch):
    temporary = write(checkpoints, 10)
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("renamed")
        return real_rename(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("asks Linux's /proc for the names of open files")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    layout.publish(temporary, description())
    flushed = {name.partition(".partial-")[0] for name in events[: events.index("renamed")]}
    assert {".metadata", "__0_0.distcp", "megapints.json"} <= flushed


# --- cut off --------------------------------------------------------------------------------------------------


def cut_off(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, *, call: int = 1, error: BaseException | None = None
) -> None:
    """Let the process end at the call-th call of a function, or let that call raise an error."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def dies(*args, **kwargs):
        if next(calls) == call:
            raise Killed if error is None else error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_publishing_cut_off_at_a_flush_leaves_the_former_checkpoint_the_newest(call, checkpoints, monkeypatch):
    former = save(checkpoints, 10)
    temporary = write(checkpoints, 20)
    with monkeypatch.context() as patched:
        cut_off(patched, os, "fsync", call=call)
        with pytest.raises(Killed):
            layout.publish(temporary, description(20))
    assert layout.find_newest(checkpoints).path == former


def test_publishing_cut_off_at_the_rename_leaves_the_former_checkpoint_the_newest(checkpoints, monkeypatch):
    former = save(checkpoints, 10)
    temporary = write(checkpoints, 20)
    with monkeypatch.context() as patched:
        cut_off(patched, Path, "rename")
        with pytest.raises(Killed):
            layout.publish(temporary, description(20))
    assert layout.find_newest(checkpoints).path == former


def test_publishing_cut_off_after_the_rename_leaves_the_new_checkpoint_the_newest(checkpoints, monkeypatch):
    save(checkpoints, 10)
    temporary = write(checkpoints, 20)
    with monkeypatch.context() as patched:
        cut_off(patched, Path, "replace", call=2)  # that of megapints.json is the first, that of latest the second
        with pytest.raises(Killed):
            layout.publish(temporary, description(20))
    assert (checkpoints / "latest").read_text() == "iter_0000010\n"
    assert layout.find_newest(checkpoints).path == checkpoints / "iter_0000020"


def unmounted(path: Path) -> None:
    path.symlink_to("/archive/that/is/not/mounted")


IO_ERROR = OSError(errno.EIO, "Input/output error")


def test_replacing_that_fails_at_the_second_rename_leaves_the_former_under_its_name(checkpoints, monkeypatch):
    save(checkpoints, 10, b"old")
    temporary = write(checkpoints, 10, b"newer")
    with monkeypatch.context() as patched:
        cut_off(patched, Path, "rename", call=2, error=IO_ERROR)
        with pytest.raises(OSError, match="Input/output error"):
            layout.publish(temporary, description(10))
    found = layout.find_newest(checkpoints).path
    assert found is not None and (found / "__0_0.distcp").read_bytes() == b"old"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000010", "iter_0000010.tmp", "latest"]


def test_replacing_keeps_the_former_until_the_new_name_is_on_the_disk(checkpoints, monkeypatch, caplog):
    save(checkpoints, 10, b"old")
    temporary = write(checkpoints, 10, b"newer")
    with monkeypatch.context() as patched:
        cut_off(patched, os, "fsync", call=5, error=IO_ERROR)  # after two files, megapints.json and its folder
        path = layout.publish(temporary, description(10))
    assert (path / "__0_0.distcp").read_bytes() == b"newer"
    assert (checkpoints / "iter_0000010.replaced" / "__0_0.distcp").read_bytes() == b"old"
    assert "checkpoints: cannot be flushed or cleared (Input/output error)" in caplog.text


def test_former_that_cannot_be_removed_does_not_make_the_new_checkpoint_fail(checkpoints, monkeypatch, caplog):
    save(checkpoints, 10)
    temporary = write(checkpoints, 10, b"newer")
    with monkeypatch.context() as patched:
        cut_off(patched, shutil, "rmtree", error=IO_ERROR)
        path = layout.publish(temporary, description(10))
    assert layout.find_newest(checkpoints).path == path and (checkpoints / "latest").is_file()
    assert "cannot be flushed or cleared" in caplog.text


def test_publishing_in_place_of_a_dead_link_replaces_it(checkpoints):
    checkpoints.mkdir(parents=True)
    unmounted(checkpoints / "iter_0000010")
    assert layout.why_not_whole(save(checkpoints, 10)) is None
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000010", "latest"]


def test_publishing_in_place_of_a_link_leaves_what_it_points_to(checkpoints, tmp_path):
    archived = tmp_path / "archive"
    save(checkpoints, 10, b"old").rename(archived)
    (checkpoints / "iter_0000010").symlink_to(archived)
    save(checkpoints, 10, b"newer")
    assert (archived / "__0_0.distcp").read_bytes() == b"old"


def test_unpublished_checkpoint_is_named_among_the_rejected(checkpoints):
    save(checkpoints, 10)
    temporary = write(checkpoints, 20)
    (rejected,) = layout.find_newest(checkpoints).rejected
    assert rejected == (temporary, "it was never published (a save was interrupted)")


def test_small_file_cut_off_while_written_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_whole(path, "old\n")
    with monkeypatch.context() as patched:
        cut_off(patched, os, "fsync")
        with pytest.raises(Killed):
            write_whole(path, "new\n")
    assert path.read_text() == "old\n"


# --- wholeness ------------------------------------------------------------------------------------------------


def test_checkpoint_cut_short_is_not_whole(checkpoints):
    path = save(checkpoints, 10)
    (path / "__0_0.distcp").write_bytes(b"weight")
    assert layout.why_not_whole(path) == "__0_0.distcp has 6 bytes, not 7"


def test_checkpoint_with_a_file_missing_is_not_whole(checkpoints):
    path = save(checkpoints, 10)
    (path / ".metadata").unlink()
    assert layout.why_not_whole(path) == ".metadata is missing"


def test_checkpoint_under_another_name_is_not_whole(checkpoints):
    path = save(checkpoints, 10)
    copy = path.with_name("iter_0000010.copy")
    path.rename(copy)
    assert layout.why_not_whole(copy) is not None


@pytest.mark.parametrize("name", ["iter_0000010.tmp", "iter_10", "iter_0000010.removed", "latest", "iter_0000010x"])
def test_name_that_was_not_published_has_no_iteration(name):
    assert layout.iteration_of(Path(name)) is None


@pytest.mark.parametrize(("name", "iteration"), [("iter_0000010", 10), ("iter_12345678", 12_345_678)])
def test_published_name_gives_its_iteration(name, iteration):
    assert layout.iteration_of(Path(name)) == iteration


@pytest.mark.parametrize("iteration", [0, 10, 9_999_999, 10_000_000])
def test_iteration_is_read_back_from_its_directorys_name(iteration):
    assert layout.iteration_of(Path(layout.directory_name(iteration))) == iteration


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"format": 1, ', "cannot be read"),
        ("[]", "damaged"),
        ("3", "damaged"),
        ('{"iteration": 10}', "damaged (missing 'format')"),
        ('{"format": 1, "iteration": 10}', "damaged (missing 'consumed_samples')"),
        ('{"format": 99}', "format 99, this version reads 1"),
    ],
)
def test_damaged_description_is_refused(content, message, checkpoints):
    path = save(checkpoints, 10)
    (path / "megapints.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        layout.read_description(path)
    assert str(path / "megapints.json") in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("files", [None, [], "x", {"__0_0.distcp": "7"}])
def test_checkpoint_with_a_damaged_list_of_files_is_not_whole(files, checkpoints):
    path = save(checkpoints, 10)
    body = json.loads((path / "megapints.json").read_text())
    (path / "megapints.json").write_text(json.dumps(body | {"files": files}))
    assert layout.why_not_whole(path) is not None


def test_checkpoint_without_a_list_of_files_is_not_whole(checkpoints):
    path = save(checkpoints, 10)
    body = json.loads((path / "megapints.json").read_text())
    del body["files"]
    (path / "megapints.json").write_text(json.dumps(body))
    assert layout.why_not_whole(path) is not None


# --- several starts -------------------------------------------------------------------------------------------


def test_publishing_clears_what_a_dead_run_left_before_it(tmp_path: Path) -> None:
    old, newer = (layout.prepare_temporary(tmp_path, iteration) for iteration in (5, 20))
    layout.publish(layout.prepare_temporary(tmp_path, 10), description(10))
    assert not old.exists() and newer.exists()


def test_temporary_of_another_start_is_cleared_before_this_one_writes(tmp_path):
    dead = layout.prepare_temporary(tmp_path, 10, "a1")
    mine = layout.prepare_temporary(tmp_path, 10, "b2")
    assert mine != dead and mine.is_dir() and not dead.exists()


def test_rank_of_a_dead_start_writes_beside_its_successor_and_its_rest_is_removed(tmp_path):
    mine = layout.prepare_temporary(tmp_path, 10, "b2")
    late = layout.temporary_path(tmp_path, 10, "a1")
    late.mkdir()
    (late / "__1_0.distcp").write_bytes(b"late")
    path = layout.publish(mine, description(10))
    assert path == tmp_path / "iter_0000010" and layout.why_not_whole(path) is None
    assert not late.exists() and not (path / "__1_0.distcp").exists()
