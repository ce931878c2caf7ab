"""What a run starts from: its own checkpoint, other weights, or fresh ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.checkpoint.save_load import Progress
from megatron_ext.errors import CheckpointError
from megatron_ext.training.start import starting_state
from megatron_ext.training.state import TrainState
from tests.unit.hf_models import save_random_model

pytestmark = pytest.mark.usefixtures("one_process")


class Recorder:
    """Stands where `Checkpoints` is, and notes what it is asked to load."""

    def __init__(self, own: Progress | None = None) -> None:
        self.own = own
        self.resumed = 0
        self.weights: list[Path] = []

    def resume(self) -> Progress | None:
        self.resumed += 1
        return self.own

    def load_weights(self, path: Path) -> None:
        self.weights.append(path)


def save(run: Path, iteration: int) -> Path:
    """Publish an empty checkpoint."""
    temporary = layout.prepare_temporary(run / "checkpoints", iteration)
    (temporary / "file").write_text("content")
    description = CheckpointDescription(
        iteration=iteration,
        consumed_samples=8 * iteration,
        consumed_tokens=128 * iteration,
        model={},
        config={},
        optimizer_format=None,
        tokenizer_sha256=None,
        topology={},
    )
    return layout.publish(temporary, description)


def test_new_run_starts_at_iteration_zero(tiny_config):
    assert starting_state(tiny_config(), Recorder()) == TrainState(0, 0, 0)


def test_new_run_without_other_weights_loads_none(tiny_config):
    recorder = Recorder()
    starting_state(tiny_config(), recorder)
    assert recorder.weights == []


def test_run_with_a_checkpoint_of_its_own_continues_it(tiny_config):
    assert starting_state(tiny_config(), Recorder(Progress(10, 80, 1280))) == TrainState(10, 80, 1280)


def test_run_with_a_checkpoint_of_its_own_does_not_take_other_weights_again(tiny_config, tmp_path):
    other = save(tmp_path / "other", 5)
    recorder = Recorder(Progress(10, 80, 1280))
    starting_state(tiny_config("--checkpoint.init_from", str(other)), recorder)
    assert recorder.weights == []


def test_run_that_must_not_resume_does_not_look_for_a_checkpoint_to_load(tiny_config):
    recorder = Recorder(Progress(10, 80, 1280))
    starting_state(tiny_config("--checkpoint.resume", "false"), recorder)
    assert recorder.resumed == 0


def test_run_that_must_not_resume_refuses_to_overwrite(tiny_config, tmp_path):
    path = save(tmp_path / "run", 10)
    with pytest.raises(CheckpointError) as caught:
        starting_state(tiny_config("--checkpoint.resume", "false"), Recorder())
    assert str(caught.value).startswith(f"{path}: the run directory already holds a checkpoint")


def test_run_that_must_not_resume_refuses_to_overwrite_one_that_cannot_be_read(tiny_config, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "iter_0000010"
    path.parent.mkdir(parents=True)
    path.symlink_to("/archive/that/is/not/mounted")
    with pytest.raises(CheckpointError) as caught:
        starting_state(tiny_config("--checkpoint.resume", "false"), Recorder())
    assert str(caught.value).startswith(f"{path}: the run directory already holds a checkpoint")


def test_run_that_must_not_resume_refuses_to_overwrite_one_that_was_being_replaced(tiny_config, tmp_path):
    path = save(tmp_path / "run", 10)
    path.rename(path.with_suffix(".replaced"))
    with pytest.raises(CheckpointError, match="the run directory already holds a checkpoint"):
        starting_state(tiny_config("--checkpoint.resume", "false"), Recorder())


def test_run_that_must_not_resume_clears_the_save_that_a_dead_start_left(tiny_config, tmp_path):
    left = layout.prepare_temporary(tmp_path / "run" / "checkpoints", 10, "a1b2c3")
    starting_state(tiny_config("--checkpoint.resume", "false"), Recorder())
    assert not left.exists()


def test_run_that_must_not_resume_may_have_the_directory_of_one_that_saved_nothing(tiny_config, tmp_path):
    layout.prepare_temporary(tmp_path / "run" / "checkpoints", 10)
    assert starting_state(tiny_config("--checkpoint.resume", "false"), Recorder()) == TrainState()


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/iter_0000020"])
def test_run_from_another_takes_the_weights_of_its_newest_checkpoint(given, tiny_config, tmp_path):
    for iteration in (10, 20):
        newest = save(tmp_path / "other", iteration)
    recorder = Recorder()
    starting_state(tiny_config("--checkpoint.init_from", str(tmp_path / "other" / given)), recorder)
    assert recorder.weights == [newest]


def test_run_from_another_starts_at_iteration_zero(tiny_config, tmp_path):
    other = save(tmp_path / "other", 20)
    assert starting_state(tiny_config("--checkpoint.init_from", str(other)), Recorder()) == TrainState(0, 0, 0)


def test_run_from_a_folder_without_checkpoints_is_refused(tiny_config, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="other: holds no whole checkpoint"):
        starting_state(tiny_config("--checkpoint.init_from", str(tmp_path / "other")), Recorder())


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    folder = tmp_path / "hf"
    save_random_model(folder)
    return folder


def test_run_from_a_hugging_face_folder_takes_a_checkpoint_made_of_it(tiny_config, tmp_path, hugging_face):
    recorder = Recorder()
    starting_state(tiny_config("--checkpoint.init_from", str(hugging_face)), recorder)
    (path,) = recorder.weights
    assert path.is_relative_to(tmp_path / "run") and layout.why_not_whole(path) is None


def test_run_from_a_hugging_face_folder_pads_the_vocabulary_as_configured(tiny_config, hugging_face):
    recorder = Recorder()
    starting_state(tiny_config("--checkpoint.init_from", str(hugging_face)), recorder)
    model = layout.read_description(recorder.weights[0]).model
    assert model["make_vocab_size_divisible_by"] == 16
