"""The tensors of a micro batch: shapes, types, positions."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.data.batch import cut_for_context_rank, share_batch


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
    assert [t.dtype for t in batch[:4]] == [torch.int64, torch.int64, torch.float32, torch.int64]


def test_batch_of_whole_samples_names_no_documents(batch):
    assert batch.documents is None


def test_batch_positions_count_from_zero_in_every_sequence(batch):
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.fixture
def apart(host, one_process):
    """The same two samples, 0 1 2 3 4 and 5 6 7 8 9, where 2 and 9 end a document."""
    host[0, 1, 4] = host[0, 0, 2] = 99
    return share_batch(host, one_process, shape=(2, 5), document_end=99)


def test_batch_of_documents_lays_the_samples_one_after_another(apart):
    assert apart.tokens.tolist() == [[0, 1, 99, 3, 4, 5, 6, 7, 8, 99]]
    assert apart.labels.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert apart.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0, 0, 0, 0, 0]]


def test_batch_of_documents_has_the_types_of_whole_samples(apart, batch):
    assert [t.dtype for t in apart[:4]] == [t.dtype for t in batch[:4]]


def test_batch_positions_count_from_zero_in_every_document(apart):
    assert apart.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]


def test_batch_of_documents_tells_megatron_where_they_begin(apart):
    documents = apart.documents
    assert documents.qkv_format == "thd"
    assert documents.cu_seqlens_q.tolist() == documents.cu_seqlens_kv.tolist() == [0, 3, 5, 10]
    assert documents.cu_seqlens_q.dtype == torch.int32  # Transformer Engine asserts it
    assert documents.max_seqlen_q == documents.max_seqlen_kv == 5


def test_batch_of_documents_is_not_for_context_parallel_ranks(host, one_process):
    with pytest.raises(AssertionError):
        share_batch(host, one_process._replace(context_size=2), shape=(2, 5), document_end=99)


@pytest.mark.parametrize(
    ("rank", "size", "positions"),
    [
        (0, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, 2, [0, 1, 6, 7]),
        (1, 2, [2, 3, 4, 5]),
        (0, 4, [0, 7]),
        (3, 4, [3, 4]),
    ],
)
def test_context_rank_takes_an_early_chunk_and_a_late_one(rank, size, positions):
    tokens = torch.arange(8).expand(3, 8)
    assert cut_for_context_rank(tokens, rank, size).tolist() == [positions] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_context_ranks_have_equal_work_under_a_causal_mask(size):
    # A position at place p attends to p + 1 others.
    work = {int((cut_for_context_rank(torch.arange(24)[None], rank, size) + 1).sum()) for rank in range(size)}
    assert work == {24 * 25 // 2 // size}
