"""Why a run stops: its length, its time, a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_ext.training import stop as stop_module
from megatron_ext.training.state import TrainState
from megatron_ext.training.stop import Stop

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Put the signal handlers back that a Stop replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
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
    os.kill(os.getpid(), number)
    assert stop.check(TrainState()) == f"asked by {number.name}"


def test_signal_comes_before_the_time(train, clock):
    stop = Stop(train(exit_duration_minutes=2.0))
    clock[0] += 500.0
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.check(TrainState()) == "asked by SIGUSR1"


def test_finished_run_says_so_even_when_asked_to_stop(train):
    stop = Stop(train())
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.check(TrainState(iteration=20)) == "finished: 20 iterations"
