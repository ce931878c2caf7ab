"""What torch's flight recorder tells, in a process group of this process alone."""

from __future__ import annotations

import pickle
import subprocess
import sys

from tests.conftest import child_environment

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch, torch.distributed as dist
from megatron_ext.parallel import flight_recorder

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
dist.all_reduce(torch.ones(3))
dist.all_reduce(torch.ones(4))
deadline = time.monotonic() + 20
while flight_recorder.oldest_pending(cuda=False) and time.monotonic() < deadline:
    time.sleep(0.05)  # the recorder hears of the end from another thread
print("pending:", flight_recorder.oldest_pending(cuda=False))
flight_recorder.write_trace(Path(sys.argv[1]), 0, cuda=False)
"""


def test_trace_holds_the_collectives_and_none_is_pending_when_all_have_ended(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pending:"
    trace = pickle.loads((tmp_path / "rank_0").read_bytes())
    assert [entry["profiling_name"] for entry in trace["entries"]] == ["gloo:all_reduce"] * 2
    assert [entry["input_sizes"] for entry in trace["entries"]] == [[[3]], [[4]]]
