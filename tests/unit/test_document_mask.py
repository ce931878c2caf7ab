"""Documents kept apart: what the model computes on packed samples is what it computes on each document alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.checks import check_config
from megatron_ext.data.batch import Batch, share_batch
from megatron_ext.data.blend import Sample
from megatron_ext.data.documents import check_document_ends, find_document_end, find_starts
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.loader import Loader
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer
from megatron_ext.training.evaluate import evaluate
from megatron_ext.training.step import Machine, connect

EOD, SEQ_LENGTH, VOCABULARY = 2, 16, 97
RESET = ("--data.document_mask", "reset", "--data.eod_mask_loss", "True")
# Places of EOD in three samples of 16: none; at both ends and twice in a row; in the middle and at the end.
ENDS = ((), (0, 5, 6, 15), (9, 15))
# fp32 sums of 32 products in another order, through 4 layers: up to 1e-6 was seen on values of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Packed(NamedTuple):
    """Three samples, as the loader would deliver them and as a person would read them."""

    batch: Batch
    whole: Batch
    """The same without regard to documents."""
    documents: list[torch.Tensor]
    """Ids of each document, in order."""
    labels: torch.Tensor
    """[3 x 16]"""
    counted: torch.Tensor
    """[3 x 16] True where the loss counts."""


def documents_of(samples: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut samples into documents, token by token."""
    for sample in samples.tolist():
        document: list[int] = []
        for token in sample:
            document.append(token)
            if token == EOD:
                yield torch.tensor(document)
                document = []
        if document:
            yield torch.tensor(document)


@pytest.fixture
def packed(one_process) -> Packed:
    tokens = torch.randint(3, VOCABULARY, (3, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(5))
    for sample, ends in enumerate(ENDS):
        tokens[sample, list(ends)] = EOD
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    counted = inputs != EOD
    host = torch.stack((inputs, labels, counted.long()))
    batch, whole = (share_batch(host.clone(), one_process, shape=(3, SEQ_LENGTH), document_end=e) for e in (EOD, None))
    return Packed(batch, whole, list(documents_of(inputs)), labels.flatten(), counted.flatten())


@pytest.fixture
def model(tiny_config, one_process):
    (chunk,) = build_model(tiny_config())
    # As drawn, attention hardly differs from a mean: make what a token sees matter.
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if "linear" in name:
                parameter.mul_(4)
    return chunk


def packed_logits(model, batch: Batch) -> torch.Tensor:
    """Run a batch as training does; returns [tokens, v]."""
    logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.documents)
    return logits.flatten(0, 1)[:, :VOCABULARY]


def logits_alone(model, documents: list[torch.Tensor]) -> torch.Tensor:
    """Run each document by itself on the ordinary causal path; returns [tokens, v]."""
    rows = [model(ids[None], torch.arange(len(ids))[None], None)[0] for ids in documents]
    return torch.cat(rows)[:, :VOCABULARY]


def test_packed_samples_give_the_logits_of_documents_alone(model, packed):
    assert len(packed.documents) == 7
    torch.testing.assert_close(packed_logits(model, packed.batch), logits_alone(model, packed.documents), **TOLERANCE)


def test_packed_samples_give_the_token_losses_of_documents_alone(model, packed):
    batch = packed.batch
    found = model(batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.documents)
    expected = F.cross_entropy(logits_alone(model, packed.documents), packed.labels, reduction="none")
    torch.testing.assert_close(found.flatten(), expected, **TOLERANCE)


def test_packed_samples_give_the_gradients_of_documents_alone(model, packed):
    parameters = dict(model.named_parameters())

    def gradients(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses = F.cross_entropy(logits, packed.labels, reduction="none")
        return torch.autograd.grad((losses * packed.counted).sum(), list(parameters.values()))

    found = gradients(packed_logits(model, packed.batch))
    expected = gradients(logits_alone(model, packed.documents))
    for name, one, other in zip(parameters, found, expected, strict=True):
        assert other.abs().max() > 0, name
        # Sums over some 40 tokens, of terms of either sign: relative to the largest of the tensor.
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale, msg=lambda text, name=name: f"{name}: {text}")


def test_whole_samples_give_other_logits_behind_the_first_document(model, packed):
    # Control: without document_mask the difference is far beyond the tolerance.
    whole, alone = packed_logits(model, packed.whole), logits_alone(model, packed.documents)
    difference = (whole - alone).abs().amax(-1).reshape(3, SEQ_LENGTH)
    torch.testing.assert_close(whole[:SEQ_LENGTH], alone[:SEQ_LENGTH], **TOLERANCE)  # a sample of one document
    assert (difference[1, 1:] > 1e-2).all() and (difference[2, 10:] > 1e-2).all()


class _Seen(Exception):
    pass


def seen_by_attention(model, tokens: torch.Tensor, positions: torch.Tensor, documents=None) -> list[torch.Tensor]:
    """Catch query and key of the first layer behind the rotary embedding, each [tokens, heads, d]."""
    caught = []

    def catch(_, inputs):
        caught.extend(t.reshape(-1, *t.shape[-2:]) for t in inputs[:2])
        raise _Seen

    hook = model.decoder.layers[0].self_attention.core_attention.register_forward_pre_hook(catch)
    with pytest.raises(_Seen):
        model(tokens, positions, None, packed_seq_params=documents)
    hook.remove()
    return caught


