"""Documents kept apart in every parallel layout: the losses and gradient norms of one process."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.tokenizer import Tokenizer
from tests.conftest import Trainer, build_tiny_tokenizer

MASKED = ("--data.eod_mask_loss", "True")
RESET = ("--data.document_mask", "reset", *MASKED)
MICRO2 = ("--train.micro_batch_size", "2")
TP2 = ("--parallel.tensor_model_parallel_size", "2")
PP2 = ("--parallel.pipeline_model_parallel_size", "2")
SP = ("--parallel.sequence_parallel", "True")
LAYOUTS = {
    "tp2_recompute_selective": (2, (*TP2, "--parallel.recompute_granularity", "selective")),
    "tp2_sp": (2, (*TP2, *SP)),
    "tp2_pp2_sp": (4, (*TP2, *PP2, *SP)),
    "dp2_recompute_full": (2, ("--parallel.recompute_granularity", "full")),
    # Stages between the first and the last, which otherwise never see the tokens.
    "pp4": (4, ("--parallel.pipeline_model_parallel_size", "4")),
    # Two chunks on each rank, and all four must see every micro batch.
    "pp2_vpp2": (2, (*PP2, "--parallel.virtual_pipeline_model_parallel_size", "2")),
}
# fp32 sums in another order: about 1e-7 a step was seen; a wrong boundary shows at 1e-3 and more.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def documents_trainer(tmp_path_factory) -> Trainer:
    """Trains on documents of 2 to 24 tokens that end with the end-of-document token."""
    folder = tmp_path_factory.mktemp("documents")
    build_tiny_tokenizer(folder / "tokenizer")
    eod = Tokenizer.load(folder / "tokenizer").eod
    generator = np.random.default_rng(21)
    for name in ("a", "b"):
        with IndexedWriter(folder / name, dtype=np.dtype("<u2")) as writer:
            for _ in range(300):
                period = generator.integers(3, 97, int(generator.integers(2, 9)))
                writer.add_document([*np.resize(period, int(generator.integers(1, 24))), eod])
            writer.publish()
    return Trainer(folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def reference(documents_trainer):
    return documents_trainer.train("one_process", *RESET, *MICRO2)


def column(finished, name: str) -> list[float]:
    return [row[name] for row in finished.rows()]


SLOW = {"tp2_sp", "pp4", "tp2_pp2_sp"}
"""What these cover, other layouts cover too, together with more; .ci/run runs them all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_documents_in_layout_give_the_losses_and_norms_of_one_process(name, reference, documents_trainer):
    ranks, overrides = LAYOUTS[name]
    finished = documents_trainer.train(name, *RESET, *MICRO2, *overrides, ranks=ranks)
    assert column(finished, "iteration") == [1, 2, 3, 4, 5]
    for metric in ("loss", "grad_norm"):
        assert column(finished, metric) == pytest.approx(column(reference, metric), rel=TOLERANCE)
    (valid,), (expected,) = finished.rows("valid"), reference.rows("valid")
    assert valid["tokens"] == expected["tokens"]
    assert valid["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)


@pytest.mark.slow
def test_size_of_the_micro_batch_changes_nothing(reference, documents_trainer):
    # Laid out in rows of 8 samples or one by one, the documents are the same.
    for size in ("1", "8"):
        finished = documents_trainer.train(f"micro_{size}", *RESET, "--train.micro_batch_size", size)
        for metric in ("loss", "grad_norm"):
            assert column(finished, metric) == pytest.approx(column(reference, metric), rel=TOLERANCE)


def test_whole_samples_give_other_losses(reference, documents_trainer):
    # Control: the same samples and the same loss mask, without boundaries.
    whole = documents_trainer.train("whole", *MASKED, *MICRO2)
    pairs = zip(column(whole, "grad_norm"), column(reference, "grad_norm"), strict=True)
    assert all(abs(one - other) > 100 * TOLERANCE * other for one, other in pairs)


def test_data_without_boundaries_end_the_run_on_every_rank(trainer):
    finished = trainer.train("bare", *RESET, ranks=2, fails=True)
    assert finished.returncode != 0 and not finished.run_dir.joinpath("metrics.jsonl").exists()
    assert "/a: data.document_mask (reset) needs documents that end with the end-of-document token" in finished.output
