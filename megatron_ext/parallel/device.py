"""CPU or CUDA: the one place that asks, and the one door to `torch.cuda`."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch

# Dense bf16 peak in TFLOP/s by device name. Source: NVIDIA data sheets of A100, H100, H200, DGX B200, GB200 NVL72
# (the "with sparsity" figures halved). An unknown device gets no MFU rather than a wrong one.
_PEAK_BF16_TFLOPS = (
    (r"H100.*PCIe|H100 PCIe", 756.0),
    (r"H[12]00.*NVL", 835.0),
    (r"H100|H200|GH200", 989.0),
    (r"A100", 312.0),
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
)


def is_cuda() -> bool:
    """Say whether this process has a CUDA device."""
    return torch.cuda.is_available()


def backend() -> str:
    """Name the torch.distributed backend: nccl on CUDA, gloo on the CPU."""
    return "nccl" if is_cuda() else "gloo"


def current() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else torch.device("cpu")


def select(local_rank: int) -> None:
    """Bind this process to its CUDA device; nothing to do on the CPU."""
    if is_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def choose_algorithms(*, deterministic: bool) -> None:
    """Let torch take the fastest kernels, or only those that give the same bits each time.

    An operation that has no such kernel then raises. Only half of the matter on CUDA: what cuBLAS, NCCL and
    Transformer Engine do is said in the environment (`launch.runtime_defaults`).
    """
    torch.use_deterministic_algorithms(deterministic)


def synchronize() -> None:
    """Wait until the device has finished what was queued."""
    if is_cuda():
        torch.cuda.synchronize()


def name() -> str:
    """Name the device as its maker does, or `CPU`."""
    return torch.cuda.get_device_name() if is_cuda() else "CPU"


def peak_bf16_tflops() -> float | None:
    """Dense bf16 peak of this device in TFLOP/s, or None where it is not known."""
    device = name()
    for pattern, peak in _PEAK_BF16_TFLOPS:
        if re.search(pattern, device):
            return peak
    return None


def peak_memory_gib() -> float | None:
    """Highest device memory allocated so far in GiB; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if is_cuda() else None


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory_gib`."""
    if is_cuda():
        torch.cuda.reset_peak_memory_stats()


def is_hopper_or_later() -> bool:
    """Say whether the device has FP8 tensor cores as Transformer Engine wants them."""
    return is_cuda() and torch.cuda.get_device_capability() >= (9, 0)


def has_transformer_engine() -> bool:
    """Say whether Transformer Engine can be used: it is installed, and there is a CUDA device."""
    return is_cuda() and importlib.util.find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """Say whether apex's fused weight-gradient kernel is there (not the unrelated `apex` of PyPI)."""
    return is_cuda() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def rng_state() -> dict[str, Any]:
    """Take the device's random state, as plain tensors."""
    return {"cuda": torch.cuda.get_rng_state()} if is_cuda() else {}


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took; a state from another kind of device is left aside."""
    if is_cuda() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Page-lock a host tensor so that its copy to the device overlaps computation; as it is on the CPU."""
    return tensor.pin_memory() if is_cuda() else tensor


def page_locked(size: int) -> torch.Tensor:
    """Allocate host memory that the device copies into at the speed of its link: [size] uint8, on CUDA only."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
