"""Starting from other weights: a run, a Hugging Face folder, and what does not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT, child_environment

TP2 = ("--parallel.tensor_model_parallel_size", "2")


@pytest.fixture(scope="module")
def pretrained(module_trainer):
    return module_trainer.train("pretrained", "--train.train_iters", "60", "--log.interval", "20")


def test_init_from_a_run_starts_at_its_loss_with_a_fresh_schedule(pretrained, module_trainer):
    # A rate too small to move: every loss is that of the weights.
    still = module_trainer.train("still", "--checkpoint.init_from", str(pretrained.run_dir), "--optimizer.lr", "1e-12",
                                 "--optimizer.min_lr", "0")  # fmt: skip
    assert still.rows()[0]["iteration"] == 1
    assert still.rows("valid")[-1]["loss"] == pytest.approx(pretrained.rows("valid")[-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_init_from_a_run_at_another_tensor_size_takes_its_weights(pretrained, module_trainer):
    split = module_trainer.train("split", "--checkpoint.init_from", str(pretrained.run_dir), *TP2, "--optimizer.lr",
                                 "1e-12", "--optimizer.min_lr", "0", ranks=2)  # fmt: skip
    assert split.rows("valid")[-1]["loss"] == pytest.approx(pretrained.rows("valid")[-1]["loss"], rel=1e-5)


def test_init_from_a_hugging_face_folder_starts_at_its_loss(pretrained, module_trainer):
    folder = module_trainer.work / "folder"
    command = ["tools/convert_checkpoint.py", "to-hf", "--load", str(pretrained.run_dir), "--save", str(folder)]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=child_environment(), check=True, capture_output=True)
    from_folder = module_trainer.train("from_folder", "--checkpoint.init_from", str(folder), *TP2, "--optimizer.lr",
                                       "1e-12", "--optimizer.min_lr", "0", ranks=2)  # fmt: skip
    assert from_folder.rows("valid")[-1]["loss"] == pytest.approx(pretrained.rows("valid")[-1]["loss"], rel=1e-5)


def test_init_from_weights_of_another_shape_is_refused(pretrained, module_trainer):
    refused = module_trainer.train("refused", "--checkpoint.init_from", str(pretrained.run_dir),
                                   "--model.ffn_hidden_size", "96", fails=True)  # fmt: skip
    assert refused.returncode == 2
    assert "ffn_hidden_size 64 there, 96 here" in refused.output
    assert "Traceback" not in refused.output


def test_init_from_weights_with_another_rotary_base_is_taken_and_said(pretrained, module_trainer):
    continued = module_trainer.train("continued", "--checkpoint.init_from", str(pretrained.run_dir),
                                     "--model.rotary_base", "500.0")  # fmt: skip
    assert "were trained with rotary_base 10000.0 there, 500.0 here" in continued.output


def test_resume_false_over_an_existing_checkpoint_is_refused(pretrained, module_trainer):
    refused = module_trainer.train("pretrained", "--checkpoint.resume", "False", fails=True)
    assert refused.returncode == 2
    assert "checkpoint.resume is false" in refused.output
