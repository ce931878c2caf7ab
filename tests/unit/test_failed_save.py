"""Saves that fail, and saves in the background: on one process, with the real model and the real disk."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_ext.checkpoint import layout, sharded, writer
from megatron_ext.checkpoint.save_load import Progress
from megatron_ext.errors import CheckpointError
from tests.unit.test_digests import file_size_limit
from tests.unit.test_save_load import build  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_process")
BEHIND = ("--checkpoint.async_save", "true", "--checkpoint.save_interval", "10")
FIRST, SECOND = Progress(1, 8, 128), Progress(2, 16, 256)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def unlist(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the file system fail when a folder is listed."""
    listed = Path.iterdir

    def fails(self: Path) -> Iterator[Path]:
        if self == folder:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", fails)


# --- failed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), BEHIND], ids=["sync", "async"])
def test_full_disk_is_one_error_with_rank_file_and_reason(options, build, checkpoints):  # noqa: F811
    saved = build(*options).trained().checkpoints
    saved.save(FIRST)
    saved.wait()
    with file_size_limit(20_000), pytest.raises(CheckpointError) as caught:
        saved.save(SECOND)
        saved.wait()
    message = str(caught.value)
    assert "iteration 2 could not be saved" in message
    assert re.search(r"rank 0: \S+/iter_0000002\.\w+\.tmp/__0_\d\.distcp: File too large", message)
    assert f"goes on from {checkpoints / 'iter_0000001'}" in message


@pytest.mark.parametrize("options", [(), BEHIND], ids=["sync", "async"])
def test_full_disk_leaves_the_older_checkpoint_and_gives_the_space_back(options, build, checkpoints):  # noqa: F811
    saved = build(*options, "--checkpoint.keep_last", "1").trained().checkpoints
    saved.save(FIRST)
    saved.wait()
    with file_size_limit(20_000), pytest.raises(CheckpointError):
        saved.save(SECOND)
        saved.wait()
    saved.close()
    assert names(checkpoints) == ["iter_0000001", "latest"]
    assert layout.why_not_whole(checkpoints / "iter_0000001") is None


def test_failed_background_save_is_found_at_a_poll(build):  # noqa: F811
    saved = build(*BEHIND).trained().checkpoints
    with file_size_limit(20_000):
        saved.save(FIRST)
        with pytest.raises(CheckpointError, match="could not be saved"):
            while saved.poll() == []:
                pass


def test_disk_that_is_full_at_publishing_is_the_same_error(build, checkpoints, monkeypatch):  # noqa: F811
    saved = build().trained().checkpoints
    saved.save(FIRST)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "megapints.json")

    monkeypatch.setattr(layout, "write_whole", full)
    with pytest.raises(CheckpointError, match="megapints.json: No space left on device"):
        saved.save(SECOND)
    assert names(checkpoints) == ["iter_0000001", "latest"]


def test_save_after_a_failed_one_succeeds(build, checkpoints):  # noqa: F811
    saved = build().trained().checkpoints
    with file_size_limit(20_000), pytest.raises(CheckpointError, match="There is no older one"):
        saved.save(FIRST)
    saved.save(FIRST)
    assert names(checkpoints) == ["iter_0000001", "latest"]


def test_file_that_vanished_before_publishing_is_an_error(build, checkpoints, monkeypatch):  # noqa: F811
    saved = build().trained().checkpoints
    finish = writer.ShardPlan.finish

    def loses_one(self, *args):
        (next(checkpoints.glob("iter_0000001.*.tmp")) / "__0_1.distcp").unlink()
        return finish(self, *args)

    monkeypatch.setattr(writer.ShardPlan, "finish", loses_one)
    with pytest.raises(CheckpointError, match="__0_1.distcp: was written, but is not there.*share run_dir"):
        saved.save(FIRST)


def test_other_exception_while_publishing_is_the_same_error(build, checkpoints, monkeypatch):  # noqa: F811
    saved = build().trained().checkpoints
    saved.save(FIRST)

    def breaks(*_: object) -> None:
        raise ValueError("unknown storage")

    monkeypatch.setattr(writer.ShardPlan, "finish", breaks)
    with pytest.raises(CheckpointError, match="iteration 2 could not be saved.*: ValueError: unknown storage. Older"):
        saved.save(SECOND)
    assert names(checkpoints) == ["iter_0000001", "latest"]


def test_reason_of_a_failed_save_is_told_where_the_older_ones_cannot_be_listed(
    build,  # noqa: F811
    checkpoints,
    monkeypatch,
):
    saved = build().trained().checkpoints
    saved.save(FIRST)
    unlist(monkeypatch, checkpoints)
    with file_size_limit(20_000), pytest.raises(CheckpointError) as caught:
        saved.save(SECOND)
    assert "File too large" in str(caught.value)
    assert "Whether there is an older one could not be seen" in str(caught.value)
    assert "cannot be read (Input/output error)" in str(caught.value)


def test_published_checkpoint_whose_size_cannot_be_read_is_published(build, checkpoints, monkeypatch, caplog):  # noqa: F811
    saved = build().trained().checkpoints
    unlist(monkeypatch, checkpoints / "iter_0000001")
    saved.save(FIRST)
    (published,) = saved.poll()
    assert published.path == checkpoints / "iter_0000001"
    assert "iter_0000001: its size cannot be read (Input/output error)" in caplog.text


