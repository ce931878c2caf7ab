"""Read a checkpoint's files, all ranks together, before anything is taken from them."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from megatron_ext.checkpoint import digests, layout
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel import groups
from megatron_ext.parallel.groups import Place

_LOG = logging.getLogger(__name__)


def find_newest(directory: Path, damaged: dict[Path, str], place: Place) -> Path | None:
    """Find the newest checkpoint of a run whose files are as they were written. Every rank calls it.

    Args:
        directory: the run's checkpoints.
        damaged: what is known to be damaged, and why; what is found so is added.
        place: this rank's.

    Returns:
        Its directory; None: nothing was ever saved.

    Raises:
        CheckpointError: there are checkpoints, but none that is whole.
    """
    while True:
        found = layout.Found(None, ())
        with groups.together():
            if place.rank == 0:
                found = layout.find_newest(directory, damaged)
        path: Path | None = groups.broadcast_object(found.path)  # a slow file system must not split the ranks
        damage = None if path is None else find_damage(path, place)
        if path is not None and damage is not None:
            damaged[path] = damage
            continue
        with groups.together():
            if place.rank == 0:
                _report(directory, found)
        return path


def find_damage(path: Path, place: Place) -> str | None:
    """Read all files of a checkpoint, shared out over the ranks, and say what is damaged. Every rank calls it.

    A file is read by the rank that wrote it, or that has its number now: the same will load from it, and finds it in
    its node's memory.
    """
    begin = time.monotonic()
    reason, recorded = None, None
    try:
        recorded = layout.read_digests(path)
    except CheckpointError as error:
        reason = str(error)
    mine = {
        name: record
        for index, (name, record) in enumerate(sorted((recorded or {}).items()))
        if digests.writer_of(name, index) % place.world_size == place.rank
    }
    reason = reason or digests.find_damage(path, mine)
    reasons: list[str | None] = groups.gather_objects(reason)
    found = next((one for one in reasons if one is not None), None)
    if place.rank == 0 and found is None:
        if recorded is None:
            _LOG.warning("%s: saved without digests; only the sizes of its files are known to be right", path)
        else:
            size = sum(record.size for record in recorded.values()) / 1e9
            _LOG.info("verified %s: %.2f GB in %.1f s", path.name, size, time.monotonic() - begin)
    return found


def _report(directory: Path, found: layout.Found) -> None:
    for rejected in found.rejected:
        _LOG.warning("ignored %s: %s", rejected.path, rejected.reason)
    lost = [one for one in found.rejected if layout.iteration_of(one.path) is not None]
    if found.path is None and lost:
        reasons = "; ".join(f"{one.path.name}: {one.reason}" for one in lost)
        raise CheckpointError(
            f"{directory}: holds checkpoints, but none that is whole ({reasons}). Put a whole one back, or, to start "
            "from the beginning, move these away or name another run_dir."
        )
