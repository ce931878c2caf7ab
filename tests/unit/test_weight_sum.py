"""The checksum of weights: the same for every cut, another for every change. The reference adds element by element."""

from __future__ import annotations

import pytest
import torch
import xxhash

from megatron_ext.checkpoint.weight_sum import MODULUS, sum_of_part

SHAPE = (3, 6, 10)


def tensor(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).to(dtype)


def part(whole: torch.Tensor, *slices: slice) -> int:
    """Sum of a part that slices cut out of a whole."""
    offset = [one.start or 0 for one in slices] + [0] * (whole.dim() - len(slices))
    return sum_of_part(whole[slices], "key", shape=whole.shape, offset=offset)


def reference(whole: torch.Tensor, key: str) -> int:
    """The definition, in Python's integers: bits times (row weight + column weight), over all elements."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[whole.element_size()]
    bits = whole.contiguous().view(integers).reshape(-1, whole.shape[-1]).tolist()
    total = 0
    for row, values in enumerate(bits):
        for column, value in enumerate(values):
            total += value * ((row * 0x9E3779B1 + 1) + (column * 0x85EBCA77 + 1))
    return total * (xxhash.xxh3_64_intdigest(key.encode()) | 1) % MODULUS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_sum_is_that_of_the_definition(dtype):
    whole = tensor(dtype)
    assert sum_of_part(whole, "key", shape=SHAPE, offset=(0, 0, 0)) == reference(whole, "key")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("at", [1, 2])
def test_parts_add_up_to_the_whole(axis, at, dtype):
    whole = tensor(dtype)
    before = [slice(None)] * axis
    parts = part(whole, *before, slice(0, at)) + part(whole, *before, slice(at, None))
    assert parts % MODULUS == part(whole)


def test_vector_is_summed_too():
    whole = torch.randn(12)
    parts = part(whole, slice(0, 5)) + part(whole, slice(5, None))
    assert parts % MODULUS == part(whole) == reference(whole, "key")


def test_empty_part_adds_nothing():
    assert part(tensor(), slice(0, 0)) == 0


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_any_bit_changes_the_sum(bit):
    whole = tensor()
    changed = whole.clone()
    changed.view(torch.int32)[1, 2, 3] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    assert part(changed) != part(whole)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_halves_that_changed_places_change_the_sum(axis):
    whole = tensor()
    assert part(whole.roll(1, dims=axis)) != part(whole)


def test_another_name_has_another_sum():
    whole = tensor()
    assert sum_of_part(whole, "other", shape=SHAPE, offset=(0, 0, 0)) != part(whole)
