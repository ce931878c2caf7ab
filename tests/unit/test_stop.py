"""Why a run stops: its length, its time, its job's time, a signal. What the job's record then says."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_ext.parallel.launch import Job
from megatron_ext.training import stop as stop_module
from megatron_ext.training.state import TrainState
from megatron_ext.training.stop import Stop

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put back the signal handlers that a Stop replaces, and the mask that it sets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what a test left pending comes to the Stop's handler now
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """A clock at 1000 seconds that tests turn on by hand."""
    seconds = [1000.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def train(tiny_config):
    return lambda **changes: replace(tiny_config().train, train_iters=20, **changes)


def test_run_goes_on_before_its_last_iteration(train):
    assert Stop(train()).check(TrainState(iteration=19)) is None


def test_run_stops_after_its_last_iteration(train):
    assert Stop(train()).check(TrainState(iteration=20)) == "finished: 20 iterations"


def test_run_resumed_beyond_its_end_stops_at_once(train):
    assert Stop(train()).check(TrainState(iteration=25)) == "finished: 25 iterations"


def test_run_with_an_early_exit_goes_on_before_it(train):
    assert Stop(train(exit_iters=5)).check(TrainState(iteration=4)) is None


def test_run_with_an_early_exit_stops_there(train):
    assert Stop(train(exit_iters=5)).check(TrainState(iteration=5)) == "finished: 5 iterations"


def test_run_goes_on_before_its_time_has_passed(train, clock):
    stop = Stop(train(exit_duration_minutes=2.0))
    clock[0] += 119.9
    assert stop.check(TrainState()) is None


def test_run_stops_once_its_time_has_passed(train, clock):
    stop = Stop(train(exit_duration_minutes=2.0))
    clock[0] += 120.0
    assert stop.check(TrainState()) == "train.exit_duration_minutes has passed"


def test_run_without_a_limit_goes_on_for_ever(train, clock):
    stop = Stop(train())
    clock[0] += 1e9
    assert stop.check(TrainState()) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_that_got_a_signal_stops_and_names_it(number, train):
    stop = Stop(train())
    signal.raise_signal(number)  # to this thread: another might take its time to hand it on
    assert stop.check(TrainState()) == f"asked by {number.name}"


def test_signal_comes_before_the_time(train, clock):
    stop = Stop(train(exit_duration_minutes=2.0))
    clock[0] += 500.0
    signal.raise_signal(signal.SIGUSR1)  # to this thread: another might take its time to hand it on
    assert stop.check(TrainState()) == "asked by SIGUSR1"


def test_finished_run_says_so_even_when_asked_to_stop(train):
    stop = Stop(train())
    signal.raise_signal(signal.SIGTERM)  # to this thread: another might take its time to hand it on
    assert stop.check(TrainState(iteration=20)) == "finished: 20 iterations"


# --- the job's end -----------------------------------------------------------------------------------------------


def job(seconds: float) -> Job:
    """A job that ends in so many seconds, by the wall clock, which tests do not turn on."""
    return Job(end_time=time.time() + seconds)


def test_short_job_does_not_stop_at_its_start(train, clock):
    assert Stop(train(), job(60.0)).check(TrainState()) is None


def test_short_job_stops_with_a_twentieth_of_its_time_left(train, clock):
    stop = Stop(train(), job(400.0))
    clock[0] += 379.0
    assert stop.check(TrainState()) is None
    stop = Stop(train(), job(400.0))
    clock[0] += 381.0
    assert stop.check(TrainState()) == "the job ends in 19 s"


def test_very_short_job_stops_with_the_time_left_that_its_end_takes(train, clock):
    stop = Stop(train(), job(60.0))
    clock[0] += 49.0
    assert stop.check(TrainState()) is None
    stop = Stop(train(), job(60.0))
    clock[0] += 51.0
    assert stop.check(TrainState()) == "the job ends in 9 s"


def test_long_job_stops_ten_minutes_before_its_end(train, clock):
    stop = Stop(train(), job(86400.0))
    clock[0] += 86400.0 - 601.0
    assert stop.check(TrainState()) is None
    stop = Stop(train(), job(86400.0))
    clock[0] += 86400.0 - 599.0
    assert stop.check(TrainState()) == "the job ends in 599 s"


def test_slow_save_makes_the_run_stop_twice_as_long_before_the_end(train, clock):
    stop = Stop(train(), job(10000.0))
    stop.check(TrainState())
    clock[0] += 1000.0  # an iteration and the save that went with it
    assert stop.check(TrainState(iteration=1)) is None
    clock[0] += 100.0
    assert stop.check(TrainState(iteration=2)) is None
    for passed in (950.0,) * 7:
        clock[0] += passed
        reason = stop.check(TrainState(iteration=3))
    assert clock[0] == 1000.0 + 7750.0 and reason is None  # 2250 s left, 2000 needed
    clock[0] += 300.0
    assert stop.check(TrainState(iteration=4)) == "the job ends in 1950 s"


def test_save_in_the_background_counts_twice_before_the_end(train, clock):
    # One may be under way, and the last one comes after it.
    stop = Stop(train(), job(10000.0))
    clock[0] += 7900.0
    assert stop.check(TrainState(), save_seconds=None) is None
    clock[0] += 10.0
    assert stop.check(TrainState(iteration=1), save_seconds=1000.0) is None  # 2090 s left, 2010 needed
    clock[0] += 100.0
    assert stop.check(TrainState(iteration=2), save_seconds=900.0) == "the job ends in 1990 s"


def test_job_whose_time_is_over_stops_at_once(train):
    assert str(Stop(train(), job(-5.0)).check(TrainState())).startswith("the job ends in -5 s")


# --- the record --------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    return tmp_path / "record"


def test_record_of_a_run_under_way_says_where_it_began(train, record):
    stop = Stop(train(), Job(record=record))
    stop.check(TrainState(iteration=7))
    stop.check(TrainState(iteration=8))
    assert record.read_text() == "running 7 7 7\n"


def test_record_of_a_run_that_was_asked_to_stop_says_so(train, record):
    stop = Stop(train(), Job(record=record))
    stop.check(TrainState(iteration=7))
    signal.raise_signal(signal.SIGUSR1)  # to this thread: another might take its time to hand it on
    stop.check(TrainState(iteration=9))
    assert record.read_text() == "stopped 7 7 9 asked by SIGUSR1\n"


def test_record_of_a_finished_run_says_so(train, record):
    Stop(train(), Job(record=record)).check(TrainState(iteration=20))
    assert record.read_text() == "finished 20 20 20 finished: 20 iterations\n"


def test_run_that_reached_its_own_time_limit_counts_as_finished(train, record, clock):
    stop = Stop(train(exit_duration_minutes=2.0), Job(record=record))
    clock[0] += 500.0
    stop.check(TrainState(iteration=7))
    assert record.read_text() == "finished 7 7 7 train.exit_duration_minutes has passed\n"


def test_record_says_of_which_iteration_the_newest_checkpoint_is(train, record):
    stop = Stop(train(), Job(record=record))
    stop.check(TrainState(iteration=7))
    stop.note_saved(10)
    assert record.read_text() == "running 7 10 7\n"
    signal.raise_signal(signal.SIGUSR1)  # to this thread: another might take its time to hand it on
    stop.check(TrainState(iteration=12))
    assert record.read_text() == "stopped 7 10 12 asked by SIGUSR1\n"
    stop.note_saved(12)
    assert record.read_text() == "stopped 7 12 12 asked by SIGUSR1\n"


def test_record_that_cannot_be_written_does_not_keep_the_run_from_going_on(train, tmp_path, caplog):
    stop = Stop(train(), Job(record=tmp_path / "missing" / "record"))
    assert stop.check(TrainState()) is None
    assert "the job will not go on by itself" in caplog.text


# --- signals to all processes of a task, as Slurm sends them -----------------------------------------------------


def test_processes_started_after_a_stop_outlive_a_sigterm(train):
    Stop(train())
    with multiprocessing.get_context("spawn").Manager() as manager:  # as Megatron's save starts one
        os.kill(manager._process.pid, signal.SIGTERM)
        queue = manager.Queue()
        queue.put(3)
        assert queue.get(timeout=60) == 3
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child.terminate()
    child.communicate(b"\n", timeout=60)
    assert child.returncode == 0


def test_signal_is_seen_though_the_thread_that_took_it_is_not_the_main_one(train):
    # torch's threads are older than the Stop and do not block the signal, so that they take it.
    source = (
        "import os, signal, threading; from pathlib import Path\n"
        "from megatron_ext.training.stop import Stop\n"
        "done = threading.Event(); threading.Thread(target=done.wait, daemon=True).start()\n"
        "from types import SimpleNamespace\n"
        "stop = Stop(SimpleNamespace(train_iters=2, exit_iters=None, exit_duration_minutes=None))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "import time; until = time.monotonic() + 60\n"
        "while stop._own_reason() is None and time.monotonic() < until: time.sleep(0.01)\n"
        "print(stop._own_reason().text)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.stdout == "asked by SIGTERM\n", done.stderr
