"""Let an unmodified megatron-core run without CUDA, on CPU and gloo.

megatron-core asks `torch.cuda` for devices, writes `device="cuda"`, and compares dtypes by type
strings, on paths that a dense GPT takes. `install` answers those questions for a CPU. It changes
attributes of `torch` for the whole process, so it acts only where there is no CUDA device, and it
must run before `megatron.core` is imported.

A `TorchFunctionMode` would be tidier but does not reach tensors made inside `torch.autograd.backward`
(recomputation, tensor-parallel mappings): checked with torch 2.13 and megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_ext.parallel import device

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_installed = False


def install() -> None:
    """Adapt torch and megatron-core to this machine's CPU; nothing on a CUDA machine or a second time."""
    global _installed
    if _installed or device.is_cuda():
        return
    _installed = True
    # jit_fuser is torch.compile, which wants a C++ compiler and gains nothing at test sizes.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    _keep_freed_memory()
    _answer_device_queries()
    _redirect_factories()
    _spell_types_as_cuda()
    _replace_rng_tracker()


def _keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: an iteration frees and asks for the same ones, and each time the kernel would
    hand out fresh zeroed pages.

    CUDA's caching allocator does the same for device memory. Elsewhere than on glibc nothing is changed.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _answer_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU  # used as device=torch.cuda.current_device()
    cuda.current_stream = lambda device=None: None  # 0.19 asks for it, and uses it only after a CUDA graph's replay
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _redirect_factories() -> None:
    # `with torch.device("meta")` knows the factories by identity, from a set made at its first use. Made later, it
    # would hold our wrappers in place of what they call, and transformers would build models with wrong tables.
    _device_constructors()
    for factory in _FACTORIES:
        setattr(torch, factory, _on_cpu(getattr(torch, factory)))
    for holder in (torch.Tensor, torch.nn.Module):
        setattr(holder, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010  (mypy knows the method)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        where = kwargs.get("device")
        if where is not None and _names_cuda(where):
            kwargs["device"] = _CPU
        return function(*args, **kwargs)

    return wrapper


def _names_cuda(where: Any) -> bool:
    if isinstance(where, torch.device):
        return where.type == "cuda"
    if isinstance(where, str):
        return where.startswith("cuda")
    return isinstance(where, int) and not isinstance(where, bool)


def _spell_types_as_cuda() -> None:
    # clip_grads and the distributed optimizer compare `tensor.type()` with 'torch.cuda.FloatTensor'.
    real_type = torch.Tensor.type

    def type_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, *args, **kwargs)
        return real_type(self).replace("torch.", "torch.cuda.", 1)

    tensor: Any = torch.Tensor
    tensor.type = type_as_cuda


def _replace_rng_tracker() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """Megatron's tracker of named random states, over torch's CPU generator."""

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            assert name in self.states_, f"rng state {name} is not among {list(self.states_)}"
            outer_state = torch.get_rng_state()
            outer_name: str = self.current_state()
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                outer = self.states_[outer_name] if outer_name != "default-rng" else outer_state
                torch.set_rng_state(outer)
                self._current_state_name = outer_name

        def current_state(self) -> str:
            """Name the state that is in use now."""
            return str(vars(self)["_current_state_name"])

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker
