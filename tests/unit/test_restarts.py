"""What a start says of the one before, and what a start that fails leaves behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import CheckpointError, TrainingError
from megatron_ext.parallel.launch import Job
from megatron_ext.training.restarts import UNKNOWN, failure_noted, find_restart, note_stop, reason_of

NOW = 5000.0


def row(kind: str, iteration: int, time: float, **more: Any) -> dict[str, Any]:
    place = {"iteration": iteration, "consumed_samples": 8 * iteration, "consumed_tokens": 128 * iteration}
    return {"kind": kind, **place, "time": time, **more}


# Iterations of ten seconds, a row for each second of them, as log.interval 2 would write.
SESSION = [row("start", 0, 1000.0, job="17"), *(row("train", n, 1000.0 + 10 * n) for n in (2, 4, 6, 8))]


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def write(*rows: dict[str, Any], cut: str = "") -> Path:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows) + cut)
        return path

    return write


def find(path: Path, iteration: int, job: Job | None = None):
    return find_restart(path, iteration=iteration, job=job or Job(), now=NOW)


def test_first_start_is_no_restart(tmp_path):
    assert find(tmp_path / "metrics.jsonl", 0) is None


def test_start_after_rows_of_refused_starts_alone_is_no_restart(metrics):
    assert find(metrics(row("stop", 0, 1.0, reason="failed: no such file")), 0) is None


def test_restart_counts_the_starts_before(metrics):
    assert find(metrics(*SESSION, *SESSION, *SESSION), 8).number == 3


def test_restart_names_the_reason_of_the_last_stop(metrics):
    assert find(metrics(*SESSION, row("stop", 8, 1081.0, reason="asked by SIGTERM")), 8).reason == "asked by SIGTERM"


def test_restart_after_an_end_without_a_word_says_so(metrics):
    assert find(metrics(*SESSION), 4).reason == UNKNOWN


def test_restart_in_the_same_job_takes_the_batch_scripts_word(metrics):
    assert find(metrics(*SESSION), 4, Job(number="17", previous_end="srun ended with 9")).reason == "srun ended with 9"


def test_restart_in_another_job_does_not_take_that_jobs_word(metrics):
    assert find(metrics(*SESSION), 4, Job(number="18", previous_end="srun ended with 9")).reason == UNKNOWN


def test_own_word_of_the_run_counts_more_than_the_batch_scripts(metrics):
    path = metrics(*SESSION, row("stop", 8, 1081.0, reason="failed: the loss is nan"))
    assert find(path, 4, Job(number="17", previous_end="srun ended with 2")).reason == "failed: the loss is nan"


def test_lost_time_is_that_since_the_row_whose_work_survives(metrics):
    restart = find(metrics(*SESSION), 4)
    assert (restart.lost_seconds, restart.redone_iterations) == (NOW - 1040.0, 4)


def test_lost_time_of_a_run_that_saved_last_is_that_since_it_stopped(metrics):
    restart = find(metrics(*SESSION, row("stop", 9, 1095.0, reason="asked by SIGTERM")), 9)
    assert (restart.lost_seconds, restart.redone_iterations) == (NOW - 1095.0, 0)


@pytest.mark.parametrize("reason", ["failed: rank 1 is gone", "asked by SIGTERM before the first iteration"])
def test_start_that_failed_in_between_is_lost_time_too(reason, metrics):
    orderly = row("stop", 8, 1081.0, reason="asked by SIGTERM")
    restart = find(metrics(*SESSION, orderly, row("stop", 8, 4000.0, reason=reason)), 8)
    assert (restart.reason, restart.lost_seconds) == (reason, NOW - 1081.0)


def test_run_that_had_finished_has_lost_nothing(metrics):
    assert find(metrics(*SESSION, row("stop", 8, 1081.0, reason="finished: 8 iterations")), 8).lost_seconds == 0.0


def test_run_that_had_finished_and_lost_its_last_checkpoint_has_lost_the_work_alone(metrics):
    path = metrics(*SESSION, row("stop", 8, 1081.0, reason="finished: 8 iterations"))
    assert (find(path, 4).lost_seconds, find(path, 4).redone_iterations) == (41.0, 4)


def test_line_cut_short_by_a_crash_is_passed_over(metrics):
    assert find(metrics(*SESSION, cut='{"kind": "train", "iter'), 8).lost_seconds == NOW - 1080.0


def test_restart_is_told_in_one_line(metrics):
    path = metrics(*SESSION)
    assert str(find(path, 4)) == f"restart 1 (after: {UNKNOWN}; 4 iterations are trained again; 3960 s lost)"


# --- a start that fails ------------------------------------------------------------------------------------------


def stops(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["kind"] == "stop"]


def fail(folder: Path, error: BaseException, *, rank: int = 0) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(type(error)), failure_noted(folder, rank=rank):
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)


def test_failure_leaves_its_first_line_where_the_last_row_stood(metrics, tmp_path):
    metrics(*SESSION)
    fail(tmp_path, TrainingError("iteration 9: the loss is nan\non samples 64 to 71"))
    (stop,) = stops(tmp_path)
    assert stop["reason"] == "failed: iteration 9: the loss is nan"
    assert (stop["iteration"], stop["consumed_samples"], stop["consumed_tokens"]) == (8, 64, 1024)


def test_failure_of_a_first_start_leaves_a_row_too(tmp_path):
    fail(tmp_path, TrainingError("no disk"))
    assert [(stop["iteration"], stop["reason"]) for stop in stops(tmp_path)] == [(0, "failed: no disk")]


def test_refused_start_leaves_the_rows_of_the_directory_alone(metrics, tmp_path):
    path = metrics(*SESSION)
    before = path.read_bytes()
    fail(tmp_path, CheckpointError("of another model"))
    assert path.read_bytes() == before


def test_checkpoint_that_fails_under_way_leaves_a_row(metrics, tmp_path):
    path = metrics(*SESSION)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(CheckpointError), failure_noted(tmp_path, rank=0):
            with path.open("a") as stream:
                stream.write(json.dumps({"kind": "start", "iteration": 8, "time": NOW}) + "\n")
            raise CheckpointError("no disk")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [stop["reason"] for stop in stops(tmp_path)] == ["failed: no disk"]


def test_failure_after_a_line_cut_short_has_a_line_of_its_own(metrics, tmp_path):
    path = metrics(*SESSION, cut='{"kind": "tr')
    note_stop(path, "failed: no disk")
    assert json.loads(path.read_text().splitlines()[-1])["iteration"] == 8


def test_other_rank_leaves_no_row(tmp_path):
    fail(tmp_path, TrainingError("no disk"), rank=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_sigterm_before_the_run_stops_by_itself_leaves_a_row(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended, failure_noted(tmp_path, rank=0):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    assert stops(tmp_path)[0]["reason"] == "asked by SIGTERM before the first iteration"


def test_row_that_cannot_be_written_hides_no_error(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    fail(tmp_path, TrainingError("the first trouble"))
    assert "no row about this end could be written" in caplog.text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("running 20 30 20\n", "failed 20 30 20"),
        ("stopped 20 30 37 asked by SIGTERM\n", "failed 20 30 37"),
        (None, "failed - - -"),
    ],
)
def test_failure_is_told_to_the_batch_script_with_the_iterations_that_it_knew(before, after, tmp_path, monkeypatch):
    record = tmp_path / "record"
    if before is not None:
        record.write_text(before)
    monkeypatch.setenv("MEGAPINTS_JOB_RECORD", str(record))
    fail(tmp_path, TrainingError("no disk"))
    assert record.read_text() == f"{after} failed: no disk\n"


def test_refusal_is_told_to_the_batch_script_as_one(tmp_path, monkeypatch):
    record = tmp_path / "record"
    monkeypatch.setenv("MEGAPINTS_JOB_RECORD", str(record))
    fail(tmp_path, CheckpointError("of another model"))
    assert record.read_text() == "refused - - - failed: of another model\n"


def test_record_that_cannot_be_written_hides_no_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAPINTS_JOB_RECORD", str(tmp_path / "missing" / "record"))
    fail(tmp_path, CheckpointError("of another model"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("\n[gloo] Connection closed by peer\nmore"),
            "failed: RuntimeError: [gloo] Connection closed by peer",
        ),
        (AssertionError(), "failed: AssertionError"),
        (TrainingError(), "failed: TrainingError"),
        (
            TrainingError("iteration 9: 4.5 is no loss. Nothing was saved; lower it."),
            "failed: iteration 9: 4.5 is no loss",
        ),
        (TrainingError("no disk."), "failed: no disk"),
        (KeyboardInterrupt(), "interrupted by the keyboard"),
    ],
)
def test_reason_is_one_line(error, reason):
    assert reason_of(error) == reason
