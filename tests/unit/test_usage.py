"""How much of each source a run reads: foretold from file sizes, told after opening, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.tree import Config, DataConfig
from megatron_ext.data import usage
from megatron_ext.data.blend import open_samples
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.usage import Use

# 5 iterations of 8 samples of 16 tokens.
RUN_SAMPLES = 40


@pytest.fixture
def config(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Sources `small` of 161 tokens (10 samples) and `large` of 641 (40), all for training."""

    def load(*words: str) -> Config:
        for name, tokens in (("small", 161), ("large", 641)):
            with IndexedWriter(tmp_path / name, dtype=np.dtype("<u2")) as writer:
                writer.add_document(np.resize(np.arange(3, 97), tokens))
                writer.publish()
        whole = ("--data.split", "100,0", "--train.eval_interval", "None", "--data.sample_index", "lazy")
        prefixes = ("--data.train_data", str(tmp_path / "small"), str(tmp_path / "large"))
        return tiny_config(*whole, *prefixes, *words)

    return load


WEIGHTS = {
    "none": ((), [0.2, 0.8]),
    "proportion": (("--data.train_weights", "3", "1"), [0.75, 0.25]),
    "tokens": (("--data.train_weights", "128", "512", "--data.train_weights_unit", "tokens"), [0.2, 0.8]),
    "epochs": (("--data.train_weights", "2", "0.5", "--data.train_weights_unit", "epochs"), [0.5, 0.5]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_samples_of_a_run_are_drawn_in_the_shares_of_the_unit(case, config):
    words, shares = WEIGHTS[case]
    settings = config(*words)
    samples = open_samples(settings, Tokenizer.load(settings.data.tokenizer), builds=True).train
    counts = np.bincount([samples.blend[k].source for k in range(RUN_SAMPLES)], minlength=2)
    assert counts.tolist() == [RUN_SAMPLES * share for share in shares]


@pytest.mark.parametrize("case", WEIGHTS)
def test_estimate_foretells_what_opening_the_files_tells(case, config):
    words, shares = WEIGHTS[case]
    settings = config(*words)
    samples = open_samples(settings, Tokenizer.load(settings.data.tokenizer), builds=True).train
    told = usage.uses_of(settings, samples.prefixes, samples.blend)
    for foretold, use, share in zip(usage.estimate(settings), told, shares, strict=True):
        assert (foretold.prefix, foretold.samples) == (use.prefix, use.samples)
        assert foretold.drawn == pytest.approx(RUN_SAMPLES * share)
        assert use.drawn == pytest.approx(RUN_SAMPLES * share, abs=1e-4)


def test_epochs_are_samples_drawn_over_samples_there():
    assert Use("a", 10, 25.0).epochs == 2.5


def test_estimate_takes_the_training_share_of_a_file(config):
    whole = config()
    small, large = usage.estimate(replace(whole, data=replace(whole.data, split="50,50")))
    assert (small.samples, large.samples) == (4, 19)  # of 80 and 320 tokens


def test_estimate_of_missing_files_knows_what_weights_say(config, tmp_path):
    settings = config("--data.train_weights", "3", "1")
    (tmp_path / "small.bin").unlink()
    small, large = usage.estimate(settings)
    assert small == Use(str(tmp_path / "small"), None, 30.0)
    assert large == Use(str(tmp_path / "large"), 40, 10.0)


@pytest.mark.parametrize("case", ["none", "epochs"])
def test_estimate_of_missing_files_knows_no_shares_that_depend_on_their_size(case, config, tmp_path):
    settings = config(*WEIGHTS[case][0])
    (tmp_path / "small.bin").unlink()
    assert [use.drawn for use in usage.estimate(settings)] == [None, None]


def test_rows_tell_tokens_samples_share_and_epochs():
    rows = usage.rows([Use("a", 10, 25.0), Use("b", 1000, 75.0)], seq_length=16)
    assert rows == [
        ("source", "tokens", "samples", "read in the run", "share", "epochs"),
        ("a", "160", "10", "400", "25.00%", "2.50"),
        ("b", "16,000", "1,000", "1,200", "75.00%", "0.07"),
    ]


def test_rows_of_unknown_sizes_have_question_marks():
    assert usage.rows([Use("a", None, None)], seq_length=16)[1] == ("a", "?", "?", "?", "?", "?")


@pytest.mark.parametrize(("epochs", "warned"), [(3.9, False), (4.0, False), (4.1, True)])
def test_more_than_four_passes_are_warned_of(epochs, warned):
    found = usage.warnings([Use("a", 1000, 1000 * epochs), Use("b", None, None)])
    assert bool(found) == warned
    assert all(line.startswith(f"a is read {epochs} times: ") for line in found)


def test_passes_above_the_limit_are_a_problem(config):
    settings = config("--data.max_epochs", "2")
    problems = usage.problems(settings, [Use("a", 10, 21.0), Use("b", 10, 19.0), Use("c", None, None)])
    assert problems == [
        "data.max_epochs (2) would be passed: a is read 2.10 times in 5 iterations; train for fewer, or add data."
    ]


def test_planned_passes_that_the_run_does_not_make_are_a_problem(config):
    settings = config("--data.train_weights", "4", "2", "--data.train_weights_unit", "epochs")
    (problem,) = usage.problems(settings, usage.estimate(settings))
    assert problem == (
        "data.train_weights (in epochs) add up to 1,920 tokens, and the run reads 640; "
        "set train.train_iters to 15, or change the weights."
    )


def test_planned_passes_that_the_run_makes_are_no_problem(config):
    settings = config(*WEIGHTS["epochs"][0])
    assert usage.problems(settings, usage.estimate(settings)) == []


def test_amounts_without_weights_are_none():
    assert usage.amounts(DataConfig(tokenizer=""), [1, 2]) is None
