"""Checkpoint directories on disk: names, wholeness, publication. What is removed: removal.py. No torch.

    RUN/checkpoints/
      latest                 name of the newest whole checkpoint, written last
      iter_0001000/          whole: published by one rename, after `megapints.json` was written inside
      iter_0002000.START.tmp/    being written, or left behind by a start that died; never read
      iter_0001000.replaced/     had the name until another one of the same iteration was published
      iter_0000500.removed/      expired, and being removed

A directory is whole when it carries the published name and every file that its `megapints.json`
lists is there with the size listed. Before anything is taken from it, the files' digests are compared too, which
means reading them (digests.py). The `latest` file is a convenience for people; what is loaded is decided
by looking at the directories themselves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.checkpoint import digests
from megatron_ext.checkpoint.digests import FileRecord
from megatron_ext.durable import flush, write_whole
from megatron_ext.errors import CheckpointError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
DESCRIPTION = "megapints.json"
FORMAT = 1
REMOVED = ".removed"
REPLACED = ".replaced"
_LOG = logging.getLogger(__name__)
_OWN_DIGEST = "own_digest"
_FLUSHED_TOGETHER = 4  # small files share one commit of the file system's journal
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
    weights: dict[str, Any] | None = None
    """Checksum of the weights (`sum`, of sharded.py) and their `types`; None where it was not taken."""
    recent_losses: tuple[float, ...] = ()
    """What the next loss is measured against, newest last; none where spikes were not looked for."""
    unreported_updates: int = 0
    """Updates since the last row of metrics; the next one says their mean loss. 0 where this was not kept."""
    unreported_loss_sum: float = 0.0
    """Of their losses."""
    grad_norm: float = 0.0
    """Of the newest update."""


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


def temporary_path(checkpoints: Path, iteration: int, start: str = "") -> Path:
    """Where a checkpoint is written before it is published.

    `start` tells the starts of a run apart: a rank of a dead one whose node was only cut off, and which goes on, must
    not write into what its successor is writing.
    """
    return checkpoints / f"{directory_name(iteration)}{'.' if start else ''}{start}.tmp"


def published_path(checkpoints: Path, iteration: int) -> Path:
    """Where a checkpoint is when it is whole."""
    return checkpoints / directory_name(iteration)


def prepare_temporary(checkpoints: Path, iteration: int, start: str = "") -> Path:
    """Make the empty directory that a save writes into, clearing what a dead run left there. One rank calls it."""
    for left in checkpoints.glob(f"{directory_name(iteration)}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # a rank that was cut off may add to it while it is removed
    path = temporary_path(checkpoints, iteration, start)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def publish(
    temporary: Path, description: CheckpointDescription, written: Mapping[str, FileRecord] | None = None
) -> Path:
    """Turn a fully written temporary directory into a whole checkpoint, and point `latest` at it. One rank calls it.

    Every file is on the disk, then listed with its size and digest in `megapints.json`, then the directory
    is renamed. A crash at any moment leaves either the temporary name or a whole checkpoint. What fails after the
    rename is told, and no more: the checkpoint is whole.

    Args:
        temporary: the directory.
        description: what to say of it.
        written: files that were digested and flushed by those who wrote them; the others are read for it here.

    Returns:
        The published path. An earlier checkpoint of the same iteration is replaced; a start that dies between its
        two renames is made good by the next (removal.put_back_replaced).

    Raises:
        CheckpointError: a file is not there as it was written.
        OSError: something could not be written or renamed; an earlier checkpoint has its name still.
    """
    records = dict(written or {})
    for name, record in records.items():
        _check_written(temporary / name, record)
    others = [p for p in temporary.rglob("*") if p.is_file() and p.name != DESCRIPTION]
    names = [name for name in (p.relative_to(temporary).as_posix() for p in others) if name not in records]
    with ThreadPoolExecutor(_FLUSHED_TOGETHER) as pool:
        records |= zip(names, pool.map(lambda name: _flush_and_digest(temporary / name), names), strict=True)
    write_whole(temporary / DESCRIPTION, _describe(description, records))
    published = temporary.with_name(temporary.name.partition(".")[0])
    _take_name(temporary, published)
    _put_in_order(published)
    return published


def _take_name(temporary: Path, published: Path) -> None:
    """Rename, and put aside what has the name already; it gets it back where that fails."""
    replaced = published.with_suffix(REPLACED)
    taken = os.path.lexists(published)
    if taken:
        with contextlib.suppress(OSError):
            discard(replaced)
        published.rename(replaced)
    try:
        temporary.rename(published)
    except OSError:
        if taken:
            with contextlib.suppress(OSError):  # the first error says more; the next start tries again
                replaced.rename(published)
        raise


def _put_in_order(published: Path) -> None:
    """Make a new checkpoint's name last, point `latest` at it, and remove what it makes superfluous."""
    replaced = published.with_suffix(REPLACED)
    with told(published.parent, "cannot be flushed or cleared"):
        flush(published.parent)  # before the one that it replaces goes
        if os.path.lexists(replaced):
            # Half-removed, it must never get its name back.
            discard(replaced.rename(published.with_suffix(REMOVED)))
    with told(published.parent / LATEST, "cannot be written"):
        write_whole(published.parent / LATEST, published.name + "\n")
    with told(published.parent, "cannot be cleared"):
        for left in published.parent.glob("iter_*.tmp"):
            # Of a start that died; each would hold a whole checkpoint's disk space.
            if left.name.partition(".")[0] <= published.name:
                shutil.rmtree(left, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a directory, or whatever stands in its place; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def told(path: Path, what: str) -> Iterator[None]:
    """Make an OSError a warning: the run has a whole checkpoint, and no reason to end."""
    try:
        yield
    except OSError as error:
        _LOG.warning("%s: %s (%s)", path, what, error.strerror or error)


def _flush_and_digest(file: Path) -> FileRecord:
    flush(file)
    return digests.of_file(file)


def _check_written(file: Path, record: FileRecord) -> None:
    try:
        with file.open("rb") as stream:  # opening it makes a network file system look again
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise CheckpointError(
            f"{file}: was written, but is not there for rank 0 ({error.strerror}); all nodes must share run_dir."
        ) from None
    if size != record.size:
        raise CheckpointError(
            f"{file}: {record.size} bytes were written, {size} are there; all nodes must share run_dir."
        )


def _describe(description: CheckpointDescription, records: Mapping[str, FileRecord]) -> str:
    body = {
        "format": FORMAT,
        **vars(description),
        "files": {name: records[name].size for name in sorted(records)},
        "digests": {
            "algorithm": digests.ALGORITHM,
            "files": {name: records[name].digest for name in sorted(records)},
        },
    }
    return json.dumps(body | {_OWN_DIGEST: _own_digest(body)}, indent=1) + "\n"


def _own_digest(body: dict[str, Any]) -> str:
    return digests.of_text(json.dumps(body, sort_keys=True))


def read_description(path: Path) -> CheckpointDescription:
    """Read `megapints.json` of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    body = _read_body(path)
    try:
        found = {
            field.name: body[field.name] if field.default is MISSING else body.get(field.name, field.default)
            for field in fields(CheckpointDescription)
        }
    except KeyError as error:
        raise CheckpointError(f"{path / DESCRIPTION}: damaged (missing {error}).") from None
    return CheckpointDescription(**found | {"recent_losses": tuple(found["recent_losses"])})  # JSON has no tuples


def read_digests(path: Path) -> dict[str, FileRecord] | None:
    """Read what each file of a checkpoint directory was when it was written; None: it was saved without digests.

    Raises:
        CheckpointError: `megapints.json` is missing or damaged, or the digests are of a kind that is not known here.
    """
    body = _read_body(path)
    found = body.get("digests")
    if found is None:
        return None
    if found["algorithm"] != digests.ALGORITHM:
        raise CheckpointError(
            f"{path / DESCRIPTION}: digests by {found['algorithm']}, this version knows {digests.ALGORITHM}."
        )
    return {name: FileRecord(size, found["files"][name]) for name, size in body["files"].items()}


def _read_body(path: Path) -> dict[str, Any]:
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
    if not isinstance(body, dict) or "format" not in body:
        raise CheckpointError(f"{file}: damaged (missing 'format').")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file}: format {body['format']}, this version reads {FORMAT}.")
    own = body.pop(_OWN_DIGEST, None)
    if own != (_own_digest(body) if own is not None or "digests" in body else None):
        raise CheckpointError(f"{file}: damaged (its content is not what was written).")
    return body


def why_not_whole(path: Path) -> str | None:
    """Say why a directory is not a whole checkpoint; None when it is one."""
    if iteration_of(path) is None:
        return "it was never published (a save was interrupted)"
    if (reason := _why_no_directory(path)) is not None:
        return reason
    try:
        read_description(path)
        files = _read_body(path).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{DESCRIPTION} is damaged (no list of files)"
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


def _why_no_directory(path: Path) -> str | None:
    try:
        return None if stat.S_ISDIR(path.stat().st_mode) else "is not a directory"
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def find_newest(checkpoints: Path, bad: Mapping[Path, str] | None = None) -> Found:
    """Find the newest whole checkpoint under a `checkpoints` directory, and what newer ones were passed over.

    Whatever has a published checkpoint's name is judged, be it a link into an archive that is not mounted: a run that
    has checkpoints must not look like one that has none.

    Args:
        checkpoints: the directory.
        bad: checkpoints that are known to be damaged though all their files are there, and what is wrong with them.

    Raises:
        CheckpointError: what has the directory's name cannot be listed.
    """
    candidates = sorted(
        _candidates(checkpoints),
        key=lambda p: (int("".join(c for c in p.name.split(".")[0] if c.isdigit()) or 0), iteration_of(p) is not None),
        reverse=True,
    )
    rejected: list[Rejected] = []
    for path in candidates:
        reason = (bad or {}).get(path) or why_not_whole(path)
        if reason is None:
            return Found(path, tuple(rejected))
        rejected.append(Rejected(path, reason))
    return Found(None, tuple(rejected))


def _candidates(checkpoints: Path) -> list[Path]:
    """List what has a published checkpoint's name, and the directories on their way to or from one."""
    try:
        entries = [path for path in checkpoints.iterdir() if path.name.startswith("iter_")]
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and not os.path.lexists(checkpoints):
            return []
        reason = _why_no_directory(checkpoints) or f"cannot be read ({error.strerror})"
        raise CheckpointError(
            f"{checkpoints}: {reason}, so whether the run has checkpoints is not known; put it right, or move it away."
        ) from None
    return [path for path in entries if iteration_of(path) is not None or _why_no_directory(path) is None]


def resolve(path: Path) -> Path:
    """Turn what a person gave (a run, its `checkpoints`, or one checkpoint) into one whole checkpoint directory.

    Raises:
        CheckpointError: nothing whole is there.
    """
    if (reason := _why_no_directory(path)) is not None:
        raise CheckpointError(f"{path}: {reason}; give a run directory or one of its checkpoints.")
    if os.path.exists(path / DESCRIPTION) or iteration_of(path) is not None:
        reason = why_not_whole(path)
        if reason is not None:
            raise CheckpointError(f"{path}: not a whole checkpoint: {reason}.")
        return path
    checkpoints = path / CHECKPOINTS if os.path.lexists(path / CHECKPOINTS) else path
    found = find_newest(checkpoints)
    if found.path is None:
        detail = "; ".join(f"{r.path.name}: {r.reason}" for r in found.rejected)
        raise CheckpointError(f"{path}: holds no whole checkpoint{' (' + detail + ')' if detail else ''}.")
    return found.path


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint directory belongs to."""
    return checkpoint.parent.parent
