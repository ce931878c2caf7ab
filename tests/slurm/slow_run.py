"""pretrain_pints.py whose iterations take their time: for tests that must meet a run amid its work.

Stands where `python` does in the batch script: `slow_run.py pretrain_pints.py CONFIG …`. Until Slurm starts the job
again, each iteration after SLOW_FROM takes SLOW_SECONDS more.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_pints


def slow_down(*, after: int, seconds: float) -> None:
    """Make the iterations of the training loop slow, from one on."""
    build_and_train = pretrain_pints.build_and_train

    def slowly(*arguments: Any) -> None:
        from megatron_ext.training import loop  # not before the environment is set that torch reads when it starts

        step = loop.train_step

        def slow_step(machine: Any, state: Any) -> Any:
            if state.iteration >= after:
                time.sleep(seconds)
            return step(machine, state)

        loop.train_step = slow_step
        build_and_train(*arguments)

    pretrain_pints.build_and_train = slowly


if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        slow_down(after=int(os.environ["SLOW_FROM"]), seconds=float(os.environ["SLOW_SECONDS"]))
    if code := pretrain_pints.main(sys.argv[2:]):
        pretrain_pints.leave(code)
