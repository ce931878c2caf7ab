"""Show and keep what bench/gpu.py measures: a line per configuration, a table, ratios, a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.training.provenance import code_revision

_COLUMNS = (
    "implementation",
    "precision",
    "mbs",
    "x",  # micro batches per iteration
    "ms/iter",
    "tokens/s",
    "TFLOP/s",
    "MFU",
    "/matmul",  # share of a plain matrix product's TFLOP/s
    "GiB",
    "MHz",
)


class Report:
    """Prints each result, keeps them, and writes them down after each."""

    def __init__(self, command: list[str], output: Path | None) -> None:
        self.results: list[dict[str, Any]] = []
        self._command = ["python", "bench/gpu.py", *command]
        self._output = output
        if output is not None:
            self._write()

    def add(self, result: dict[str, Any]) -> None:
        """Take the result of a case."""
        self.results.append(result)
        print(describe(result), flush=True)
        if self._output is not None:
            self._write()

    def summary(self) -> str:
        """Draw the table of all results, and the ratios between the best of each series."""
        parts = [table(self.results)]
        ratio = fp8_ratio(self.results)
        if ratio is not None:
            parts.append(f"best fp8 / best bf16 (transformer_engine): {ratio:.3f} x tokens/s")
        machines = [row["machine"] for row in self.results if "machine" in row]
        if machines:
            parts.append(", ".join(f"{name} {value}" for name, value in machines[0].items()))
        return "\n\n".join(["", *parts])

    def _write(self) -> None:
        assert self._output is not None
        content = {
            "command": self._command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_revision": code_revision(Path(__file__).resolve().parents[1]),
            "results": self.results,
        }
        aside = self._output.with_name(self._output.name + ".partial")
        try:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.replace(self._output)
        except OSError as error:
            raise ConfigError(f"--output {self._output}: cannot be written ({error.strerror}).") from None


def describe(result: dict[str, Any]) -> str:
    """Say in a line or more what came of one configuration."""
    if result["status"] != "ok":
        log = "\n".join(f"    | {line}" for line in result.get("log", []))
        return f"  {result['status']}: {result['reason']}" + (f"\n{log}" if log else "")
    ratio = "" if result["matmul_ratio"] is None else f", {result['matmul_ratio']:.3f} of a matrix product"
    line = (
        f"  {result['tokens_per_second']:,.0f} tokens/s, {result['tflops']:.3g} TFLOP/s{ratio}, "
        f"{1000 * result['step_seconds']['median']:.1f} ms per iteration, loss {result['losses'][-1]:.3f}"
    )
    return line if result["profile"] is None else f"{line}\n{_describe_profile(result['profile'])}"


def _describe_profile(profile: dict[str, Any]) -> str:
    gap = profile["host_gap"]
    lines = [f"  trace {profile['trace']}"]
    if gap is not None:
        lines.append(f"  host gap: no kernel runs in {gap:.1%} of an iteration")
    lines += [f"    {row['milliseconds']:9.3f} ms {row['share']:6.1%}  {row['name']}" for row in profile["kinds"]]
    lines.append("    slowest, per iteration:")
    lines += [
        f"    {row['milliseconds']:9.3f} ms {row['share']:6.1%} {row['calls']:6.0f} x  {row['name'][:90]}"
        for row in profile["top"]
    ]
    return "\n".join(lines)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lay the results out in columns; one that gave no figures says why in place of them."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for result in results:
        case = result["case"]
        start = (case["implementation"], result["precision"], str(case["micro_batch_size"]))
        if result["status"] != "ok":
            rows.append((*start, "", f"{result['status']}: {result['reason']}"[:70]))
            continue
        clocks = result["clocks"] or {}
        rows.append((
            *start, str(result["num_microbatches"]), f"{1000 * result['step_seconds']['median']:.1f}",
            f"{result['tokens_per_second']:,.0f}", f"{result['tflops']:.4g}", _or_dash(result["mfu"], ".1%"),
            _or_dash(result["matmul_ratio"], ".3f"), _or_dash(result["peak_memory_gib"], ".1f"),
            _or_dash(clocks.get("sm_mhz"), ".0f"),
        ))  # fmt: skip
    measured = [row for row in rows if len(row) == len(_COLUMNS)]
    widths = [max(len(row[column]) for row in measured) for column in range(len(_COLUMNS))]
    for row in rows:
        widths[:3] = [max(width, len(cell)) for width, cell in zip(widths[:3], row[:3], strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 or len(row) < len(_COLUMNS) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def fp8_ratio(results: Sequence[dict[str, Any]]) -> float | None:
    """Compare the best FP8 with the best bf16 of Transformer Engine by tokens/s; None without both."""
    best: dict[str, float] = {}
    for result in results:
        case = result["case"]
        if result["status"] == "ok" and case["implementation"] == "transformer_engine":
            best[case["dtype"]] = max(best.get(case["dtype"], 0.0), result["tokens_per_second"])
    return best["fp8"] / best["bf16"] if {"fp8", "bf16"} <= best.keys() else None


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
