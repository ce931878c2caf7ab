"""Run directories to records: what counts after a resume, what a restart cost, what is left out."""

from __future__ import annotations

import pytest

from megatron_ext.errors import DataError
from tests.unit.run_folders import row, start, stop, train, valid, write_checkpoint, write_run
from tools.watching import reading


def test_rows_done_again_after_a_resume_count_once(tmp_path):
    before = [start(0, 0), train(10, 10, 5.0), valid(10, 11, 5.5), train(20, 20, 9.0), valid(20, 21, 9.5)]
    after = [start(10, 50), train(20, 60, 4.0)]
    record = reading.read_run(write_run(tmp_path, before + after))
    assert [(one["iteration"], one["loss"]) for one in record.train] == [(10, 5.0), (20, 4.0)]
    assert [one["iteration"] for one in record.valid] == [10]


def test_rows_that_a_start_went_back_behind_no_longer_count(tmp_path):
    rows = [start(0, 0), train(10, 10), train(20, 20), start(10, 50)]
    record = reading.read_run(write_run(tmp_path, rows))
    assert [one["iteration"] for one in record.train] == [10]
    assert record.last_iteration == 10


def test_rows_of_a_rewind_within_a_session_win(tmp_path):
    rows = [start(0, 0), train(10, 10, 5.0), train(20, 20, 50.0), row("rewind", 10, 21), train(20, 30, 4.0)]
    record = reading.read_run(write_run(tmp_path, rows))
    assert [one["loss"] for one in record.train] == [5.0, 4.0]


def test_rows_that_a_rewind_took_back_do_not_count_until_they_are_written_again(tmp_path):
    rows = [start(0, 0), train(10, 10, 5.0), train(20, 20, 50.0), row("rewind", 10, 21), train(30, 30, 4.0)]
    record = reading.read_run(write_run(tmp_path, rows))
    assert [one["iteration"] for one in record.train] == [10, 30]


def test_killed_session_costs_what_is_done_again_and_the_time_between(tmp_path):
    rows = [start(0, 0), train(10, 10), row("checkpoint", 10, 12), train(20, 22), train(25, 27), start(10, 87)]
    (restart,) = reading.read_run(write_run(tmp_path, rows)).restarts
    assert restart.redone_iterations == 15
    assert restart.redone_seconds == pytest.approx(27 - 12)
    assert restart.down_seconds == pytest.approx(87 - 27)
    assert restart.lost_seconds == pytest.approx(75)
    assert restart.why == "ended without a word (killed or crashed)"


def test_stopped_session_gives_its_reason_to_the_restart(tmp_path):
    rows = [start(0, 0), train(10, 10), stop(10, 11, "asked by SIGTERM"), start(10, 31)]
    (restart,) = reading.read_run(write_run(tmp_path, rows)).restarts
    assert (restart.why, restart.redone_iterations) == ("asked by SIGTERM", 0)
    assert restart.lost_seconds == pytest.approx(20)


def test_finished_run_that_is_made_longer_lost_nothing(tmp_path):
    rows = [start(0, 0), train(10, 10), stop(10, 11, "finished: 10 iterations"), start(10, 9999)]
    assert reading.read_run(write_run(tmp_path, rows)).restarts[0].lost_seconds == 0


@pytest.mark.parametrize("where", ["within the start row", "row before the start", "row after the start"])
def test_what_the_trainer_says_of_a_restart_comes_first(tmp_path, where):
    said = {"reason": "node failed", "lost_seconds": 7.0}
    rows = [start(0, 0), train(10, 10)]
    if where == "within the start row":
        rows += [start(10, 50, **said)]
    elif where == "row before the start":
        rows += [row("restart", 10, 50, **said), start(10, 50)]
    else:
        rows += [start(10, 50), row("restart", 10, 50, **said)]
    record = reading.read_run(write_run(tmp_path, [*rows, train(20, 60)]))
    assert [(one.why, one.lost_seconds) for one in record.restarts] == [("node failed", 7.0)]


def test_time_in_iterations_counts_what_was_lost_again(tmp_path):
    rows = [start(0, 0), train(10, 20), train(20, 40), start(10, 60), train(15, 70)]
    # 10 + 10 iterations, then 5 after the resume, of 2 s each
    assert reading.training_seconds(reading.read_run(write_run(tmp_path, rows))) == pytest.approx(50)


def test_line_cut_short_within_is_left_out_and_named(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)], tail='{"kind": "train", "iter\n')
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "start", "iteration": 10, "time": 1}\n')
    record = reading.read_run(folder)
    assert (record.damaged, len(record.sessions)) == ((3,), 2)


def test_growing_file_is_read_on_where_reading_ended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "start", "iteration": 0}\n{"kind": "tra')
    metrics = reading.MetricsFile(path)
    metrics.read()
    assert [one["kind"] for one in metrics.all_rows()] == ["start"]
    with path.open("a") as stream:
        stream.write('in", "iteration": 10}\n')
    metrics.read()
    assert [one["kind"] for one in metrics.all_rows()] == ["start", "train"]
    assert metrics.damaged == []


def test_file_that_was_replaced_by_a_shorter_one_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "start", "iteration": 0}\n{"kind": "train", "iteration": 10}\n')
    metrics = reading.MetricsFile(path)
    metrics.read()
    path.write_text('{"kind": "start", "iteration": 5}\n')
    metrics.read()
    assert [one["iteration"] for one in metrics.all_rows()] == [5]


def test_training_row_without_iteration_is_refused(tmp_path):
    with pytest.raises(DataError, match="row 2 has no iteration"):
        reading.read_run(write_run(tmp_path, [start(0, 0), {"kind": "train", "loss": 1.0}]))


def test_exit_iters_is_where_the_run_ends(tmp_path):
    folder = write_run(tmp_path, [start(0, 0)])
    (folder / "config.toml").write_text("[train]\ntrain_iters = 100\nexit_iters = 40\n")
    assert reading.read_run(folder).target == 40


def test_log_lines_tell_their_level_and_join_what_follows(tmp_path):
    (tmp_path / "log.txt").write_text(
        "2026-11-21 00:00:00 starting\n2026-11-21 00:00:01 WARNING a disk is\nnearly full\n"
    )
    assert reading.read_log(tmp_path) == [
        ("2026-11-21 00:00:00", "", "starting"),
        ("2026-11-21 00:00:01", "WARNING", "a disk is\nnearly full"),
    ]


def test_end_of_a_log_begins_with_a_whole_line(tmp_path):
    (tmp_path / "log.txt").write_text("2026-11-21 00:00:00 first\n2026-11-21 00:00:01 second\n")
    assert [line.message for line in reading.read_log(tmp_path, last_bytes=40)] == ["second"]


def test_newest_whole_checkpoint_is_found_past_a_broken_one(tmp_path):
    write_checkpoint(tmp_path, 10)
    (write_checkpoint(tmp_path, 20) / "weights").unlink()
    found, rejected = reading.newest_checkpoint(tmp_path)
    assert found is not None and found.iteration == 10 and found.size == 1000
    assert [one.path.name for one in rejected] == ["iter_0000020"]


def test_run_without_checkpoints_has_none(tmp_path):
    assert reading.newest_checkpoint(tmp_path) == (None, ())
