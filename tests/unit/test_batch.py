"""The tensors of a micro batch: shapes, types, positions."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.data.batch import share_batch


@pytest.fixture
def host():
    """[3, b, s]: tokens, labels, loss mask of two sequences of five."""
    tokens = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    return torch.stack((tokens, tokens + 1, mask))


@pytest.fixture
def batch(host, one_process):
    return share_batch(host, one_process, shape=(2, 5))


@pytest.mark.parametrize(("name", "row"), [("tokens", 0), ("labels", 1), ("loss_mask", 2)])
def test_batch_takes_each_part_from_its_row(name, row, batch, host):
    assert torch.equal(getattr(batch, name).long().cpu(), host[row])


def test_batch_ids_are_int64_and_the_mask_float32(batch):
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_batch_positions_count_from_zero_in_every_sequence(batch):
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
