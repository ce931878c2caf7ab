"""What is removed from a run's checkpoints: expired ones, and what starts that died left there. No torch."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.layout import REMOVED, REPLACED, iteration_of, why_not_whole
from megatron_ext.durable import flush
from megatron_ext.errors import CheckpointError

_LOG = logging.getLogger(__name__)
_HOLDS_SPACE = "cannot be removed, and takes up disk space"
_LEFT = re.compile(r"iter_\d{7,}((\.\w+)?\.tmp|\.removed|\.replaced)\Z")


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


def remove_expired(
    checkpoints: Path, *, keep_last: int | None, keep_every: int | None, bad: Collection[Path] = ()
) -> list[Path]:
    """Remove expired checkpoints. One rank calls it, and only after a newer one was published.

    It takes seconds where files are large, and may run beside training. What cannot be removed is told, and no more:
    the newer checkpoint is whole all the same.

    Args:
        checkpoints: the directory.
        keep_last: how many of the newest to keep. Only whole ones count, so a damaged one never displaces a good one.
        keep_every: besides, keep those whose iteration is a multiple of this.
        bad: checkpoints that are known to be damaged though all their files are there.

    Returns:
        What they were called.

    Raises:
        OSError: the directory cannot be listed or flushed; nothing was removed.
    """
    flush(checkpoints)  # the newer one's name must last before an older one goes
    named = [p for p in checkpoints.iterdir() if iteration_of(p) is not None and p not in bad]
    by_iteration = {iteration_of(p) or 0: p for p in named if why_not_whole(p) is None}
    gone = [by_iteration[i] for i in expired(by_iteration, keep_last=keep_last, keep_every=keep_every)]
    for path in gone:
        with layout.told(path, _HOLDS_SPACE):
            path.rename(path.with_suffix(REMOVED))  # a half-removed directory must not look whole
    for path in checkpoints.glob(f"iter_*{REMOVED}"):  # also of a run that was ended while it did this
        with layout.told(path, _HOLDS_SPACE):
            layout.discard(path)
    return gone


def put_back_replaced(checkpoints: Path) -> None:
    """Give a checkpoint its name back that was taken from it by a start which died before its successor had it.

    One rank calls it, while no save is under way, before it looks for the newest checkpoint.

    Raises:
        CheckpointError: that cannot be done, and the checkpoint would not be found.
    """
    for left in sorted(checkpoints.glob(f"iter_*{REPLACED}")):
        published = left.with_suffix("")
        if iteration_of(published) is None or os.path.lexists(published):
            continue
        try:
            left.rename(published)
        except OSError as error:
            raise CheckpointError(
                f"{left}: cannot get back its name, {published.name} ({error.strerror}); rename it, and start again."
            ) from None
        _LOG.warning("%s: has its name back; a start died while it replaced it", published)


def remove_leftovers(checkpoints: Path, newest: Path | None, *, start: str = "") -> None:
    """Remove what starts that died left: each holds the disk space of a checkpoint. One rank calls it at a start.

    What cannot be removed is told, and no more: a rank of a dead start that was only cut off may be writing there
    still.

    Args:
        checkpoints: the directory.
        newest: the run's newest whole checkpoint; None: it has none, and only unfinished ones go.
        start: whose unfinished checkpoints stay: what this start itself writes.
    """
    gone: list[str] = []
    stuck: list[str] = []
    with layout.told(checkpoints, "cannot be cleared"):
        for path in sorted(checkpoints.iterdir() if checkpoints.is_dir() else ()):
            if _LEFT.match(path.name) and _is_superfluous(path, newest, start):
                shutil.rmtree(path, ignore_errors=True)
                (stuck if os.path.lexists(path) else gone).append(path.name)
    if gone:
        _LOG.info("removed what earlier starts left in %s: %s", checkpoints, ", ".join(gone))
    for name in stuck:
        _LOG.warning("%s: %s", checkpoints / name, _HOLDS_SPACE)


def _is_superfluous(left: Path, newest: Path | None, start: str) -> bool:
    if left.suffix == ".tmp":
        return not (start and left.name.endswith(f".{start}.tmp"))
    if newest is None:
        return False
    # One that was replaced may be better than its successor, where that is damaged.
    return left.suffix == REMOVED or (iteration_of(left.with_suffix("")) or 0) <= (iteration_of(newest) or 0)
