"""What a run reports: log lines, metrics.jsonl, TensorBoard, Weights & Biases, a live display.

Only rank 0 reports. The one door to TensorBoard and wandb.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint.save_load import Published
from megatron_ext.config.load import to_toml
from megatron_ext.config.tree import Config
from megatron_ext.durable import write_whole
from megatron_ext.errors import ConfigError
from megatron_ext.model.flops import flops_per_token
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.launch import Job
from megatron_ext.training import restarts
from megatron_ext.training.bad_iterations import BadIteration
from megatron_ext.training.evaluate import EvalResult
from megatron_ext.training.state import StepResult, TrainState
from megatron_ext.training.stragglers import Straggler

_LOG = logging.getLogger(__name__)


class Rates(NamedTuple):
    """Speed over the iterations since the last report."""

    iteration_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    """Model FLOPs (causal attention, no recomputation counted), 1e12 per second and device."""
    mfu: float | None
    """tflops_per_gpu over the device's peak; None where the peak is not known."""


class Metrics:
    """Collects and writes the figures of a run. Every rank makes one."""

    def __init__(self, config: Config, run_dir: Path, *, rank: int, world_size: int, job: Job | None = None) -> None:
        self._config = config
        self._path = run_dir / restarts.METRICS
        self._job = Job() if job is None else job
        self._active = rank == 0
        self._world_size = world_size
        self._flops = flops_per_token(config.model, config.train.seq_length).total
        self._peak = config.log.peak_tflops or device.peak_bf16_tflops()
        self._since = self._last_iteration_end = 0.0
        self._iterations = self._tokens = 0
        self._stream: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._display: Any = None
        self._task: Any = None
        with groups.together():  # the others must not train on where rank 0 has no wandb, or cannot write
            if self._active:
                self._open(run_dir)

    def _open(self, run_dir: Path) -> None:
        restarts.end_cut_line(self._path)
        self._stream = self._path.open("a", buffering=1)
        if self._config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        if self._config.log.wandb_project is not None:
            self._wandb = _start_wandb(self._config, run_dir)

    def begin(self, state: TrainState) -> None:
        """Start the clock and the display."""
        self._reset()
        if not self._active:
            return
        self._write_start(state)
        wanted = self._config.log.progress
        from rich.console import Console

        console = Console()
        if wanted == "on" or (wanted == "auto" and console.is_terminal):
            self._display, self._task = _start_display(console, self._config, state)

    def _write_start(self, state: TrainState) -> None:
        """Say what started, and, where the run had been started before, what ended that and what it cost."""
        row = {"kind": "start", "world_size": self._world_size, "device": device.name(), "job": self._job.number}
        restart = restarts.find_restart(self._path, iteration=state.iteration, job=self._job, now=time.time())
        if restart is not None:
            _LOG.info("%s", restart)
            row |= {"restart": restart.number} | {k: v for k, v in restart._asdict().items() if k != "number"}
        self._write({name: value for name, value in row.items() if value is not None}, state)

    def count(self, state: TrainState, result: StepResult) -> None:
        """Take note of one iteration. Cheap: nothing is written."""
        self._last_iteration_end = time.perf_counter()
        self._iterations += 1
        if result.updated:
            self._tokens += result.tokens
        if self._display is not None:
            self._display.update(self._task, completed=state.iteration, loss=f"{result.loss:.4f}")

    def log_train(self, state: TrainState, result: StepResult) -> None:
        """Report the iterations since the last report: their mean loss and speed, and the last one's rates.

        Iterations that made no update have no share in the loss, nor in the tokens per second. The loss is that of all
        of them, also where the run was started again in between; the speed is that of this start's. Every rank calls
        it, because the state that a checkpoint holds goes on to the next report.
        """
        rates, loss = self._rates(), state.take_mean_loss()
        self._reset()
        if not self._active:
            return
        last = self._config.train.exit_iters or self._config.train.train_iters
        if loss is None:
            _LOG.info("iteration %d/%d | no update since the last report", state.iteration, last)
            return
        mfu = "" if rates.mfu is None else f" ({rates.mfu:.1%} MFU of {self._peak:g})"
        _LOG.info(
            "iteration %d/%d | loss %.4f | lr %.3e | grad norm %.3f | %.3g s/it | %s tokens/s | %s tokens/s/GPU | "
            "%.2f TFLOP/s%s | ETA %s",
            state.iteration, last, loss, result.lr, state.grad_norm, rates.iteration_seconds,
            f"{rates.tokens_per_second:,.0f}", f"{rates.tokens_per_second_per_gpu:,.0f}", rates.tflops_per_gpu, mfu,
            _duration((last - state.iteration) * rates.iteration_seconds),
        )  # fmt: skip
        row = {
            "kind": "train", "loss": loss, "lr": result.lr, "grad_norm": state.grad_norm,
            "global_batch_size": result.samples, **rates._asdict(),
        }  # fmt: skip
        memory = device.peak_memory_gib()
        if memory is not None:
            row["peak_memory_gib"] = memory
        self._write(row, state)

    def log_eval(self, state: TrainState, result: EvalResult) -> None:
        """Report a validation. Its time does not count as training time."""
        self.restart_clock()
        if not self._active:
            return
        tokens = f"{result.tokens:,}"
        _LOG.info("iteration %d | validation loss %.4f over %s tokens", state.iteration, result.loss, tokens)
        self._write({"kind": "valid", "loss": result.loss, "tokens": result.tokens}, state)

    def log_checkpoint(self, state: TrainState, published: Published) -> None:
        """Note that a checkpoint is whole now; with async_save, some iterations after the one that it is of."""
        if self._active:
            row = {"saved_iteration": published.progress.iteration, "seconds": published.blocking_seconds}
            self._write({"kind": "checkpoint", **row, "bytes": published.bytes}, state)

    def log_bad_iteration(self, state: TrainState, bad: BadIteration) -> None:
        """Note a bad iteration, and which samples are passed over; `state` is where the run goes on from."""
        if bad.policy == "rewind":
            self._reset()  # the time since the last report went into iterations that are done again
        if not self._active:
            return
        row = {
            "kind": bad.policy, "bad_iteration": bad.iteration, "reason": bad.reason,
            "iterations": [bad.first_iteration, bad.last_iteration], "first_sample": bad.first_sample,
            "last_sample": bad.last_sample, "source": bad.source,
        }  # fmt: skip
        self._write(row, state)

    def log_stragglers(self, state: TrainState, stragglers: Sequence[Straggler]) -> None:
        """Note the ranks that keep the others waiting. Comparing them does not count as training time."""
        self.restart_clock()
        if self._active:
            for straggler in stragglers:
                self._write({"kind": "straggler", **straggler._asdict()}, state)

    def log_replicas(self, state: TrainState, checksum: int) -> None:
        """Note that all replicas hold the same weights, and which. Comparing them does not count as training time."""
        self.restart_clock()
        if self._active:
            self._write({"kind": "replicas", "checksum": f"{checksum:016x}"}, state)

    def log_stop(self, state: TrainState, reason: str) -> None:
        """Report the end, and close everything."""
        if not self._active:
            return
        self._write({"kind": "stop", "reason": reason}, state)
        self.close()
        _LOG.info("stopped after iteration %d: %s", state.iteration, reason)

    def close(self) -> None:
        """Take the display down and close the files. Harmless when called twice."""
        if self._display is not None:
            self._display.stop()
            self._display = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _rates(self) -> Rates:
        device.synchronize()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tokens_per_second = self._tokens / seconds
        per_gpu = tokens_per_second / self._world_size
        tflops = per_gpu * self._flops / 1e12
        mfu = None if self._peak is None else tflops / self._peak
        return Rates(seconds / self._iterations, tokens_per_second, per_gpu, tflops, mfu)

    def _reset(self) -> None:
        self._iterations = self._tokens = 0
        self._since = self._last_iteration_end = time.perf_counter()

    def restart_clock(self) -> None:
        """Take the time since the last iteration ended out of the running measurement: it was not training."""
        self._since += time.perf_counter() - self._last_iteration_end
        self._last_iteration_end = time.perf_counter()

    def _write(self, row: dict[str, Any], state: TrainState) -> None:
        row = {
            **row,
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "time": time.time(),
        }
        self._stream.write(json.dumps(row) + "\n")
        kind = row["kind"]
        if kind not in ("train", "valid"):
            return
        scalars = {
            f"{kind}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("iteration", "time")
        }
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, state.iteration)
        if self._wandb is not None:
            self._wandb.log(scalars, step=state.iteration)


def _start_wandb(config: Config, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "log.wandb_project is set, but the wandb package is not installed; pip install wandb, or leave it out."
        ) from None
    return wandb.init(
        project=config.log.wandb_project,
        name=config.name,
        dir=str(run_dir),
        config={"toml": to_toml(config)},
        id=_wandb_id(run_dir),  # a resumed run goes on in the same one
        resume="allow",
    )


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12])
    return path.read_text()


def _start_display(console: Any, config: Config, state: TrainState) -> tuple[Any, Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    display = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    last = config.train.exit_iters or config.train.train_iters
    task = display.add_task(config.name, total=last, completed=state.iteration, loss="-")
    display.start()
    return display, task


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}:{rest:02d}" if days else f"{hours:02d}:{minutes:02d}:{rest:02d}"
