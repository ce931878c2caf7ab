"""The record of the samples that real runs were trained on: whole, in order, whatever the ranks and the restarts."""

from __future__ import annotations

import pytest

from megatron_ext.training.samples_log import read_history
from tests.dist.test_resume import PP2, TP2

RECORDED = ("--log.samples", "true", "--train.train_iters", "6", "--train.eval_interval", "100")


@pytest.fixture(scope="module")
def straight(module_trainer):
    """What a run of one process is trained on: six iterations of eight samples."""
    return read_history(module_trainer.train("straight", *RECORDED).run_dir)


def test_record_of_a_run_holds_each_sample_once_and_in_order(straight):
    assert [[sample.k for sample in samples] for _, samples in straight] == [
        list(range(8 * number, 8 * number + 8)) for number in range(6)
    ]


def test_record_says_where_the_samples_lie(straight, tiny_data):
    # One pass: no sample of a source comes twice, and both sources come.
    places = [(sample.source, sample.sample) for _, samples in straight for sample in samples]
    assert len(set(places)) == len(places) == 48
    assert {source for source, _ in places} == {str(tiny_data / "a"), str(tiny_data / "b")}
    assert {sample.epoch for _, samples in straight for sample in samples} == {0}


@pytest.mark.slow
def test_record_of_a_run_that_changes_its_ranks_is_that_of_an_undisturbed_one(straight, trainer):
    trainer.train("changing", *RECORDED, "--train.exit_iters", "2", ranks=2)
    trainer.train("changing", *RECORDED, "--train.exit_iters", "4")
    finished = trainer.train("changing", *RECORDED, ranks=2)
    assert "continuing after iteration 4 of 6" in finished.output
    assert read_history(finished.run_dir) == straight


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2, PP2])
def test_ranks_that_share_samples_record_them_once(layout, straight, trainer):
    finished = trainer.train("shared", *RECORDED, *layout, ranks=2)
    assert [path.name for path in (finished.run_dir / "samples").iterdir()] == ["data_rank_0000.jsonl"]
    assert read_history(finished.run_dir) == straight
