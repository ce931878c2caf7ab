"""What a run reports: rows, speeds, and what it says where something is unknown or missing."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.checkpoint.save_load import Progress, Published
from megatron_ext.errors import ConfigError
from megatron_ext.model.flops import flops_per_token
from megatron_ext.parallel import device
from megatron_ext.training import metrics as metrics_module
from megatron_ext.training.bad_iterations import BadIteration
from megatron_ext.training.evaluate import EvalResult
from megatron_ext.training.metrics import Metrics
from megatron_ext.training.state import StepResult, TrainState

pytestmark = pytest.mark.usefixtures("one_process")
WORLD_SIZE = 4
NAMES = (
    "kind iteration consumed_samples consumed_tokens loss lr grad_norm global_batch_size iteration_seconds "
    "tokens_per_second tokens_per_second_per_gpu tflops_per_gpu mfu time"
)


class Clock:
    """Stands where time.perf_counter is; tests turn it on by hand."""

    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Reporter:
    """A run that only reports: each iteration takes the seconds and has the loss that a test gives."""

    def __init__(self, metrics: Metrics, clock: Clock, run_dir: Path) -> None:
        self.metrics, self.clock, self.run_dir = metrics, clock, run_dir
        self.state = TrainState()
        metrics.begin(self.state)

    def iterate(self, *, loss: float = 2.0, seconds: float = 1.0, grad_norm: float = 0.5, updated: bool = True) -> None:
        self.clock.pass_(seconds)
        result = StepResult(loss=loss, grad_norm=grad_norm, lr=1e-3, samples=8, tokens=128, updated=updated)
        self.state.advance(result)
        self.metrics.count(self.state, result)
        self.result = result

    def log(self) -> dict[str, Any]:
        self.metrics.log_train(self.state, self.result)
        return self.rows("train")[-1]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


def bad_iteration(policy: Any) -> BadIteration:
    return BadIteration(
        iteration=8,
        reason="the loss is nan",
        policy=policy,
        first_iteration=7,
        last_iteration=8,
        first_sample=48,
        last_sample=63,
        source="a #1 to b #2",
    )


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module.time, "perf_counter", clock)
    return clock


@pytest.fixture
def start(tiny_config, tmp_path, clock) -> Iterator[Any]:
    opened: list[Metrics] = []

    def start(*overrides: str, rank: int = 0) -> Reporter:
        metrics = Metrics(tiny_config("--log.progress", "off", *overrides), tmp_path, rank=rank, world_size=WORLD_SIZE)
        opened.append(metrics)
        return Reporter(metrics, clock, tmp_path)

    yield start
    for metrics in opened:
        metrics.close()


# --- rows -----------------------------------------------------------------------------------------------------


def test_training_row_has_the_names_that_readers_rely_on(start):
    run = start()
    run.iterate()
    assert set(run.log()) >= set(NAMES.split())


def test_training_row_says_how_far_the_run_is(start):
    run = start()
    run.iterate()
    run.iterate()
    row = run.log()
    assert (row["iteration"], row["consumed_samples"], row["consumed_tokens"]) == (2, 16, 256)


def test_training_row_has_the_mean_loss_since_the_last(start):
    run = start()
    run.iterate(loss=9.0)
    run.log()
    for loss in (3.0, 1.0, 5.0):
        run.iterate(loss=loss)
    assert run.log()["loss"] == pytest.approx(3.0)


def test_training_row_leaves_out_iterations_that_made_no_update(start):
    run = start()
    run.iterate(loss=3.0)
    run.iterate(loss=math.nan, updated=False)
    run.iterate(loss=1.0)
    row = run.log()
    assert (row["loss"], row["grad_norm"], row["iteration"]) == (2.0, 0.5, 3)


def test_training_row_after_an_iteration_without_an_update_has_the_norm_of_the_last_update(start):
    run = start()
    run.iterate(loss=3.0)
    run.iterate(loss=math.nan, grad_norm=math.inf, updated=False)
    assert run.log()["grad_norm"] == 0.5


def test_training_row_after_a_restart_counts_the_updates_before_it(start):
    first, second = start(), start()
    first.iterate(loss=3.0, grad_norm=0.25)
    second.state.go_to(first.state.progress())
    second.iterate(loss=math.nan, updated=False)
    row = second.log()
    assert (row["loss"], row["grad_norm"], row["tokens_per_second"]) == (3.0, 0.25, 0.0)


def test_iterations_that_all_made_no_update_have_no_training_row(start):
    run = start()
    run.iterate(loss=math.nan, updated=False)
    run.metrics.log_train(run.state, run.result)
    assert run.rows("train") == []


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_bad_iteration_has_a_row_with_its_samples(policy, start):
    run = start()
    run.metrics.log_bad_iteration(run.state, bad_iteration(policy))
    (row,) = run.rows(policy)
    assert (row["iterations"], row["first_sample"], row["last_sample"]) == ([7, 8], 48, 63)
    assert (row["bad_iteration"], row["reason"], row["source"]) == (8, "the loss is nan", "a #1 to b #2")


def test_rewind_takes_back_what_was_counted(start):
    run = start()
    begun = run.state.progress()
    run.iterate(loss=9.0)
    run.state.go_to(begun)
    run.metrics.log_bad_iteration(run.state, bad_iteration("rewind"))
    run.iterate(loss=3.0)
    assert run.log()["loss"] == 3.0


def test_validation_row_has_its_loss_and_tokens(start):
    run = start()
    run.metrics.log_eval(run.state, EvalResult(loss=1.5, tokens=4096))
    (row,) = run.rows("valid")
    assert (row["loss"], row["tokens"]) == (1.5, 4096)


@pytest.mark.parametrize("kind", ["start", "checkpoint", "stop"])
def test_other_events_have_a_row_each(kind, start):
    run = start()
    run.metrics.log_checkpoint(run.state, Published(Progress(7, 70, 700), Path("iter_0000007"), 0.5, 2.0, 1000))
    run.metrics.log_stop(run.state, "finished")
    assert len(run.rows(kind)) == 1


def test_checkpoint_row_says_what_was_saved_and_what_it_cost(start):
    run = start()
    run.metrics.log_checkpoint(run.state, Published(Progress(7, 70, 700), Path("iter_0000007"), 0.5, 2.0, 1000))
    (row,) = run.rows("checkpoint")
    assert (row["saved_iteration"], row["seconds"], row["bytes"]) == (7, 0.5, 1000)


def test_row_is_on_disk_as_soon_as_it_is_logged(start):
    # A run that dies must not take its last rows with it.
    run = start()
    run.iterate()
    run.log()
    assert (run.run_dir / "metrics.jsonl").read_text().endswith("}\n")


def test_rows_of_a_resumed_run_follow_the_former_ones(start):
    for _ in range(2):
        run = start()
        run.iterate()
        run.log()
        run.metrics.close()
    assert len(run.rows("train")) == 2


def test_start_row_of_a_first_start_says_nothing_of_restarts(start):
    (row,) = start().rows("start")
    assert not {"restart", "reason", "lost_seconds", "redone_iterations"} & row.keys()


def test_start_row_of_a_restart_says_what_it_follows_and_cost(start, caplog):
    caplog.set_level(logging.INFO)
    first = start()
    first.iterate()
    first.log()
    row = start().rows("start")[-1]  # from iteration 0 again
    assert (row["restart"], row["redone_iterations"]) == (1, 1)
    assert row["reason"] == "ended without a word (killed or crashed)" and row["lost_seconds"] >= 0
    assert "restart 1 (after: ended without a word (killed or crashed); 1 iterations are trained again; " in caplog.text


def test_row_after_a_line_cut_short_is_on_a_line_of_its_own(start, tmp_path):
    whole = json.dumps({"kind": "train", "loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"kind": "tr')
    start()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == [whole, '{"kind": "tr'] and json.loads(lines[2])["kind"] == "start"


def test_row_after_whole_lines_follows_without_a_gap(start, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n')
    start()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_rank_writes_nothing(start, tmp_path):
    run = start(rank=1)
    run.iterate()
    run.metrics.log_train(run.state, run.result)
    run.metrics.log_eval(run.state, EvalResult(1.0, 1))
    run.metrics.log_stop(run.state, "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_closing_twice_does_no_harm(start):
    run = start()
    run.metrics.close()
    run.metrics.close()


# --- speed ----------------------------------------------------------------------------------------------------


def test_speed_is_tokens_over_seconds(start):
    run = start()
    run.iterate(seconds=3.0)
    run.iterate(seconds=1.0)
    row = run.log()
    assert (row["tokens_per_second"], row["iteration_seconds"]) == pytest.approx((256 / 4, 2.0))


def test_speed_of_one_device_is_its_share(start):
    run = start()
    run.iterate(seconds=2.0)
    assert run.log()["tokens_per_second_per_gpu"] == pytest.approx(128 / 2 / WORLD_SIZE)


def test_flops_are_those_of_the_tokens_of_one_device(start, tiny_config):
    run = start()
    run.iterate(seconds=2.0)
    per_token = flops_per_token(tiny_config().model, 16).total
    assert run.log()["tflops_per_gpu"] == pytest.approx(128 / 2 / WORLD_SIZE * per_token / 1e12)


def test_speed_counts_only_the_iterations_since_the_last_row(start):
    run = start()
    run.iterate(seconds=100.0)
    run.log()
    run.iterate(seconds=2.0)
    assert run.log()["tokens_per_second"] == pytest.approx(64)


def test_speed_leaves_the_time_of_a_validation_out(start):
    run = start()
    run.iterate(seconds=2.0)
    run.clock.pass_(50.0)
    run.metrics.log_eval(run.state, EvalResult(1.0, 1))
    run.iterate(seconds=2.0)
    assert run.log()["tokens_per_second"] == pytest.approx(64)


def test_speed_leaves_the_time_of_a_checkpoint_out(start):
    run = start()
    run.iterate(seconds=2.0)
    run.clock.pass_(50.0)
    run.metrics.restart_clock()
    run.iterate(seconds=2.0)
    assert run.log()["tokens_per_second"] == pytest.approx(64)


def test_speed_leaves_a_validation_and_a_checkpoint_in_a_row_out(start):
    run = start()
    run.iterate(seconds=2.0)
    run.log()
    run.clock.pass_(50.0)
    run.metrics.log_eval(run.state, EvalResult(1.0, 1))
    run.clock.pass_(30.0)
    run.metrics.restart_clock()
    run.iterate(seconds=2.0)
    assert run.log()["tokens_per_second"] == pytest.approx(64)


def test_speed_counts_the_time_between_iterations(start):
    # Waiting for data is part of an iteration.
    run = start()
    run.iterate(seconds=2.0)
    run.clock.pass_(2.0)
    run.iterate(seconds=4.0)
    assert run.log()["tokens_per_second"] == pytest.approx(256 / 8)


# --- utilisation ----------------------------------------------------------------------------------------------


def test_unknown_device_has_no_mfu(start, monkeypatch):
    monkeypatch.setattr(device, "peak_bf16_tflops", lambda: None)
    run = start()
    run.iterate()
    assert run.log()["mfu"] is None


def test_line_on_an_unknown_device_says_nothing_of_mfu(start, monkeypatch, caplog):
    monkeypatch.setattr(device, "peak_bf16_tflops", lambda: None)
    caplog.set_level(logging.INFO)
    run = start()
    run.iterate()
    run.log()
    assert "TFLOP/s | ETA" in caplog.text and "MFU" not in caplog.text


def test_mfu_is_the_share_of_the_devices_peak(start, monkeypatch):
    monkeypatch.setattr(device, "peak_bf16_tflops", lambda: 989.0)
    run = start()
    run.iterate()
    row = run.log()
    assert row["mfu"] == pytest.approx(row["tflops_per_gpu"] / 989.0)


def test_peak_given_takes_the_place_of_the_devices(start, monkeypatch):
    monkeypatch.setattr(device, "peak_bf16_tflops", lambda: 989.0)
    run = start("--log.peak_tflops", "10")
    run.iterate()
    row = run.log()
    assert row["mfu"] == pytest.approx(row["tflops_per_gpu"] / 10.0)


def test_line_states_the_peak_that_mfu_is_of(start, caplog):
    caplog.set_level(logging.INFO)
    run = start("--log.peak_tflops", "10")
    run.iterate()
    run.log()
    assert "MFU of 10)" in caplog.text


@pytest.mark.parametrize(
    ("iterations", "seconds", "eta"), [(3, 1.0, "00:00:02"), (1, 1000.0, "01:06:40"), (1, 50_000.0, "2d 07:33:20")]
)
def test_line_says_when_the_run_will_end(iterations, seconds, eta, start, caplog):
    caplog.set_level(logging.INFO)
    run = start()  # of five iterations
    for _ in range(iterations):
        run.iterate(seconds=seconds)
    run.log()
    assert caplog.text.rstrip().endswith(f"ETA {eta}")


# --- other readers --------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_loss_by_iteration(start, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = start("--log.tensorboard", "true")
    for loss in (3.0, 2.0):
        run.iterate(loss=loss)
        run.log()
    run.metrics.close()
    accumulator = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]


def test_tensorboard_switched_off_leaves_no_folder(start, tmp_path):
    start("--log.tensorboard", "false")
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """A stand-in that notes what it is told."""
    told = SimpleNamespace(settings=None, logged=[], finished=0)

    def init(**settings: Any) -> SimpleNamespace:
        told.settings = settings
        return SimpleNamespace(
            log=lambda scalars, step: told.logged.append((step, scalars)),
            finish=lambda: setattr(told, "finished", told.finished + 1),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_wandb_gets_the_scalars_by_iteration(start, wandb):
    run = start("--log.wandb_project", "pints")
    run.iterate(loss=3.0)
    run.log()
    ((step, scalars),) = wandb.logged
    assert (step, scalars["train/loss"], scalars["train/lr"]) == (1, 3.0, 1e-3)


def test_wandb_writes_into_the_run_directory(start, wandb, tmp_path):
    start("--log.wandb_project", "pints")
    assert (wandb.settings["project"], wandb.settings["dir"]) == ("pints", str(tmp_path))


def test_wandb_is_finished_once(start, wandb):
    run = start("--log.wandb_project", "pints")
    run.metrics.log_stop(run.state, "finished")
    run.metrics.close()
    assert wandb.finished == 1


def test_wandb_that_is_not_asked_for_is_not_imported(start, wandb):
    start()
    assert wandb.settings is None


def test_wandb_that_is_not_installed_is_refused(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.wandb_project is set, but the wandb package is not installed"):
        start("--log.wandb_project", "pints")


def test_wandb_offline_needs_no_network(start, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = start("--log.wandb_project", "pints")
    run.iterate()
    run.log()
    run.metrics.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
