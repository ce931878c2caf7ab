"""What a run does about bad iterations: whole runs in this process, with faults planted in their samples.

Eight samples an iteration: sample 50 is in iteration 7, 130 in 17. Restarts build everything anew.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import pretrain_pints
from megatron_ext import log
from megatron_ext.errors import DataError, TrainingError
from megatron_ext.parallel import groups
from megatron_ext.parallel.launch import single_process
from megatron_ext.training import bad_iterations
from tests.dist.faulty import plant
from tools.watching.reading import read_run

NO_FAULT: dict[str, Any] = {}
NAN_IN_7, INF_IN_7, SPIKE_IN_17 = {"nan": [50]}, {"inf": [50]}, {"spike": [130]}
SKIP = ("--reliability.bad_iteration_policy", "skip")
REWIND = ("--reliability.bad_iteration_policy", "rewind")
SPIKES = ("--reliability.spike_deviations", "6", "--reliability.spike_window_iters", "10")
PASSED_OVER_7 = {
    "iteration": 7, "reason": "the loss is nan", "policy": "skip", "first_iteration": 7, "last_iteration": 7,
    "first_sample": 48, "last_sample": 55, "source": "written by hand",
}  # fmt: skip


class Killed(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


class Trained(NamedTuple):
    """A run directory after a start of the run."""

    run_dir: Path

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]

    def metrics(self) -> dict[int, tuple[float, ...]]:
        """Per iteration what does not depend on time, as the run went on after its last restart or rewind."""
        names = ("loss", "grad_norm", "lr", "consumed_samples")
        rows = read_run(self.run_dir).train
        return {row["iteration"]: tuple(row[name] for name in names) for row in rows}

    def record(self) -> list[dict[str, Any]]:
        return json.loads((self.run_dir / "skipped.json").read_text())["bad_iterations"]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("iter_*"))

    def tensors(self, iteration: int) -> dict[str, torch.Tensor]:
        """All of a checkpoint, parameters and moments, with torch's own reader."""
        reader = dcp.FileSystemReader(str(self.run_dir / "checkpoints" / f"iter_{iteration:07d}"))
        entries = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
        return state


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys() and any("optimizer" in key for key in one)
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def start(tiny_config, tmp_path, one_process, monkeypatch) -> Iterator[Callable[..., Trained]]:
    """Start a run of 12 iterations, or start it again, saving after iteration 5 and 10."""
    monkeypatch.setattr(groups, "initialize", lambda *_, **__: one_process)
    monkeypatch.setattr(groups, "destroy", lambda: None)
    monkeypatch.setattr(log, "setup_logging", lambda **_: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def start(
        faults: dict[str, Any], *overrides: str, name: str = "run", iterations: int = 12, micro_batch_size: str = "8"
    ) -> Trained:
        run_dir = tmp_path / name
        config = tiny_config(
            "--run_dir", str(run_dir), "--train.train_iters", str(iterations), "--optimizer.lr_decay_iters", "20",
            "--model.num_layers", "1", "--train.micro_batch_size", micro_batch_size,
            "--train.eval_interval", "100", "--train.manual_gc_interval", "none", "--checkpoint.save_interval", "5",
            "--checkpoint.optimizer_format", "fully_reshardable", "--reliability.preflight", "false", *overrides,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            plant(faults, wrap=patch.setattr, end=_kill)
            pretrain_pints.run(config, single_process())
        return Trained(run_dir)

    gc.freeze()  # a save collects garbage, and would walk over all that pytest holds
    yield start
    gc.unfreeze()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _kill() -> None:
    raise Killed


@pytest.fixture
def reference(start, tmp_path) -> Callable[..., Trained]:
    """A run without faults that has been told by hand which samples to pass over."""

    def train(*spans: dict[str, Any], iterations: int = 12, overrides: tuple[str, ...] = ()) -> Trained:
        (tmp_path / "reference").mkdir()
        (tmp_path / "reference" / "skipped.json").write_text(json.dumps({"format": 1, "bad_iterations": spans}))
        return start(NO_FAULT, *overrides, name="reference", iterations=iterations)

    return train


# --- stop -----------------------------------------------------------------------------------------------------


def test_stop_names_the_iteration_what_is_bad_and_its_samples(start):
    with pytest.raises(TrainingError) as caught:
        start(NAN_IN_7)
    assert str(caught.value).startswith("iteration 7: the loss is nan, on samples 48 to 55 (from sample 48: ")


def test_stop_saves_nothing_and_records_nothing(start, tmp_path):
    with pytest.raises(TrainingError):
        start(NAN_IN_7)
    run = Trained(tmp_path / "run")
    assert run.checkpoints() == ["iter_0000005"] and not (run.run_dir / "skipped.json").exists()


def test_stop_at_a_gradient_that_overflows_says_so(start):
    with pytest.raises(TrainingError, match="iteration 7: the gradient norm is (inf|nan), on samples 48 to 55"):
        start(INF_IN_7)


def test_stop_at_a_spike_says_how_far_it_stands_out(start):
    with pytest.raises(TrainingError, match=r"iteration 17: the loss is 1\d\.\d{4}, \d+\.\d standard deviations above"):
        start(SPIKE_IN_17, *SPIKES, iterations=20)


# --- skip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [NAN_IN_7, INF_IN_7])
def test_skip_leaves_no_trace_of_the_bad_iteration(faults, start, reference):
    skipped = start(faults, *SKIP)
    expected = reference(PASSED_OVER_7)
    assert skipped.metrics() == expected.metrics() and equal(skipped.tensors(12), expected.tensors(12))


def test_skip_goes_on_with_the_samples_and_the_rate_of_the_next_iteration(start):
    skipped, clean = start(NAN_IN_7, *SKIP).metrics(), start(NO_FAULT, name="clean").metrics()
    assert {k: v[2:] for k, v in skipped.items()} == {k: v[2:] for k, v in clean.items() if k != 7}


def test_skip_of_a_spike_leaves_no_trace_of_it(start, reference):
    skipped = start(SPIKE_IN_17, *SKIP, *SPIKES, iterations=20)
    bad = {**PASSED_OVER_7, "first_sample": 128, "last_sample": 135}
    assert skipped.metrics() == reference(bad, iterations=20).metrics()


def test_skip_is_reported_with_its_samples_and_where_they_come_from(start, caplog):
    with caplog.at_level(logging.WARNING):
        (row,) = start(NAN_IN_7, *SKIP).rows("skip")
    assert (row["iteration"], row["iterations"], row["first_sample"], row["last_sample"]) == (6, [7, 7], 48, 55)
    assert row["reason"] == "the loss is nan" and " #" in row["source"]
    (warning,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert warning.startswith("iteration 7: the loss is nan, on samples 48 to 55 (from sample 48:")
    assert warning.endswith("passed over, without an update (bad iteration 1 of at most 3)")


def test_one_bad_iteration_more_than_allowed_stops_the_run(start):
    with pytest.raises(TrainingError, match="iteration 9: .* It is bad iteration 3 .*max_bad_iterations is 2"):
        start({"nan": [17, 40, 64]}, *SKIP, "--reliability.max_bad_iterations", "2")


def test_bad_iterations_of_earlier_starts_count(start):
    limit = ("--reliability.max_bad_iterations", "1")
    start(NAN_IN_7, *SKIP, *limit, "--train.exit_iters", "8")
    with pytest.raises(TrainingError, match="iteration 9: .* It is bad iteration 2"):
        start({"nan": [50, 64]}, *SKIP, *limit)


def test_iterations_between_reports_that_made_no_update_are_left_out_of_the_mean(start):
    every = ("--log.interval", "2")
    skipped, each = start(NAN_IN_7, *SKIP, *every).metrics(), start(NAN_IN_7, *SKIP, name="each").metrics()
    assert skipped[8][0] == each[8][0] and skipped[6][0] == pytest.approx((each[5][0] + each[6][0]) / 2)


# --- rewind ---------------------------------------------------------------------------------------------------


def test_rewind_of_no_further_iterations_gives_what_skip_gives(start, reference):
    rewound, expected = start(NAN_IN_7, *REWIND), reference(PASSED_OVER_7)
    assert rewound.metrics() == expected.metrics() and equal(rewound.tensors(12), expected.tensors(12))


def test_rewind_passes_over_the_iterations_before_too(start, reference):
    rewound = start({"nan": [64]}, *REWIND, "--reliability.rewind_skip_iters", "2")
    expected = reference({**PASSED_OVER_7, "first_sample": 48, "last_sample": 71})
    assert rewound.metrics() == expected.metrics()
    assert equal(rewound.tensors(12), expected.tensors(12))


def test_rewind_passes_over_nothing_that_the_checkpoint_holds(start):
    (bad,) = start(NAN_IN_7, *REWIND, "--reliability.rewind_skip_iters", "100").record()
    assert (bad["first_iteration"], bad["last_iteration"]) == (6, 7)
    assert (bad["first_sample"], bad["last_sample"]) == (40, 55)


def test_rewind_with_a_growing_batch_finds_the_first_sample_of_its_span(start):
    # 4, 4, 4, 4, 4, then 6, 6, 6, 6, then 8 samples: iteration 8 begins at sample 20 + 12.
    ramp = (*REWIND, "--train.rampup_batch_size", "4", "2", "40", "--reliability.rewind_skip_iters", "1")
    (bad,) = start({"nan": [40]}, *ramp, micro_batch_size="2").record()
    assert (bad["iteration"], bad["first_iteration"]) == (9, 8)
    assert (bad["first_sample"], bad["last_sample"]) == (32, 43)


def test_rewind_is_reported_at_the_checkpoint_that_it_went_back_to(start, caplog):
    with caplog.at_level(logging.WARNING):
        (row,) = start(NAN_IN_7, *REWIND).rows("rewind")
    assert (row["iteration"], row["bad_iteration"], row["iterations"]) == (5, 7, [7, 7])
    assert any(
        "went back to iteration 5; iterations 7 to 7, samples 48" in record.getMessage() for record in caplog.records
    )


def test_rewind_before_the_first_checkpoint_passes_the_iteration_over(start, reference, caplog):
    with caplog.at_level(logging.WARNING):
        run = start({"nan": [17]}, *REWIND)
    expected = reference({**PASSED_OVER_7, "first_sample": 16, "last_sample": 23})
    assert run.metrics() == expected.metrics() and [bad["policy"] for bad in run.record()] == ["skip"]
    assert any("there is no checkpoint yet to go back to" in record.getMessage() for record in caplog.records)


def test_rewind_twice_to_the_same_checkpoint_passes_both_spans_over(start, reference):
    run = start({"nan": [50, 72]}, *REWIND)
    expected = reference(PASSED_OVER_7, {**PASSED_OVER_7, "first_sample": 72, "last_sample": 79})
    assert run.metrics() == expected.metrics() and [bad["iteration"] for bad in run.record()] == [7, 10]


def test_rewind_between_reports_leaves_no_trace_in_the_next(start, reference):
    # The checkpoint of iteration 5 lies between the rows of 4 and 8.
    every = ("--log.interval", "4")
    rewound, expected = start(NAN_IN_7, *REWIND, *every).metrics(), reference(PASSED_OVER_7, overrides=every).metrics()
    assert rewound == expected and list(expected) == [4, 8, 12]


def test_rewind_takes_back_the_losses_that_a_spike_is_measured_against(start):
    # Iterations 16 and 17 are done again: were their losses kept, the window would be another.
    faults = {"spike": [130], "nan": [140]}
    rewound = start(faults, *REWIND, *SPIKES, iterations=20, name="rewound")
    skipped = start(faults, *SKIP, *SPIKES, iterations=20, name="skipped")
    told = [[(bad["iteration"], bad["reason"]) for bad in run.record()] for run in (rewound, skipped)]
    assert told[0] == told[1] and len(told[0]) == 2


# --- restarts -------------------------------------------------------------------------------------------------


def test_rows_of_a_run_that_stopped_between_two_are_those_of_an_undisturbed_one(start):
    every = ("--log.interval", "5")
    straight = start(NO_FAULT, *every, name="straight")
    for last in ("7", "8"):
        start(NO_FAULT, *every, "--train.exit_iters", last)
    assert start(NO_FAULT, *every).metrics() == straight.metrics()
    assert list(straight.metrics()) == [5, 10]


def test_iterations_after_the_last_row_are_in_the_next_when_the_run_is_continued(start):
    every = ("--log.interval", "5")
    straight = start(NO_FAULT, *every, name="straight", iterations=15)
    start(NO_FAULT, *every, iterations=12)
    assert start(NO_FAULT, *every, iterations=15).metrics() == straight.metrics()


@pytest.mark.parametrize("die", ["before record", "after record"])
@pytest.mark.parametrize("policy", [SKIP, REWIND])
def test_kill_around_the_record_neither_forgets_nor_counts_twice(policy, die, start, reference, tmp_path):
    with pytest.raises(Killed):
        start({**NAN_IN_7, "die": die}, *policy)
    run, expected = start(NAN_IN_7, *policy), reference(PASSED_OVER_7)
    assert len(run.record()) == 1
    assert run.metrics() == expected.metrics() and equal(run.tensors(12), expected.tensors(12))


def test_iteration_that_was_skipped_is_skipped_again_after_a_restart(start, reference):
    first = start(NAN_IN_7, *SKIP, "--train.exit_iters", "8")
    shutil.rmtree(first.run_dir / "checkpoints" / "iter_0000008")  # so that 7 comes again
    run = start(NAN_IN_7, *SKIP)
    assert len(run.record()) == len(run.rows("skip")) == 1
    assert run.metrics() == reference(PASSED_OVER_7).metrics()


def test_spike_is_judged_the_same_whether_or_not_a_restart_came_between(start):
    straight = start(SPIKE_IN_17, *SKIP, *SPIKES, iterations=20, name="straight")
    start(SPIKE_IN_17, *SKIP, *SPIKES, "--train.exit_iters", "12", iterations=20, name="parted")
    parted = start(SPIKE_IN_17, *SKIP, *SPIKES, iterations=20, name="parted")
    assert parted.record() == straight.record() and len(straight.record()) == 1
    assert parted.metrics() == straight.metrics()


def test_record_that_cannot_be_written_stops_the_run(start, monkeypatch, tmp_path):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bad_iterations, "write_whole", full)
    with pytest.raises(TrainingError, match=r"skipped\.json: cannot be written \(No space left on device\)"):
        start(NAN_IN_7, *SKIP)
    assert Trained(tmp_path / "run").rows("skip") == []


def test_damaged_record_is_refused(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.json").write_text('{"format": 1, "bad_iterations": [{"iter')
    with pytest.raises(DataError, match=r"skipped\.json: damaged .* Put a copy back, or remove it"):
        start(NO_FAULT)


# --- no fault -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [SKIP, REWIND])
def test_run_without_faults_is_the_same_with_each_policy(policy, start):
    stop, other = start(NO_FAULT, name="stop"), start(NO_FAULT, *policy, *SPIKES, name="other")
    assert other.metrics() == stop.metrics() and equal(other.tensors(12), stop.tensors(12))
