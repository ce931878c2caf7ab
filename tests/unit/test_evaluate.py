"""The validation loss against torch's cross-entropy over the same samples."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.data.blend import Sample
from megatron_ext.data.loader import Loader
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer
from megatron_ext.training.evaluate import evaluate
from megatron_ext.training.step import Machine, connect

SEQ_LENGTH = 16


class ValidationSamples:
    """Ten samples of random tokens; sample k counts its first k + 1 labels, so their means weigh differently."""

    size = 10

    def __getitem__(self, k: int) -> Sample:
        assert 0 <= k < self.size, k
        ids = torch.randint(0, 97, (SEQ_LENGTH + 1,), generator=torch.Generator().manual_seed(k))
        return Sample(ids[:-1], ids[1:], (torch.arange(SEQ_LENGTH) <= k).float())


class Trained(NamedTuple):
    machine: Machine
    loader: Loader

    def reference(self, samples: int) -> float:
        """Mean loss over the labels that count in the first samples, one sample at a time."""
        (chunk,) = self.machine.model.bare
        loss_sum = tokens = 0.0
        for k in range(samples):
            sample = ValidationSamples()[k]
            with torch.no_grad():
                padded = chunk(sample.tokens[None], torch.arange(SEQ_LENGTH)[None], None)[0].double()
            logits = padded[:, : self.machine.config.model.vocab_size]
            losses = F.cross_entropy(logits, sample.labels, reduction="none")
            loss_sum += (losses * sample.loss_mask).sum().item()
            tokens += sample.loss_mask.sum().item()
        return loss_sum / tokens


@pytest.fixture
def build(tiny_config, one_process):
    def build(*overrides: str) -> Trained:
        config = tiny_config("--train.micro_batch_size", "2", "--train.global_batch_size", "4", *overrides)
        model = wrap_for_training(config, build_model(config))
        optimizer = build_optimizer(config, model.wrapped)
        connect(config, model, optimizer)
        loader = Loader(ValidationSamples(), one_process, micro_batch_size=2, seq_length=SEQ_LENGTH)
        machine = Machine(config=config, place=one_process, model=model, optimizer=optimizer, loader=loader)
        return Trained(machine, loader)

    return build


def test_loss_is_the_mean_over_the_tokens_of_all_samples(build):
    trained = build("--train.eval_iters", "2")
    # fp32 forward passes of a batch of two and of one: about 1e-7 apart.
    assert evaluate(trained.machine, trained.loader).loss == pytest.approx(trained.reference(8), rel=1e-6)


def test_tokens_are_those_that_count(build):
    trained = build("--train.eval_iters", "2")
    assert evaluate(trained.machine, trained.loader).tokens == sum(range(1, 9))


def test_small_validation_set_is_read_once(build):
    # Ten samples in batches of four: the last batch is half blank.
    trained = build("--train.eval_iters", "50")
    result = evaluate(trained.machine, trained.loader)
    assert result.tokens == sum(range(1, 11))
    assert result.loss == pytest.approx(trained.reference(10), rel=1e-6)


def test_validation_leaves_the_weights_alone(build):
    trained = build("--train.eval_iters", "2")
    before = [p.detach().clone() for p in trained.machine.model.bare[0].parameters()]
    evaluate(trained.machine, trained.loader)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.machine.model.bare[0].parameters(), strict=True))


def test_validation_leaves_no_gradient(build):
    trained = build("--train.eval_iters", "2")
    evaluate(trained.machine, trained.loader)
    assert all(not p.main_grad.any() for p in trained.machine.model.bare[0].parameters())


def test_model_is_in_training_mode_afterwards(build):
    trained = build("--train.eval_iters", "2")
    evaluate(trained.machine, trained.loader)
    assert all(chunk.training for chunk in trained.machine.model.wrapped)


def test_validation_twice_gives_the_same(build):
    trained = build("--train.eval_iters", "2")
    assert evaluate(trained.machine, trained.loader) == evaluate(trained.machine, trained.loader)