def test_expired_checkpoints_that_cannot_be_listed_are_told_and_no_more(build, checkpoints, monkeypatch, caplog):  # noqa: F811
    saved = build("--checkpoint.keep_last", "1").trained().checkpoints
    unlist(monkeypatch, checkpoints)
    saved.save(FIRST)
    saved.save(SECOND)
    saved.close()
    warning = f"expired checkpoints cannot be removed, and take up disk space: {checkpoints}: Input/output error."
    assert [record.getMessage() for record in caplog.records].count(warning) == 2  # that of the last save too


# --- in the background ----------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch):
    """Hold every file of a save open until the gate is."""
    opened = threading.Event()
    close = writer.DigestingFile.close

    def waits(self):
        assert opened.wait(60)
        return close(self)

    monkeypatch.setattr(writer.DigestingFile, "close", waits)
    yield opened
    opened.set()


def test_training_on_while_a_save_is_written_does_not_change_it(build, gate, checkpoints):  # noqa: F811
    whole = build(*BEHIND).trained()
    expected = whole.weights()
    whole.checkpoints.save(FIRST)
    whole.train()
    gate.set()
    whole.checkpoints.close()
    assert not torch.equal(whole.weights()[0], expected[0])
    other = build("--train.seed", "99")
    other.checkpoints.resume()
    assert all(torch.equal(a, b) for a, b in zip(other.weights(), expected, strict=True))


def test_second_background_save_begins_when_the_first_is_published(build, gate, checkpoints):  # noqa: F811
    saved = build(*BEHIND).trained().checkpoints
    saved.save(FIRST)
    threading.Timer(0.5, gate.set).start()
    saved.save(SECOND)
    assert "iter_0000001" in names(checkpoints)
    saved.close()
    assert "iter_0000002" in names(checkpoints)


def test_save_under_way_is_not_published_yet(build, gate, checkpoints):  # noqa: F811
    saved = build(*BEHIND).trained().checkpoints
    saved.save(FIRST)
    (name,) = names(checkpoints)
    assert saved.poll() == [] and name.endswith(".tmp")


def test_published_save_says_what_it_cost(build, gate, checkpoints):  # noqa: F811
    saved = build(*BEHIND).trained().checkpoints
    saved.save(FIRST)
    threading.Timer(0.5, gate.set).start()
    saved.wait()
    (published,) = saved.poll()
    assert (published.progress, published.path) == (FIRST, checkpoints / "iter_0000001")
    assert published.bytes == sum(file.stat().st_size for file in published.path.iterdir())
    assert published.seconds >= 0.5 and saved.last_save_seconds == published.seconds


def test_saving_starts_no_process(build, gate):  # noqa: F811
    # One that lives on after a run that was killed would hold its memory and its files.
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    saved = build(*BEHIND).trained().checkpoints
    saved.save(FIRST)
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before
    assert multiprocessing.active_children() == []
    gate.set()
    saved.close()


def test_copy_of_the_state_reuses_its_memory(build):  # noqa: F811
    saved = build(*BEHIND).trained().checkpoints
    saved.save(FIRST)
    memory = saved._staging._memory
    saved.save(SECOND)
    assert saved._staging._memory is memory
    saved.close()


def test_gathered_state_is_given_back_once_it_is_copied(build, gate, monkeypatch):  # noqa: F811
    saved = build(*BEHIND, "--checkpoint.optimizer_format", "fully_reshardable").trained().checkpoints
    of_the_run = {storage._cdata for storage in _storages(gc.get_objects())}
    plan, planned = sharded.SavePlanner.plan, []

    def remembers(self, *args, **options):
        found = plan(self, *args, **options)
        tensors = [entry.data for entries in found.shards.files.values() for entry in entries]
        made = [storage for storage in _storages(tensors) if storage._cdata not in of_the_run]
        planned.append([StorageWeakRef(storage) for storage in made])
        return found

    monkeypatch.setattr(sharded.SavePlanner, "plan", remembers)
    saved.save(FIRST)
    assert planned[0] and all(storage.expired() for storage in planned[0])
    gate.set()
    saved.save(SECOND)  # by the plan that was kept
    assert planned[1] and all(storage.expired() for storage in planned[1])
    saved.close()


def _storages(objects: Sequence[object]) -> list[torch.UntypedStorage]:
    return [found.untyped_storage() for found in objects if issubclass(type(found), torch.Tensor)]


# --- the checksum of the weights ------------------------------------------------------------------------------


def test_weights_that_arrive_with_a_changed_bit_are_refused(build, monkeypatch):  # noqa: F811
    build().trained().checkpoints.save(FIRST)
    load = sharded.load

    def flips_a_bit(state, path):
        loaded = load(state, path)
        weight = loaded["model"]["decoder.final_layernorm.weight"]
        weight.view(torch.int32)[3] ^= 1
        return loaded

    monkeypatch.setattr(sharded, "load", flips_a_bit)
    with pytest.raises(CheckpointError, match="not those that were saved .checksum"):
        build("--train.seed", "99").checkpoints.resume()


def test_weights_of_another_type_are_not_compared(build, tmp_path):  # noqa: F811
    build().trained().checkpoints.save(FIRST)
    other = build("--precision.dtype", "bf16")
    other.checkpoints.load_weights(tmp_path / "run" / "checkpoints" / "iter_0000001")
    assert other.chunk.decoder.final_layernorm.weight.dtype == torch.bfloat16
