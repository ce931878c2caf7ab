"""The CPU adapter: it changes nothing where there is CUDA, and answers for it where there is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_ext.parallel import cpu_adapter, device
from tests.conftest import ROOT, child_environment

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")

# Everything that a person could reach from torch, one level deep, and from the two classes that are adapted.
_SNAPSHOT = """
import sys
import torch
from megatron_ext.parallel import cpu_adapter, device

def attributes():
    holders = {"torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module}
    return {(n, k): v for n, holder in holders.items() for k, v in vars(holder).items() if k != "_dynamo"}

def changes(before):
    after = attributes()
    return sorted(f"{n}.{k}" for n, k in before | after if after.get((n, k)) is not before.get((n, k)))
"""


def in_a_process_of_its_own(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _SNAPSHOT + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_where_there_is_cuda_changes_nothing():
    found = in_a_process_of_its_own(
        """
        import os
        device.is_cuda = lambda: True
        before, environment = attributes(), dict(os.environ)
        cpu_adapter.install()
        print(changes(before), dict(os.environ) == environment, "megatron.core" in sys.modules)
        """
    )
    assert found == "[] True False"


@CPU_ONLY
def test_install_without_cuda_changes_what_it_names_and_no_more():
    found = in_a_process_of_its_own(
        """
        import megatron.core.tensor_parallel.random  # its import is none of the adapter's doing
        before = attributes()
        cpu_adapter.install()
        print(" ".join(changes(before)))
        """
    )
    queries = "current_device current_stream empty_cache get_rng_state manual_seed set_rng_state synchronize"
    factories = "arange empty empty_like full ones ones_like tensor zeros zeros_like"
    expected = ["Module.cuda", "Tensor.cuda", "Tensor.type"]
    expected += [f"cuda.{name}" for name in queries.split()] + [f"torch.{name}" for name in factories.split()]
    assert found.split() == sorted(expected)


@CPU_ONLY
def test_install_a_second_time_changes_nothing():
    found = in_a_process_of_its_own(
        """
        cpu_adapter.install()
        before = attributes()
        cpu_adapter.install()
        print(changes(before))
        """
    )
    assert found == "[]"


@pytest.fixture
def adapted(one_process):
    if device.is_cuda():
        pytest.skip("the adapter is for machines without CUDA")
    cpu_adapter.install()


@pytest.mark.parametrize("where", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), 0])
def test_factory_asked_for_cuda_makes_a_tensor_on_the_cpu(where, adapted):
    assert torch.zeros(3, device=where).device.type == "cpu"


@pytest.mark.parametrize("where", ["meta", torch.device("meta")])
def test_factory_asked_for_another_device_makes_it_there(where, adapted):
    assert torch.zeros(3, device=where).device.type == "meta"


@pytest.mark.parametrize("name", cpu_adapter._FACTORIES)
def test_factory_that_is_redirected_gives_what_it_gave(name, adapted):
    arguments = {"full": ((2,), 7.0), "tensor": ([1.0, 2.0],), "arange": (2,), "empty": ((2,),)}
    like = (torch.tensor([3.0, 4.0]),) if name.endswith("_like") else ((2,),)
    found = getattr(torch, name)(*arguments.get(name, like), device="cuda")
    values = {"zeros": [0, 0], "ones": [1, 1], "full": [7, 7], "tensor": [1, 2], "arange": [0, 1]}
    assert found.shape == (2,)
    if not name.startswith("empty"):
        assert found.tolist() == values[name.removesuffix("_like")]


def test_tensor_moved_to_cuda_is_itself(adapted):
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor


@pytest.mark.parametrize("dtype", ["Float", "BFloat16", "Half"])
def test_type_of_a_tensor_is_spelt_as_on_cuda(dtype, adapted):
    kind = {"Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16}[dtype]
    assert torch.ones(1, dtype=kind).type() == f"torch.cuda.{dtype}Tensor"


def test_conversion_by_type_still_converts(adapted):
    assert torch.ones(1).type(torch.float64).dtype is torch.float64


# --- the tracker of random states -----------------------------------------------------------------------------


@pytest.fixture
def tracker(adapted):
    """A tracker with two states, a (seed 11) and b (seed 12); the global generator is at seed 5."""
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 11)
    tracker.add("b", 12)
    torch.manual_seed(5)
    return tracker


def stream(seed: int, number: int) -> list[float]:
    """Numbers that torch draws from a seed."""
    return torch.rand(number, generator=torch.Generator().manual_seed(seed)).tolist()


def draw() -> float:
    return torch.rand(1).item()


def test_fork_draws_from_the_state_named(tracker):
    with tracker.fork("a"):
        found = [draw(), draw()]
    assert found == stream(11, 2)


def test_fork_leaves_the_global_generator_where_it_was(tracker):
    first = draw()
    with tracker.fork("a"):
        draw()
    assert [first, draw()] == stream(5, 2)


def test_fork_goes_on_where_the_last_one_stopped(tracker):
    with tracker.fork("a"):
        first = draw()
    with tracker.fork("a"):
        second = draw()
    assert [first, second] == stream(11, 2)


def test_fork_within_a_fork_leaves_the_outer_state_where_it_was(tracker):
    with tracker.fork("a"):
        first = draw()
        with tracker.fork("b"):
            inner = draw()
        second = draw()
    assert ([first, second], [inner]) == (stream(11, 2), stream(12, 1))


def test_fork_that_fails_puts_the_global_generator_back(tracker):
    with pytest.raises(ZeroDivisionError), tracker.fork("a"):
        draw()
        _ = 1 / 0
    assert [draw()] == stream(5, 1)


def test_fork_of_an_unknown_state_is_an_error_of_ours(tracker):
    with pytest.raises(AssertionError, match="rng state c is not among"), tracker.fork("c"):
        pass
