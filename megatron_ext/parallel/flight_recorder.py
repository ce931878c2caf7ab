"""Ask torch's flight recorder which collectives are under way. Safe from any thread, while others hang.

torch 2.13 records the newest 2000 collectives of every group, over NCCL and over gloo, without being told to
(FlightRecorder.hpp: TORCH_FR_BUFFER_SIZE, 2000), and NCCL's own watchdog writes them out when a collective times out
(ProcessGroupNCCL.hpp: TORCH_NCCL_DUMP_ON_TIMEOUT). So nothing is set in the environment for it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

TRACES = "hang-traces"
_RECORDER: Any = importlib.import_module("torch._C._distributed_c10d")
_PREFIX = "rank_"  # what torch.distributed.flight_recorder.fr_trace finds without being told


def oldest_pending(*, cuda: bool) -> str:
    """Name the first collective of this rank that has not ended, its number in its group, and what it moves."""
    for entry in _entries(cuda):
        if not entry.get("retired") and entry.get("state") != "completed":
            number = entry.get("p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id")
            sizes = zip(entry.get("input_dtypes", ()), entry.get("input_sizes", ()), strict=False)
            moved = ", ".join(f"{dtype} {size}" for dtype, size in sizes)
            return f"{entry.get('profiling_name')} number {number} of {_group(entry)}, {moved}"
    return ""


def write_trace(folder: Path, rank: int, *, cuda: bool) -> None:
    """Write what the recorder holds, for `python -m torch.distributed.flight_recorder.fr_trace FOLDER`.

    torch's analyzer reads NCCL's traces; gloo's lack the groups (2.13) and are a plain pickle of a dictionary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dump = _RECORDER._dump_nccl_trace if cuda else _RECORDER._dump_fr_trace
    trace = dump(includeCollectives=True, includeStackTraces=True, onlyActive=False)
    (folder / f"{_PREFIX}{rank}").write_bytes(trace)


def _entries(cuda: bool) -> list[dict[str, Any]]:
    dump = _RECORDER._dump_nccl_trace_json if cuda else _RECORDER._dump_fr_trace_json
    found = json.loads(dump(includeCollectives=True, onlyActive=True))
    return list(found.get("entries", ()))


def _group(entry: dict[str, Any]) -> str:
    name, description = (*entry.get("process_group", ()), "", "")[:2]
    return description if description not in ("", "undefined") else f"group {name}"
