"""The optimizer state of parameters in padded gradient buckets."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megatron_ext.checkpoint.buckets import spread
from tests.dist.test_resume import OVERLAP, RESHARDABLE, read_tensors


def bucket(numel: int, padded: int) -> SimpleNamespace:
    return SimpleNamespace(numel_unpadded=numel, grad_data=torch.empty(padded))


def test_spread_puts_zeros_where_buckets_are_padded():
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = spread(flat, [bucket(2, 4), bucket(2, 2), bucket(1, 3)])
    assert found.tolist() == [1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]


def test_reshardable_checkpoint_of_many_buckets_holds_what_one_of_a_single_bucket_does(trainer):
    # One process adds up in one order, whatever the buckets are.
    one = trainer.train("one_bucket", *RESHARDABLE)
    many = trainer.train("many_buckets", *RESHARDABLE, *OVERLAP)
    expected, found = (read_tensors(run.run_dir / "checkpoints" / "iter_0000005") for run in (one, many))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
