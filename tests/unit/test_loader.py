"""Which rank reads which sample, and what a micro batch holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_ext.data.blend import Sample
from megatron_ext.data.loader import Loader, micro_batch_samples

GLOBAL = 24


def blocks_of(data_rank: int, data_size: int, *, first: int = 1000, micro_batch_size: int = 2) -> list[range]:
    return micro_batch_samples(
        first,
        global_batch_size=GLOBAL,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 6, 12])
def test_micro_batches_of_all_ranks_cover_each_sample_once(data_size, micro_batch_size):
    read = [
        sample
        for rank in range(data_size)
        for block in blocks_of(rank, data_size, micro_batch_size=micro_batch_size)
        for sample in block
    ]
    assert sorted(read) == list(range(1000, 1000 + GLOBAL))


@pytest.mark.parametrize("data_size", [1, 2, 3, 4, 6, 12])
def test_micro_batches_of_a_rank_are_of_the_size_asked_for(data_size):
    sizes = [len(block) for rank in range(data_size) for block in blocks_of(rank, data_size)]
    assert sizes == [2] * (GLOBAL // 2)


def test_micro_batches_are_dealt_over_the_ranks_in_turn():
    assert blocks_of(1, 3, first=0) == [range(2, 4), range(8, 10), range(14, 16), range(20, 22)]


def test_micro_batches_of_an_indivisible_batch_are_an_error_of_ours():
    with pytest.raises(AssertionError):
        blocks_of(0, 5)


class Countable:
    """Sample k holds the tokens 10 k, 10 k + 1, …; every fourth label does not count."""

    def __getitem__(self, k: int) -> Sample:
        ids = torch.arange(10 * k, 10 * k + 9)
        return Sample(ids[:-1], ids[1:], torch.tensor([1.0, 1.0, 1.0, 0.0] * 2))


@pytest.fixture
def loader(one_process):
    return Loader(Countable(), one_process, micro_batch_size=2, seq_length=8)


def test_loader_yields_as_many_micro_batches_as_the_batch_holds(loader):
    assert len(list(loader.iteration(0, global_batch_size=6))) == 3


def test_loader_reads_the_samples_in_their_order(loader):
    firsts = [int(row[0]) for batch in loader.iteration(5, global_batch_size=4) for row in batch.tokens]
    assert firsts == [50, 60, 70, 80]


def test_loader_gives_labels_one_token_on(loader):
    (batch,) = loader.iteration(3, global_batch_size=2)
    assert torch.equal(batch.labels, batch.tokens + 1)


def test_loader_keeps_each_samples_loss_mask(loader):
    (batch,) = loader.iteration(3, global_batch_size=2)
    assert batch.loss_mask.tolist() == [[1.0, 1.0, 1.0, 0.0] * 2] * 2


@pytest.mark.parametrize(("document_end", "shape"), [(None, (2, 8)), (53, (1, 16))])
def test_loader_delivers_tokens_of_its_shape(document_end, shape, one_process):
    loader = Loader(Countable(), one_process, micro_batch_size=2, seq_length=8, document_end=document_end)
    (batch,) = loader.iteration(5, global_batch_size=2)
    assert batch.tokens.shape == loader.shape == shape


def test_loader_begins_a_document_after_each_end_and_at_each_sample(one_process):
    loader = Loader(Countable(), one_process, micro_batch_size=2, seq_length=8, document_end=53)
    (batch,) = loader.iteration(5, global_batch_size=2)  # 50 to 57, and 60 to 67
    assert batch.documents.cu_seqlens_q.tolist() == [0, 4, 8, 16]


def test_loader_beyond_the_limit_gives_blanks_that_do_not_count(loader):
    batches = list(loader.iteration(4, global_batch_size=6, limit=7))
    counting = [row.any().item() for batch in batches for row in batch.loss_mask]
    assert counting == [True, True, True, False, False, False]


def test_loader_before_the_limit_leaves_the_samples_alone(loader):
    limited, whole = (list(loader.iteration(4, global_batch_size=4, limit=limit)) for limit in (8, None))
    for one, other in zip(limited, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


def test_loader_fills_blanks_with_tokens_that_the_embedding_knows(loader):
    # Sample 0 stands in: a blank with an id of its own could lie outside the vocabulary.
    *_, last = loader.iteration(4, global_batch_size=4, limit=5)
    assert [row[0].item() for row in last.tokens] == [0, 0]


def test_loader_going_on_after_an_iteration_repeats_and_skips_nothing(loader):
    starts = [int(b.tokens[0, 0]) for first in (0, 4, 8) for b in loader.iteration(first, global_batch_size=4)]
    assert all(after - before == 20 for before, after in pairwise(starts))
