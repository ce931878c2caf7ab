"""The same losses and gradient norms in every parallel layout, from the same seed, through real megatron-core."""

from __future__ import annotations

import pytest

TP2 = ("--parallel.tensor_model_parallel_size", "2")
PP2 = ("--parallel.pipeline_model_parallel_size", "2")
VPP2 = ("--parallel.virtual_pipeline_model_parallel_size", "2")
SP = ("--parallel.sequence_parallel", "True")
OVERLAP = (
    "--parallel.overlap_grad_reduce", "True", "--parallel.overlap_param_gather", "True",
    "--parallel.ddp_bucket_size", "2000",
)  # fmt: skip
LAYOUTS = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, ()),
    "dp2_unsharded_optimizer": (2, ("--parallel.use_distributed_optimizer", "False")),
    "pp2_vpp2": (2, (*PP2, *VPP2)),
    "tp2_sp": (2, (*TP2, *SP)),
    "tp2_pp2_dp2_sp": (8, (*TP2, *PP2, *SP)),
    "dp2_overlap": (2, OVERLAP),
    "recompute_selective": (1, ("--parallel.recompute_granularity", "selective")),
    "recompute_full": (1, ("--parallel.recompute_granularity", "full")),
}
# fp32 sums in another order: about 1e-7 a step was seen; a wrong gradient shows from the first step at 1e-2 and more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def reference(module_trainer):
    return module_trainer.train("one_process")


# What these cover, other layouts cover too, together with more; .ci/run runs them all.
SLOW = {"dp2_unsharded_optimizer", "tp2_sp", "recompute_selective"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_training_in_layout_gives_the_losses_and_norms_of_one_process(name, reference, module_trainer):
    ranks, overrides = LAYOUTS[name]
    finished = module_trainer.train(name, *overrides, ranks=ranks)
    expected, found = reference.rows(), finished.rows()
    assert [row["iteration"] for row in found] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=TOLERANCE)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in expected], rel=TOLERANCE)
    (valid,), (expected_valid,) = finished.rows("valid"), reference.rows("valid")
    assert valid["loss"] == pytest.approx(expected_valid["loss"], rel=TOLERANCE)
    assert valid["tokens"] == expected_valid["tokens"]


def test_tied_embeddings_in_layout_give_the_losses_of_one_process(module_trainer):
    tied = ("--model.share_embeddings_and_output_weights", "True")
    one = module_trainer.train("tied_one", *tied)
    four = module_trainer.train("tied_four", *tied, *TP2, *PP2, ranks=4)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in four.rows()] == pytest.approx([r[name] for r in one.rows()], rel=TOLERANCE)


@pytest.mark.parametrize("multiple", [pytest.param("1", marks=pytest.mark.slow), "128"])
def test_padding_of_the_vocabulary_changes_nothing(multiple, reference, module_trainer):
    finished = module_trainer.train(f"padded_{multiple}", "--model.make_vocab_size_divisible_by", multiple)
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in reference.rows()]
        assert [row[name] for row in finished.rows()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_training_learns_the_repeating_tokens(module_trainer):
    finished = module_trainer.train("long", "--train.train_iters", "150", "--log.interval", "50")
    losses = [row["loss"] for row in finished.rows()]
    assert losses[-1] < losses[0] - 0.2


def test_data_order_is_the_same_for_another_length_of_the_run(reference, module_trainer):
    # A constant rate, so that only the data could make a difference.
    constant = ("--optimizer.lr_decay_style", "constant", "--optimizer.min_lr", "0")
    short = module_trainer.train("short", *constant)
    longer = module_trainer.train("longer", *constant, "--train.train_iters", "9")
    assert [row["loss"] for row in longer.rows()[:5]] == [row["loss"] for row in short.rows()]
