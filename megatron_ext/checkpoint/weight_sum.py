"""A checksum of the model's weights that does not depend on how they are cut over ranks.

Every element's bits count, weighted by where the element lies in the whole tensor (by its row, and by its column), so
that layers, rows or columns that changed places are found, and partial sums over any cut add up to the same total.
All arithmetic is modulo 2^32, hence exact, and the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import xxhash

MODULUS = 2**32
_ROW, _COLUMN = 0x9E3779B1, 0x85EBCA77  # odd numbers without a pattern: xxHash's first two primes of 32 bits
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# Sixteen-bit elements are widened in blocks: on a CPU a block stays in the cache, on a GPU it is large enough.
_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**24


def sum_of_part(part: torch.Tensor, key: str, *, shape: Sequence[int], offset: Sequence[int]) -> int:
    """Sum up a rectangular part of a tensor; where a tensor is cut in parts, its sum is theirs, modulo 2^32.

    Args:
        part: on any device; its shape is that of the part, with as many axes as `shape`.
        key: name of the tensor in the checkpoint.
        shape: of the whole tensor.
        offset: of the part in the whole.
    """
    if part.numel() == 0:
        return 0
    bits = part.detach().reshape(-1, part.shape[-1] if part.dim() else 1)
    bits = bits.view(_INTEGERS[part.element_size()])
    rows, columns = _row_and_column_sums(bits)
    row_numbers = _row_numbers(part.shape, shape, offset, rows.device)
    column_numbers = torch.arange(bits.size(1), device=rows.device) + (offset[-1] if len(offset) else 0)
    by_row = (rows * _weights(row_numbers, _ROW)).sum()
    by_column = (columns * _weights(column_numbers, _COLUMN)).sum()
    return (int(by_row) + int(by_column)) * (xxhash.xxh3_64_intdigest(key.encode()) | 1) % MODULUS


def _weights(numbers: torch.Tensor, factor: int) -> torch.Tensor:
    return (numbers * factor + 1) % MODULUS


def _row_and_column_sums(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up a matrix of integers by row and by column, modulo 2^32, as int64."""
    block = max(1, (_GPU_BLOCK if bits.is_cuda else _CPU_BLOCK) // bits.size(1))
    rows, columns = [], torch.zeros(bits.size(1), dtype=torch.int32, device=bits.device)
    for some in bits.split(block):
        wide = some.to(torch.int32)
        rows.append(wide.sum(dim=1, dtype=torch.int32))
        columns += wide.sum(dim=0, dtype=torch.int32)
    return torch.cat(rows).to(torch.int64), columns.to(torch.int64)


def _row_numbers(
    part: Sequence[int], shape: Sequence[int], offset: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Number each row of a part as a row of the whole tensor, all axes but the last one flattened."""
    numbers = torch.zeros(1, dtype=torch.int64, device=device)
    for axis in range(len(part) - 1):
        stride = math.prod(shape[axis + 1 : -1])
        own = (torch.arange(part[axis], device=device) + offset[axis]) * stride
        numbers = (numbers.unsqueeze(1) + own.unsqueeze(0)).reshape(-1)
    return numbers
