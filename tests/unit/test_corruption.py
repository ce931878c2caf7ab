"""Each file of a real checkpoint damaged in every way: it is noticed, and the older whole one taken, or one error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout, removal, verify
from megatron_ext.errors import CheckpointError

FILES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "metadata.json", "megapints.json")
if sys.version_info < (3, 12):
    FILES = (*FILES, "common.pt")  # megatron-core 0.19 puts it into a shard


def cut(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])


def flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 0x10
    file.write_bytes(content)


def zero(file: Path, where: float) -> None:
    """As a lost write leaves it: a page of zeros."""
    content = bytearray(file.read_bytes())
    begin = int(where * len(content))
    end = min(begin + 512, len(content))
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut_in_half": lambda file: cut(file, 0.5),
    "cut_by_a_byte": lambda file: file.write_bytes(file.read_bytes()[:-2]),  # the last is megapints.json's line end
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "flipped_at_the_begin": lambda file: flip(file, 0.0),
    "flipped_at_a_third": lambda file: flip(file, 0.33),
    "flipped_in_the_middle": lambda file: flip(file, 0.5),
    "flipped_near_the_end": lambda file: flip(file, 0.93),
    "zeroed_in_the_middle": lambda file: zero(file, 0.5),
    "removed": lambda file: file.unlink(),
    "made_a_folder": lambda file: (file.unlink(), file.mkdir())[1],
    "made_a_dead_link": lambda file: (file.unlink(), file.symlink_to("nowhere"))[1],
}


@pytest.fixture(scope="module")
def trained(module_trainer) -> Path:
    """Checkpoints of iterations 2 and 4, as a run left them."""
    module_trainer.train("source", "--train.train_iters", "4", "--checkpoint.save_interval", "2")
    return module_trainer.work / "source" / "checkpoints"


@pytest.fixture
def checkpoints(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def found(checkpoints: Path, place) -> str | None:
    path = verify.find_newest(checkpoints, {}, place)
    return None if path is None else path.name


def test_undamaged_checkpoint_is_taken(checkpoints, one_process):
    assert found(checkpoints, one_process) == "iter_0000004"


def test_every_file_of_the_checkpoint_is_among_those_damaged(trained):
    assert sorted(p.name for p in (trained / "iter_0000004").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_makes_the_older_checkpoint_be_taken(name, damage, checkpoints, one_process, caplog):
    DAMAGES[damage](checkpoints / "iter_0000004" / name)
    assert found(checkpoints, one_process) == "iter_0000002"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "iter_0000004" in warning and name in warning


@pytest.mark.parametrize("damage", ["emptied", "flipped_in_the_middle", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_of_the_only_checkpoint_is_one_error(name, damage, checkpoints, one_process):
    shutil.rmtree(checkpoints / "iter_0000002")
    DAMAGES[damage](checkpoints / "iter_0000004" / name)
    with pytest.raises(CheckpointError, match=r"none that is whole .*iter_0000004: .*move these away") as caught:
        found(checkpoints, one_process)
    assert name in str(caught.value)


def test_newest_checkpoint_in_an_archive_that_is_not_mounted_makes_the_older_be_taken(checkpoints, one_process, caplog):
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "iter_0000004").symlink_to("/archive/iter_0000004")
    assert found(checkpoints, one_process) == "iter_0000002"
    assert "iter_0000004: is a link to /archive/iter_0000004, which is not there" in caplog.text


def test_all_checkpoints_in_an_archive_that_is_not_mounted_is_one_error(checkpoints, one_process):
    for iteration in (2, 4):
        shutil.rmtree(checkpoints / f"iter_000000{iteration}")
        (checkpoints / f"iter_000000{iteration}").symlink_to("/archive")
    with pytest.raises(CheckpointError, match=r"none that is whole .*iter_0000004: is a link to /archive, which is"):
        found(checkpoints, one_process)


def test_folder_of_checkpoints_that_is_not_mounted_is_one_error(tmp_path, one_process):
    (tmp_path / "checkpoints").symlink_to("/archive")
    with pytest.raises(CheckpointError, match="checkpoints: is a link to /archive, which is not there"):
        found(tmp_path / "checkpoints", one_process)


def test_both_checkpoints_damaged_is_one_error_that_names_both(checkpoints, one_process):
    for iteration in (2, 4):
        flip(checkpoints / f"iter_000000{iteration}" / "__0_0.distcp", 0.5)
    with pytest.raises(CheckpointError, match="iter_0000004: __0_0.distcp is damaged.*; iter_0000002: __0_0.distcp"):
        found(checkpoints, one_process)


def test_any_flipped_bit_of_the_description_is_noticed(checkpoints):
    path = checkpoints / "iter_0000004"
    content = (path / "megapints.json").read_bytes()
    meaning = json.loads(content)
    harmless = 0
    for index in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[index] ^= 1 << index % 7
        (path / "megapints.json").write_bytes(flipped)
        if layout.why_not_whole(path) is None:
            harmless += 1
            assert json.loads(flipped) == meaning  # white space became other white space
    assert harmless < len(content) / 100


@pytest.mark.parametrize("content", [None, b"", b"iter_0000002\n", b"iter_9999999\n", b"../..\n", b"\xff\xfe\x00"])
def test_file_latest_does_not_matter(content, checkpoints, one_process):
    (checkpoints / "latest").unlink()
    if content is not None:
        (checkpoints / "latest").write_bytes(content)
    assert found(checkpoints, one_process) == "iter_0000004"


def test_folder_in_place_of_latest_does_not_matter(checkpoints, one_process):
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    assert found(checkpoints, one_process) == "iter_0000004"


def test_folder_in_place_of_latest_does_not_keep_a_checkpoint_from_being_published(checkpoints, caplog):
    description = layout.read_description(checkpoints / "iter_0000004")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    path = layout.publish(layout.prepare_temporary(checkpoints, 6), description)
    assert layout.why_not_whole(path) is None and "latest: cannot be written" in caplog.text


def test_empty_checkpoint_folder_makes_the_older_one_be_taken(checkpoints, one_process):
    (checkpoints / "iter_0000006").mkdir()
    assert found(checkpoints, one_process) == "iter_0000004"


def test_empty_checkpoint_folder_alone_is_one_error(tmp_path, one_process):
    (tmp_path / "iter_0000006").mkdir()
    with pytest.raises(CheckpointError, match="iter_0000006: .*no megapints.json"):
        found(tmp_path, one_process)


def test_folder_without_checkpoints_is_a_fresh_start(tmp_path, one_process):
    assert found(tmp_path, one_process) is None


@pytest.mark.parametrize("left", ["iter_0000006.tmp", "iter_0000006.removed", "iter_0000006.replaced"])
def test_what_a_killed_run_left_is_not_taken(left, checkpoints, one_process):
    shutil.copytree(checkpoints / "iter_0000004", checkpoints / left)
    assert found(checkpoints, one_process) == "iter_0000004"


def test_first_save_cut_off_is_a_fresh_start(checkpoints, tmp_path, one_process):
    (tmp_path / "other").mkdir()
    shutil.copytree(checkpoints / "iter_0000004", tmp_path / "other" / "iter_0000004.tmp")
    assert found(tmp_path / "other", one_process) is None


def test_checkpoint_without_digests_is_taken_and_said_so_once(checkpoints, one_process, caplog):
    file = checkpoints / "iter_0000004" / "megapints.json"
    body = json.loads(file.read_text())
    del body["digests"], body["own_digest"]
    file.write_text(json.dumps(body))
    assert found(checkpoints, one_process) == "iter_0000004"
    assert caplog.text.count("saved without digests") == 1


def test_damaged_newest_does_not_make_the_whole_ones_expire(checkpoints):
    removed = removal.remove_expired(checkpoints, keep_last=1, keep_every=None, bad={checkpoints / "iter_0000004"})
    assert removed == [] and (checkpoints / "iter_0000002").is_dir()
