"""Sums over the bits of tensors: exact, and changed by whatever changes the tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ext.parallel import checksum as module
from megatron_ext.parallel.checksum import checksum, combine, tensor_checksums


def by_definition(values: list[int]) -> int:
    """The sum of a tensor whose elements' bits are these signed integers, in Python's unbounded ones."""
    golden = 0x9E3779B97F4A7C15
    return sum(value * ((index * golden) % 2**64 | 1) for index, value in enumerate(values)) % 2**64


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float32, np.int32), (torch.bfloat16, np.int16), (torch.float16, np.int16), (torch.int64, np.int64)],
)
def test_sum_is_that_of_the_bits_in_unbounded_integers(dtype, bits):
    tensor = (torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) * 1000).to(dtype)
    raw = tensor.view(torch.int16).numpy() if tensor.element_size() == 2 else tensor.numpy()
    assert tensor_checksums([tensor]) == [by_definition(np.frombuffer(raw.tobytes(), bits).tolist())]


def test_sum_does_not_depend_on_the_size_of_the_chunks(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = checksum([tensor])
    monkeypatch.setattr(module, "_CHUNK", 96)
    assert checksum([tensor]) == whole


@pytest.mark.parametrize("bit", [0, 1, 15, 30, 31])
def test_any_flipped_bit_changes_the_sum(bit):
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(3))
    before = checksum([tensor])
    mask = -(2**31) if bit == 31 else 2**bit
    for index in range(64):
        flipped = tensor.clone()
        flipped.view(torch.int32)[index] ^= mask
        assert checksum([flipped]) != before


def test_swapped_elements_change_the_sum():
    tensor = torch.arange(10.0)
    swapped = tensor[[0, 1, 5, 3, 4, 2, 6, 7, 8, 9]]
    assert checksum([swapped]) != checksum([tensor])


def test_swapped_tensors_change_the_sum():
    first, second = torch.ones(4), torch.full((4,), 2.0)
    assert checksum([first, second]) != checksum([second, first])


def test_a_tensor_that_is_not_contiguous_sums_like_its_copy():
    tensor = torch.randn(6, 8)
    assert checksum([tensor.t()]) == checksum([tensor.t().contiguous()])


def test_minus_zero_differs_from_zero():
    assert checksum([torch.tensor([-0.0])]) != checksum([torch.tensor([0.0])])


def test_an_empty_tensor_and_a_scalar_have_sums():
    assert tensor_checksums([torch.empty(0), torch.tensor(1.0)]) == [0, 0x3F800000]


def test_the_whole_is_the_combination_of_its_parts():
    tensors = [torch.randn(3), torch.randn(4)]
    assert checksum(tensors) == combine(tensor_checksums(tensors))
