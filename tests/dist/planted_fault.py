"""Run pretrain_pints.py with a fault planted on one rank: `planted_fault.py FAULT RANK ITERATION CONFIG …`.

The fault lies outside of the product: one function of it is wrapped. FAULT is one of the functions below.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_pints

FLIPPED = "decoder.layers.0.self_attention.linear_qkv.weight"
_FOR_EVER = 10_000.0


def hang_in_the_loader(iteration: int) -> None:
    """Never come back from reading a sample."""
    from megatron_ext.data.loader import Loader

    calls = _calls_from(iteration)
    read = Loader.iteration

    def iteration_that_hangs(self, first, **kwargs):
        if next(calls):
            time.sleep(_FOR_EVER)
        yield from read(self, first, **kwargs)

    Loader.iteration = iteration_that_hangs


def leave_out_a_collective(iteration: int) -> None:
    """Call another collective than the other ranks do, on another group."""
    from megatron_ext.parallel import groups
    from megatron_ext.training import loop

    calls = _calls_from(iteration)
    step = loop.train_step

    def step_that_strays(machine, state):
        if next(calls):
            groups.gather_objects(None)
        return step(machine, state)

    loop.train_step = step_that_strays


def at_iteration(iteration: int, do) -> None:
    """Call `do(machine)` before an iteration, once."""
    from megatron_ext.training import loop

    step = loop.train_step

    def step_with_a_fault(machine, state):
        if state.iteration + 1 == iteration:
            do(machine)
        return step(machine, state)

    loop.train_step = step_with_a_fault


def be_stopped(iteration: int) -> None:
    """Be frozen by the system, whole."""
    at_iteration(iteration, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


def die(iteration: int) -> None:
    """End without a word."""
    at_iteration(iteration, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def fail(iteration: int) -> None:
    """Meet an error that nobody expected, alone."""

    def do(_):
        raise ValueError("planted")

    at_iteration(iteration, do)


def flip_a_bit(iteration: int) -> None:
    """Change the lowest bit of one weight of this rank's copy, after the update of an iteration."""
    import torch

    from megatron_ext.training import loop

    step = loop.train_step

    def step_with_a_fault(machine, state):
        result = step(machine, state)
        if state.iteration + 1 == iteration:
            parameter = dict(machine.model.bare[0].named_parameters())[FLIPPED]
            parameter.data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1)
        return result

    loop.train_step = step_with_a_fault


def be_slow(iteration: int) -> None:
    """Take 100 ms longer for each forward pass from that iteration on."""
    from megatron_ext.training import step

    forward = step.forward_step

    def slow_forward_step(*args, **kwargs):
        time.sleep(0.1)
        return forward(*args, **kwargs)

    step.forward_step = slow_forward_step


def _calls_from(iteration: int):
    call = 0
    while True:
        call += 1
        yield call == iteration


if __name__ == "__main__":
    fault, rank, iteration, *arguments = sys.argv[1:]
    if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == rank:
        globals()[fault](int(iteration))
    if code := pretrain_pints.main(arguments):
        pretrain_pints.leave(code)
