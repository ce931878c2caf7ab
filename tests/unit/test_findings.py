"""A run that ends on a finding while a save is in flight: the save is completed, and the finding is what is told."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import writer
from megatron_ext.checkpoint.save_load import Checkpoints
from megatron_ext.errors import TrainingError
from megatron_ext.training import loop
from megatron_ext.training.replicas import Comparison
from megatron_ext.training.samples_log import SamplesLog
from megatron_ext.training.watchdog import Watchdog
from tests.unit.test_loop import NAN_IN_7, NO_FAULT, Trained, start  # noqa: F401

ASYNC = ("--checkpoint.async_save", "true")  # begun after iteration 5
CHECKED_AT_7 = ("--reliability.replica_check_interval", "7")
RECORDED = ("--log.samples", "true")


class HeldSave:
    """A background save that is not done before the run waits for it, and may fail then."""

    def __init__(self) -> None:
        self.fails = False
        self.phase = ""
        """Of the watchdog, when the run began to wait."""
        self.let_go = threading.Event()


@pytest.fixture
def held_save(monkeypatch) -> Iterator[HeldSave]:
    held = HeldSave()
    close_file, close, note = writer.DigestingFile.close, Checkpoints.close, Watchdog.note
    phases: list[str] = []

    def close_file_when_let_go(self: Any) -> Any:
        assert held.let_go.wait(60)
        record = close_file(self)
        if held.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return record

    def close_and_let_go(self: Checkpoints) -> None:
        held.phase = phases[-1]
        held.let_go.set()
        close(self)

    def note_and_remember(self: Watchdog, iteration: int, phase: str) -> None:
        phases.append(phase)
        note(self, iteration, phase)

    monkeypatch.setattr(writer.DigestingFile, "close", close_file_when_let_go)
    monkeypatch.setattr(Checkpoints, "close", close_and_let_go)
    monkeypatch.setattr(Watchdog, "note", note_and_remember)
    yield held
    held.let_go.set()


@pytest.fixture
def replicas_differ(monkeypatch) -> None:
    """One process has no replicas: what comparing them finds is planted."""
    monkeypatch.setattr(loop, "compare_replicas", lambda _: Comparison(0, "rank 1 (node n2)"))


@pytest.fixture
def full_disk_at_7(monkeypatch) -> None:
    """The record of the samples meets a full disk in iteration 7; the next save is due after 10."""
    if not Path("/dev/full").exists():
        pytest.skip("needs a file that is always full")
    record = SamplesLog.record

    def record_on_a_full_disk(self: SamplesLog, state: Any, **options: Any) -> None:
        if state.iteration == 7:
            self.close()
            self._stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115  (the log closes it)
        record(self, state, **options)

    monkeypatch.setattr(SamplesLog, "record", record_on_a_full_disk)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


@pytest.mark.usefixtures("replicas_differ")
def test_replicas_that_differ_are_told_though_the_save_in_flight_fails(start, held_save, caplog):  # noqa: F811
    held_save.fails = True
    with pytest.raises(TrainingError, match=r"iteration 7: the weights of replicas differ: rank 1 \(node n2\)"):
        start(NO_FAULT, *ASYNC, *CHECKED_AT_7)
    finding, failed = errors(caplog)
    assert "replicas differ" in finding and "checkpoint of iteration 5 could not be saved" in failed


@pytest.mark.usefixtures("replicas_differ")
def test_replicas_that_differ_let_the_save_in_flight_take_the_time_of_a_save(start, held_save, tmp_path):  # noqa: F811
    with pytest.raises(TrainingError, match="replicas differ"):
        start(NO_FAULT, *ASYNC, *CHECKED_AT_7)
    assert held_save.phase == "save"  # for which the watchdog allows more than between two iterations
    assert Trained(tmp_path / "run").checkpoints() == ["iter_0000005"]


def test_bad_iteration_is_told_though_the_save_in_flight_fails(start, held_save, caplog):  # noqa: F811
    held_save.fails = True
    with pytest.raises(TrainingError, match="iteration 7: the loss is nan"):
        start(NAN_IN_7, *ASYNC)
    finding, failed = errors(caplog)
    assert "the loss is nan" in finding and "checkpoint of iteration 5 could not be saved" in failed


@pytest.mark.usefixtures("full_disk_at_7", "held_save")
def test_samples_that_cannot_be_recorded_let_the_save_in_flight_be_completed(start, tmp_path):  # noqa: F811
    with pytest.raises(TrainingError, match=r"data_rank_0000\.jsonl: cannot be written \(No space left on device\)"):
        start(NO_FAULT, *ASYNC, *RECORDED)
    assert Trained(tmp_path / "run").checkpoints() == ["iter_0000005"]
