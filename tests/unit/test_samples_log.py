"""The record of the samples: what is written as they are read, and what is put together from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.data.blend import Sample
from megatron_ext.data.loader import Loader
from megatron_ext.data.sampler import Draw
from megatron_ext.errors import DataError, TrainingError
from megatron_ext.training.samples_log import Given, SamplesLog, read_history
from megatron_ext.training.state import TrainState


class TwoSources:
    """Sample k is the (k // 2)-th of the source k % 2."""

    prefixes = ("data/a", "data/b")

    @property
    def blend(self):
        return [Draw(k % 2, 0, k // 2) for k in range(100)]

    def __getitem__(self, k: int) -> Sample:
        return Sample(torch.arange(4), torch.arange(4), torch.ones(4))


@pytest.fixture
def loader(one_process):
    return Loader(TwoSources(), one_process, micro_batch_size=2, seq_length=4)


@pytest.fixture
def log(loader, one_process, tmp_path):
    log = SamplesLog(tmp_path, loader, one_process, enabled=True)
    yield log
    log.close()


def write(folder: Path, rank: int, *lines: str) -> None:
    """Write a rank's file from lines like `start A 0 2` (ID, iteration, ranks) and `A 1 4 6` (ID, iteration, k …)."""
    rows = []
    for line in lines:
        first, *rest = line.split()
        if first == "start":
            row = {"start": rest[0], "iteration": int(rest[1]), "data_size": int(rest[2]), "sources": ["data/a"]}
        else:
            row = {"start": first, "iteration": int(rest[0]), "samples": [[int(k), 0, 0, int(k)] for k in rest[1:]]}
        rows.append(json.dumps(row))
    path = folder / "samples" / f"data_rank_{rank:04d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def read(folder: Path) -> list[tuple[int, list[int]]]:
    return [(number, [sample.k for sample in samples]) for number, samples in read_history(folder)]


def test_loader_keeps_what_it_has_read_in_an_iteration(loader):
    list(loader.iteration(4, global_batch_size=4))
    list(loader.iteration(8, global_batch_size=6))
    assert loader.delivered == [8, 9, 10, 11, 12, 13]


def test_loader_that_stopped_in_the_middle_has_delivered_what_was_taken(loader):
    next(loader.iteration(4, global_batch_size=4))
    assert loader.delivered == [4, 5]


def test_loader_does_not_count_blanks_as_delivered(loader):
    list(loader.iteration(4, global_batch_size=4, limit=7))
    assert loader.delivered == [4, 5, 6]


def test_recorded_iterations_are_read_back_with_where_their_samples_lie(log, loader, tmp_path):
    log.begin(TrainState())
    for iteration in (1, 2):
        list(loader.iteration(2 * iteration - 2, global_batch_size=2))
        log.record(TrainState(iteration=iteration))
    (_, first), (_, second) = read_history(tmp_path)
    assert first == (Given(0, "data/a", 0, 0), Given(1, "data/b", 0, 0))
    assert second == (Given(2, "data/a", 0, 1), Given(3, "data/b", 0, 1))


def test_iteration_that_made_no_update_was_trained_on_nothing(log, loader, tmp_path):
    log.begin(TrainState())
    list(loader.iteration(0, global_batch_size=2))
    log.record(TrainState(iteration=1))
    log.record(TrainState(iteration=2), trained=False)
    assert read(tmp_path) == [(1, [0, 1]), (2, [])]


def test_record_is_in_the_file_when_the_iteration_is_over(log, loader):
    log.begin(TrainState())
    list(loader.iteration(0, global_batch_size=2))
    log.record(TrainState(iteration=1))
    assert log.path.read_text().splitlines()[-1].endswith('"samples":[[0,0,0,0],[1,1,0,0]]}')


def test_record_that_is_not_asked_for_is_not_written(loader, one_process, tmp_path):
    log = SamplesLog(tmp_path, loader, one_process, enabled=False)
    log.begin(TrainState())
    log.record(TrainState(iteration=1))
    log.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensor_rank", "pipeline_rank", "context_rank"])
def test_ranks_that_share_samples_leave_the_record_to_their_first(name, loader, one_process, tmp_path):
    log = SamplesLog(tmp_path, loader, one_process._replace(**{name: 1}), enabled=True)
    log.begin(TrainState())
    log.record(TrainState(iteration=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_record_that_cannot_be_written_stops_the_run_at_the_next_save(log, tmp_path):
    log.begin(TrainState())
    log.close()
    log._stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115  (the log closes it)
    log.record(TrainState(iteration=1))
    with pytest.raises(TrainingError, match=r"data_rank_0000\.jsonl: cannot be written \(No space left on device\)"):
        log.flush()


def test_start_after_a_line_that_was_cut_short_begins_a_line_of_its_own(log, tmp_path):
    write(tmp_path, 0, "start A 0 1", "A 1 0 1")
    with log.path.open("a") as stream:
        stream.write('{"start":"A","itera')
    log.begin(TrainState(iteration=1))
    assert read(tmp_path) == [(1, [0, 1])]


def test_samples_of_several_ranks_come_together_in_order(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0 2", "A 2 4 6")
    write(tmp_path, 1, "start A 0 2", "A 1 1 3", "A 2 5 7")
    assert read(tmp_path) == [(1, [0, 1, 2, 3]), (2, [4, 5, 6, 7])]


def test_sample_that_two_ranks_were_given_is_there_twice(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0 1")
    write(tmp_path, 1, "start A 0 2", "A 1 1 2")
    assert read(tmp_path) == [(1, [0, 1, 1, 2])]


def test_repeated_iterations_replace_what_an_earlier_start_did(tmp_path):
    write(tmp_path, 0, "start A 0 1", "A 1 0", "A 2 1", "A 3 2", "start B 1 1", "B 2 11", "B 3 12")
    assert read(tmp_path) == [(1, [0]), (2, [11]), (3, [12])]


def test_iterations_that_a_new_start_will_repeat_no_longer_count(tmp_path):
    write(tmp_path, 0, "start A 0 1", "A 1 0", "A 2 1", "A 3 2", "start B 1 1")
    assert read(tmp_path) == [(1, [0])]


def test_iterations_repeated_within_a_start_replace_the_former(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0", "A 2 2", "A 2 12")
    write(tmp_path, 1, "start A 0 2", "A 1 1", "A 2 3", "A 2 13")
    assert read(tmp_path) == [(1, [0, 1]), (2, [12, 13])]


def test_number_of_ranks_may_change_from_start_to_start(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0", "start B 1 1", "B 2 2 3", "start C 2 2", "C 3 4")
    write(tmp_path, 1, "start A 0 2", "A 1 1", "start C 2 2", "C 3 5")
    assert read(tmp_path) == [(1, [0, 1]), (2, [2, 3]), (3, [4, 5])]


def test_last_iteration_that_a_rank_had_not_written_down_is_left_out(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0", "A 2 2")
    write(tmp_path, 1, "start A 0 2", "A 1 1")
    assert read(tmp_path) == [(1, [0, 1])]


def test_iteration_that_a_rank_lacks_in_the_middle_is_an_error(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0", "A 2 2", "A 3 4")
    write(tmp_path, 1, "start A 0 2", "A 1 1", "A 3 5")
    with pytest.raises(DataError, match="has nothing of iteration 2"):
        read(tmp_path)


def test_iteration_that_no_rank_has_is_an_error(tmp_path):
    write(tmp_path, 0, "start A 0 1", "A 1 0", "A 3 4")
    with pytest.raises(DataError, match="iteration 3 comes after 1"):
        read(tmp_path)


def test_line_damaged_in_the_middle_is_an_error(tmp_path):
    write(tmp_path, 0, "start A 0 1", "A 1 0", "A 2 2", "A 3 4")
    path = tmp_path / "samples" / "data_rank_0000.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-9], lines[3]]) + "\n")
    with pytest.raises(DataError, match="line 3 is damaged"):
        read(tmp_path)


def test_rank_whose_file_is_missing_is_an_error(tmp_path):
    write(tmp_path, 0, "start A 0 2", "A 1 0", "A 2 2")
    with pytest.raises(DataError, match="2 ranks trained, and 1 files are there"):
        read(tmp_path)


def test_run_without_a_record_is_an_error_that_says_so(tmp_path):
    with pytest.raises(DataError, match="was the run started with log.samples"):
        read_history(tmp_path)
