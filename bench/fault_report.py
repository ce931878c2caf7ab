"""What a fault campaign proves: the disturbed run against the undisturbed one, and both as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.dcp import CheckpointReader
from megatron_ext.training.samples_log import read_history

FIGURES = ("loss", "grad_norm", "lr", "consumed_samples", "consumed_tokens")
HEADER = (
    "| # | launcher | save | killed | while | after iteration | rest gone after | goes on from | redone | verdict |",
    "|--:|----------|------|--------|-------|----------------:|----------------:|-------------:|-------:|---------|",
)


class Comparison(NamedTuple):
    """The disturbed run against the undisturbed one; each list is empty where they are the same."""

    iterations: int
    samples: int
    """Samples trained on."""
    tensors: int
    """Tensors of the last checkpoint: parameters and optimizer."""
    differing_iterations: list[int]
    """Iterations that were trained on other samples."""
    out_of_order: list[int]
    """Places of the sequence of samples that do not hold their own number: lost, repeated or exchanged samples."""
    differing_metrics: list[int]
    """Iterations with other figures, in any of the times that they were made."""
    differing_tensors: list[str]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not any((self.differing_iterations, self.out_of_order, self.differing_metrics, self.differing_tensors))


def compare(run: Path, undisturbed: Path, *, last: int) -> Comparison:
    """Compare what two runs were trained on, what they reported, and what they saved last, bit for bit."""
    histories = [read_history(folder) for folder in (run, undisturbed)]
    ours, theirs = ({number: samples for number, samples in history} for history in histories)
    sequence = [sample.k for _, samples in histories[0] for sample in samples]
    figures, expected = _figures(run), _figures(undisturbed)
    name = layout.directory_name(last)
    readers = [CheckpointReader(folder / layout.CHECKPOINTS / name) for folder in (run, undisturbed)]
    return Comparison(
        iterations=len(histories[0]),
        samples=len(sequence),
        tensors=len(readers[1].tensors),
        differing_iterations=[number for number in range(1, last + 1) if _differ(ours, theirs, number)],
        out_of_order=[place for place, k in enumerate(sequence) if place != k],
        differing_metrics=[number for number in range(1, last + 1) if _differ(figures, expected, number)],
        differing_tensors=_differing_tensors(*readers),
    )


def _differ(ours: Mapping[int, Any], theirs: Mapping[int, Any], number: int) -> bool:
    return number not in ours or number not in theirs or ours[number] != theirs[number]


def _figures(run: Path) -> dict[int, set[tuple[float, ...]]]:
    """Read the figures of each iteration: one that was made several times must have the same each time."""
    found: dict[int, set[tuple[float, ...]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a crash cut it short
            continue
        if row["kind"] == "train":
            found.setdefault(row["iteration"], set()).add(tuple(row[name] for name in FIGURES))
    return found


def _differing_tensors(ours: CheckpointReader, theirs: CheckpointReader) -> list[str]:
    differing = sorted(ours.tensors.keys() ^ theirs.tensors.keys())
    return differing + [
        key
        for key in sorted(ours.tensors.keys() & theirs.tensors.keys())
        if ours.tensors[key] != theirs.tensors[key] or not torch.equal(ours.read(key), theirs.read(key))
    ]


def held(result: Mapping[str, Any]) -> bool:
    """Say whether every start came up, every kill was survived, and nothing differs."""
    comparison = result["comparison"]
    return (
        not result["problems"]
        and not any(found["problems"] for found in result["kills"])
        and comparison is not None
        and Comparison(**comparison).equal
    )


def line(found: Mapping[str, Any]) -> str:
    """Put a kill into a line of the table."""
    after = "-" if found["iteration"] is None else found["iteration"]
    ended = found["ended_seconds"]
    gone = "-" if ended is None else f"{ended + found['leftover_seconds']:.1f} s"
    save = "async" if found["async_save"] else "sync"
    verdict = "; ".join(found["problems"]) or "ok"
    return (
        f"| {found['number']} | {found['launcher']} | {save} | {found['killed']} | {found['phase']} | {after} | {gone} "
        f"| {found['resumes_from']} | {found['redone_iterations']} | {verdict} |"
    )


def report(result: Mapping[str, Any]) -> str:
    """Describe the campaign in Markdown."""
    kills = result["kills"]
    lines = [*HEADER, *map(line, kills), ""]
    phases = Counter(found["phase"] for found in kills)
    lines.append(f"{len(kills)} kills in {result['seconds'] / 60:.0f} min (seed {result['seed']}): "
                 + ", ".join(f"{count} {phase}" for phase, count in phases.most_common()) + ".")  # fmt: skip
    redone = sum(found["redone_iterations"] for found in kills)
    failed = sum(bool(found["problems"]) for found in kills)
    lines.append(f"{failed} of them not survived as they should be; {redone} iterations made again.")
    lines += [f"Problem: {problem}." for problem in result["problems"]]
    if result["comparison"] is not None:
        lines.append(_describe(Comparison(**result["comparison"])))
    lines.append("Everything held." if held(result) else "It did NOT hold.")
    return "\n".join(lines)


def _describe(found: Comparison) -> str:
    return (
        f"Against the undisturbed run, over {found.iterations} iterations: {found.samples} samples, "
        f"{len(found.differing_iterations)} iterations with others and {len(found.out_of_order)} out of order; "
        f"{len(found.differing_metrics)} iterations with other metrics; {len(found.differing_tensors)} of "
        f"{found.tensors} tensors differ."
    )
