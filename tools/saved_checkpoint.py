"""A checkpoint that a tool is given: found in a run, and verified."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_ext.checkpoint import digests, layout
from megatron_ext.errors import CheckpointError
from tools.new_folder import progress


def find_checkpoint(load: Path) -> Path:
    """Find the checkpoint that a person means, and tell which newer ones are not whole.

    Raises:
        CheckpointError: there is none that is whole.
    """
    for path, reason in layout.find_newest(load / layout.CHECKPOINTS).rejected:
        print(f"warning: ignored {path}: {reason}", file=sys.stderr)
    return layout.resolve(load)


def verify_files(checkpoint: Path) -> None:
    """Read all files and compare them with what they were when they were written.

    Raises:
        CheckpointError: one is not.
    """
    recorded = layout.read_digests(checkpoint)
    if recorded is None:
        print(f"warning: {checkpoint}: saved without digests; only the sizes of its files are known.", file=sys.stderr)
        return
    with progress("verifying", sum(record.size for record in recorded.values())) as advance:
        damage = digests.find_damage(checkpoint, recorded, advance)
    if damage is not None:
        raise CheckpointError(f"{checkpoint}: {damage}; give another checkpoint.")