@pytest.mark.parametrize("samples", [1, 3])
def test_rotary_positions_restart_at_every_document(samples, model, packed, one_process):
    # Logits cannot show it: the rotary embedding only enters as the distance of two tokens.
    tokens = packed.whole.tokens[-samples:]
    host = torch.stack((tokens, tokens, torch.ones_like(tokens)))
    batch = share_batch(host, one_process, shape=tuple(tokens.shape), document_end=EOD)
    found = seen_by_attention(model, batch.tokens, batch.position_ids, batch.documents)
    alone = [seen_by_attention(model, ids[None], torch.arange(len(ids))[None]) for ids in documents_of(tokens)]
    assert len(alone) == {1: 2, 3: 7}[samples]
    for one, other in zip(found, map(torch.cat, zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


class Validation:
    """Six samples of random tokens, about one in eight an EOD, which does not count as input."""

    size = 6

    def __getitem__(self, k: int) -> Sample:
        ids = torch.randint(0, VOCABULARY, (SEQ_LENGTH + 1,), generator=torch.Generator().manual_seed(k))
        ids[ids < 12] = EOD
        return Sample(ids[:-1], ids[1:], (ids[:-1] != EOD).float())


def test_validation_loss_is_that_of_documents_alone(tiny_config, one_process):
    config = tiny_config("--train.micro_batch_size", "2", "--train.global_batch_size", "4", *RESET)
    model = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, model.wrapped)
    connect(config, model, optimizer)
    loader = Loader(Validation(), one_process, micro_batch_size=2, seq_length=SEQ_LENGTH, document_end=EOD)
    machine = Machine(config=config, place=one_process, model=model, optimizer=optimizer, loader=loader)
    result = evaluate(machine, loader)
    samples = [Validation()[k] for k in range(6)]
    counted = torch.cat([sample.loss_mask for sample in samples]).bool()
    with torch.no_grad():
        logits = logits_alone(model.bare[0], list(documents_of(torch.stack([s.tokens for s in samples]))))
    expected = F.cross_entropy(logits[counted], torch.cat([s.labels for s in samples])[counted])
    assert result.tokens == counted.sum() < 6 * SEQ_LENGTH
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        ([[5, 6, 7, 8]], [0, 4]),
        ([[5, EOD, 7, 8]], [0, 2, 4]),
        ([[5, 6, 7, EOD]], [0, 4]),
        ([[EOD, EOD, EOD, 8]], [0, 1, 2, 3, 4]),
        ([[5, 6], [7, 8]], [0, 2, 4]),
        ([[5, EOD], [EOD, 8]], [0, 2, 3, 4]),
    ],
)
def test_documents_begin_after_each_end_and_at_each_sample(tokens, starts):
    assert find_starts(torch.tensor(tokens), EOD).tolist() == starts


def write(prefix, documents) -> str:
    with IndexedWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for ids in documents:
            writer.add_document(ids)
        writer.publish()
    return str(prefix)


def test_data_whose_documents_end_is_taken(tmp_path):
    check_document_ends(write(tmp_path / "good", [[5, EOD], [], [EOD], [6, EOD, 7, EOD]] * 200), EOD)


def test_data_without_ends_of_documents_is_refused(tmp_path):
    prefix = write(tmp_path / "bare", [[5, EOD, 6], [7]])
    with pytest.raises(DataError) as raised:
        check_document_ends(prefix, EOD)
    assert str(raised.value) == (
        f"{prefix}: data.document_mask (reset) needs documents that end with the end-of-document token (id 2); of 2 "
        "looked at, 2 do not, the first is sequence 0. Preprocess again with --append-eod (and without "
        '--split-sentences), or set data.document_mask to "none".'
    )


def test_data_half_of_it_without_ends_is_refused(tmp_path):
    prefix = write(tmp_path / "half", [[5, EOD]] * 5000 + [[5, 6]] * 5000)
    with pytest.raises(DataError, match="of 256 looked at, 128 do not, the first is sequence 50[0-9][0-9]"):
        check_document_ends(prefix, EOD)


def test_configuration_with_bare_data_is_refused_before_training(tiny_config, one_process):
    config = tiny_config(*RESET)  # the tiny data have no ends of documents
    with pytest.raises(DataError, match=r"/a: data.document_mask \(reset\) needs documents that end"):
        find_document_end(config, Tokenizer.load(config.data.tokenizer))


def test_configuration_without_the_mask_looks_at_no_data(tiny_config, one_process):
    config = tiny_config()
    assert find_document_end(config, Tokenizer.load(config.data.tokenizer)) is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), []),
        (RESET, []),
        (("--data.document_mask", "reset"), ["data.document_mask (reset) needs data.eod_mask_loss"]),
        (
            (*RESET, "--parallel.context_parallel_size", "2"),
            ["data.document_mask (reset) does not go with parallel.context_parallel_size (2)"],
        ),
    ],
)
def test_configuration_of_the_mask_is_refused_where_it_would_mislead(overrides, expected, tiny_config):
    problems = check_config(tiny_config(*overrides), world_size=None)
    assert len(problems) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(problems, expected, strict=True))
