"""Add up the bits of tensors, exactly, where they lie: equal sums mean equal bits, but for one chance in 2^64.

Each element's bits, as an integer, count times an odd weight that its position decides, modulo 2^64. So any one changed
element changes the sum (an odd number divides no power of two), and elements that changed places do too. The sum does
not depend on the order of addition, and so is the same on a CPU and a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_CHUNK = 1 << 20  # elements; three int64 temporaries of it are 24 MiB of device memory
_FACTOR = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbours get weights that are far apart
_MODULUS = 1 << 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Return a sum over the bits of tensors and their order, from 0 to 2^64 - 1."""
    return combine(tensor_checksums(tensors))


def tensor_checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return a sum over the bits of each tensor. The host waits for the device once."""
    sums = [_sum_of(tensor) for tensor in tensors]
    return [] if not sums else [int(value) % _MODULUS for value in torch.stack(sums).tolist()]


def combine(sums: Iterable[int]) -> int:
    """Make one sum of several, which their order decides too."""
    total = 1
    for value in sums:
        total = (total * _FACTOR + value) % _MODULUS
    return total


def _sum_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of one tensor: [] int64, on its device."""
    tensor = tensor.detach()
    if type(tensor) is not torch.Tensor:  # Transformer Engine's FP8 weights are a class of their own
        tensor = tensor.dequantize()
    bits = tensor.contiguous().reshape(-1).view(_INTEGERS[min(tensor.element_size(), 8)])
    base = torch.arange(min(_CHUNK, bits.numel()), dtype=torch.int64, device=bits.device) * _signed(_FACTOR)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]
        weights = (base[: part.numel()] + _signed(start * _FACTOR)).bitwise_or_(1)
        total += weights.mul_(part).sum()
    return total


def _signed(value: int) -> int:
    """The same bits as a signed number of 64 of them."""
    return (value + (1 << 63)) % _MODULUS - (1 << 63)
