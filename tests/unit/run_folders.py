"""Run directories for the tests of what watches runs: rows as the trainer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGAN = 1_700_000_000.0
SAMPLES, TOKENS = 8, 128
"""Of one iteration."""


def row(kind: str, iteration: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A row as it stands in metrics.jsonl, `seconds` after the first start."""
    place = {"iteration": iteration, "consumed_samples": SAMPLES * iteration, "consumed_tokens": TOKENS * iteration}
    return {"kind": kind, **more, **place, "time": BEGAN + seconds}


def start(iteration: int, seconds: float, **more: Any) -> dict[str, Any]:
    return row("start", iteration, seconds, **({"world_size": 2, "device": "CPU"} | more))


def train(iteration: int, seconds: float, loss: float | None = 4.0, **more: Any) -> dict[str, Any]:
    figures = {
        "loss": loss, "lr": 4e-4, "grad_norm": 0.5, "global_batch_size": SAMPLES, "iteration_seconds": 2.0,
        "tokens_per_second": 64.0, "tokens_per_second_per_gpu": 32.0, "tflops_per_gpu": 0.25, "mfu": None,
    }  # fmt: skip
    return row("train", iteration, seconds, **(figures | more))


def valid(iteration: int, seconds: float, loss: float) -> dict[str, Any]:
    return row("valid", iteration, seconds, loss=loss, tokens=256)


def stop(iteration: int, seconds: float, reason: str) -> dict[str, Any]:
    return row("stop", iteration, seconds, reason=reason)


def write_run(
    folder: Path, rows: list[dict[str, Any]], *, tail: str = "", train_iters: int = 100, log: str = ""
) -> Path:
    """Make a run directory of these rows; `tail` follows the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + tail)
    (folder / "config.toml").write_text(
        f'name = "{folder.name}"\n\n[train]\ntrain_iters = {train_iters}\nexit_iters = "none"\n'
    )
    if log:
        (folder / "log.txt").write_text(log)
    return folder


def write_checkpoint(folder: Path, iteration: int, size: int = 1000) -> Path:
    """Put a checkpoint into a run directory, whole by the rules of checkpoint/layout.py."""
    path = folder / "checkpoints" / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(size))
    fields = {
        "format": 1, "iteration": iteration, "consumed_samples": SAMPLES * iteration,
        "consumed_tokens": TOKENS * iteration, "model": {}, "config": {}, "optimizer_format": None,
        "tokenizer_sha256": None, "topology": {}, "files": {"weights": size},
    }  # fmt: skip
    (path / "megapints.json").write_text(json.dumps(fields))
    return path
