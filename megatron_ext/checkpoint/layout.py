"""Checkpoint directories on disk: names, wholeness, publication, retention. Standard library only.

    RUN/checkpoints/
      latest                 name of the newest whole checkpoint, written last
      iter_0001000/          whole: published by one rename, after `megapints.json` was written inside
      iter_0002000.tmp/      being written, or left behind by a run that died; never read

A directory is whole when it carries the published name and every file that its `megapints.json`
lists is there with the size listed. The `latest` file is a convenience for people; what is loaded is decided
by looking at the directories themselves.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.durable import flush, write_whole
from megatron_ext.errors import CheckpointError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
DESCRIPTION = "megapints.json"
FORMAT = 1
_PUBLISHED = re.compile(r"iter_(\d{7,})\Z")


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """What `megapints.json` says of a checkpoint: enough to use it without megatron or a config file."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    model: dict[str, Any]
    """`dataclasses.asdict` of the ModelConfig."""
    config: dict[str, Any]
    """`dataclasses.asdict` of the whole Config; empty where the weights came from elsewhere."""
    optimizer_format: str | None
    """`distrib_optim_sharding_type` of the optimizer state; None: weights only."""
    tokenizer_sha256: str | None
    topology: dict[str, int]
    """Degrees that it was saved at."""


class Rejected(NamedTuple):
    """A directory that looks like a checkpoint but is not a whole one."""

    path: Path
    reason: str


class Found(NamedTuple):
    """The newest whole checkpoint of a run, and the newer ones that were passed over."""

    path: Path | None
    rejected: tuple[Rejected, ...]


def directory_name(iteration: int) -> str:
    """Name the directory of an iteration's checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int | None:
    """Read the iteration from a published directory's name; None for any other name."""
    match = _PUBLISHED.match(path.name)
    return int(match.group(1)) if match else None


def temporary_path(checkpoints: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it is published."""
    return checkpoints / f"{directory_name(iteration)}.tmp"


def prepare_temporary(checkpoints: Path, iteration: int) -> Path:
    """Make the empty directory that a save writes into, clearing what a dead run left there. One rank calls it."""
    path = temporary_path(checkpoints, iteration)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def publish(temporary: Path, description: CheckpointDescription) -> Path:
    """Turn a fully written temporary directory into a whole checkpoint, and point `latest` at it. One rank calls it.

    Every file is flushed to disk, then listed with its size in `megapints.json`, then the directory
    is renamed. A crash at any moment leaves either the temporary name or a whole checkpoint.

    Returns:
        The published path. An earlier checkpoint of the same iteration is replaced.
    """
    sizes: dict[str, int] = {}
    for file in sorted(p for p in temporary.rglob("*") if p.is_file() and p.name != DESCRIPTION):
        sizes[file.relative_to(temporary).as_posix()] = file.stat().st_size
        flush(file)
    body = {"format": FORMAT, **vars(description), "files": sizes}
    write_whole(temporary / DESCRIPTION, json.dumps(body, indent=1) + "\n")
    published = temporary.with_suffix("")
    if published.exists():
        replaced = published.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        published.rename(replaced)
        temporary.rename(published)
        shutil.rmtree(replaced)
    else:
        temporary.rename(published)
    flush(published.parent)
    write_whole(published.parent / LATEST, published.name + "\n")
    for left in published.parent.glob("iter_*.tmp"):
        if left.name < published.name:  # of a run that died; each would hold a whole checkpoint's disk space
            shutil.rmtree(left, ignore_errors=True)
    return published


def read_description(path: Path) -> CheckpointDescription:
    """Read `megapints.json` of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    file = path / DESCRIPTION
    try:
        body = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not a megapints checkpoint (no {DESCRIPTION}); give a run directory or one of its "
            f"{CHECKPOINTS}/iter_* directories."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}).") from None
    try:
        if body["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {body['format']}, this version reads {FORMAT}.")
        fields = {name: body[name] for name in CheckpointDescription.__dataclass_fields__}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged (missing {error}).") from None
    return CheckpointDescription(**fields)


def why_not_whole(path: Path) -> str | None:
    """Say why a directory is not a whole checkpoint; None when it is one."""
    if iteration_of(path) is None:
        return "it was never published (a save was interrupted)"
    try:
        read_description(path)
        files = json.loads((path / DESCRIPTION).read_text()).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{DESCRIPTION} is damaged (no list of files)"
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def find_newest(checkpoints: Path) -> Found:
    """Find the newest whole checkpoint under a `checkpoints` directory, and what newer directories were passed over."""
    if not checkpoints.is_dir():
        return Found(None, ())
    candidates = sorted(
        (p for p in checkpoints.iterdir() if p.is_dir() and p.name.startswith("iter_")),
        key=lambda p: (int("".join(c for c in p.name.split(".")[0] if c.isdigit()) or 0), iteration_of(p) is not None),
        reverse=True,
    )
    rejected: list[Rejected] = []
    for path in candidates:
        reason = why_not_whole(path)
        if reason is None:
            return Found(path, tuple(rejected))
        rejected.append(Rejected(path, reason))
    return Found(None, tuple(rejected))


def resolve(path: Path) -> Path:
    """Turn what a person gave (a run, its `checkpoints`, or one checkpoint) into one whole checkpoint directory.

    Raises:
        CheckpointError: nothing whole is there.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; give a run directory or one of its checkpoints.")
    if (path / DESCRIPTION).exists() or iteration_of(path) is not None:
        reason = why_not_whole(path)
        if reason is not None:
            raise CheckpointError(f"{path}: not a whole checkpoint: {reason}.")
        return path
    checkpoints = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found = find_newest(checkpoints)
    if found.path is None:
        detail = "; ".join(f"{r.path.name}: {r.reason}" for r in found.rejected)
        raise CheckpointError(f"{path}: holds no whole checkpoint{' (' + detail + ')' if detail else ''}.")
    return found.path


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint directory belongs to."""
    return checkpoint.parent.parent


def expired(iterations: Iterable[int], *, keep_last: int | None, keep_every: int | None) -> list[int]:
    """Pick the iterations whose checkpoints retention removes: all but the newest ones and the multiples."""
    if keep_last is None:
        return []
    ordered = sorted(iterations)
    return [
        iteration
        for iteration in ordered[: max(0, len(ordered) - keep_last)]
        if not (keep_every and iteration % keep_every == 0)
    ]


def apply_retention(checkpoints: Path, *, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Remove expired checkpoints. One rank calls it, and only after a newer one was published.

    Only whole checkpoints count towards `keep_last`, so a damaged one never displaces a good one.
    """
    whole = [p for p in checkpoints.iterdir() if iteration_of(p) is not None and why_not_whole(p) is None]
    by_iteration = {iteration_of(p) or 0: p for p in whole}
    removed = []
    for iteration in expired(by_iteration, keep_last=keep_last, keep_every=keep_every):
        path = by_iteration[iteration]
        doomed = path.with_suffix(".removed")
        path.rename(doomed)  # a half-removed directory must not look whole
        shutil.rmtree(doomed)
        removed.append(path)
    return removed
