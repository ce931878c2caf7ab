"""What may be resumed, what is refused, and that what is saved is what is loaded (on one process)."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.fit import sample_changes
from megatron_ext.checkpoint.layout import CheckpointDescription
from megatron_ext.checkpoint.save_load import Checkpoints, Progress
from megatron_ext.config.tree import Config
from megatron_ext.errors import CheckpointError
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.optim.build import build_optimizer, set_rates
from megatron_ext.training.step import connect

pytestmark = pytest.mark.usefixtures("one_process")
SHA256 = "ab" * 32
ONE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "data_parallel_size": 1,
}


class Whole(NamedTuple):
    """A model with its optimizer and checkpoints."""

    chunk: Any
    optimizer: Any
    checkpoints: Checkpoints

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.chunk.parameters()]

    def train(self) -> None:
        """Update once, with gradients that differ everywhere."""
        set_rates(self.optimizer, lr=0.01, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.chunk.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        self.optimizer.step()

    def trained(self) -> Whole:
        """The same after an update: an optimizer that never moved has no state that could be loaded."""
        self.train()
        return self


@pytest.fixture
def build(tiny_config, one_process, tmp_path):
    def build(*overrides: str) -> Whole:
        config = tiny_config(*overrides)
        model = wrap_for_training(config, build_model(config))
        optimizer = build_optimizer(config, model.wrapped)
        connect(config, model, optimizer)
        checkpoints = Checkpoints(
            config,
            one_process,
            directory=tmp_path / "run" / "checkpoints",
            bare_chunks=model.bare,
            optimizer=optimizer,
            tokenizer_sha256=SHA256,
        )
        return Whole(model.bare[0], optimizer, checkpoints)

    return build


def publish(directory: Path, config: Config, **changes: Any) -> Path:
    """Publish a checkpoint that says what is given, and holds nothing."""
    temporary = layout.prepare_temporary(directory, 10)
    (temporary / "file").write_text("content")
    description = CheckpointDescription(
        iteration=10,
        consumed_samples=80,
        consumed_tokens=1280,
        model=asdict(config.model),
        config=asdict(config),
        optimizer_format="dp_reshardable",
        tokenizer_sha256=SHA256,
        topology=ONE,
    )
    return layout.publish(temporary, replace(description, **changes))


@pytest.fixture
def refusal(tiny_config, one_process, tmp_path):
    """Publish a checkpoint and give the message with which resuming from it is refused."""

    def refuse(*overrides: str, **changes: Any) -> str:
        directory = tmp_path / "run" / "checkpoints"
        publish(directory, tiny_config(), **changes)
        checkpoints = Checkpoints(
            tiny_config(*overrides),
            one_process,
            directory=directory,
            bare_chunks=[],
            optimizer=None,
            tokenizer_sha256=SHA256,
        )
        with pytest.raises(CheckpointError) as caught:
            checkpoints.resume()
        return str(caught.value)

    return refuse


# --- there and back -------------------------------------------------------------------------------------------


def test_resume_without_a_checkpoint_is_none(build):
    assert build().checkpoints.resume() is None


def test_resume_says_how_far_the_saved_run_was(build):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    assert build().checkpoints.resume() == Progress(7, 56, 896)


@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["sync", "async"])
def test_resume_gives_the_weights_that_were_saved(asynchronous, build):
    saved = build("--checkpoint.async_save", asynchronous, "--checkpoint.save_interval", "10")
    saved.train()
    saved.checkpoints.save(Progress(1, 8, 128))
    saved.checkpoints.close()
    other = build("--train.seed", "99")
    other.checkpoints.resume()
    assert all(torch.equal(a, b) for a, b in zip(saved.weights(), other.weights(), strict=True))


@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable", "unsharded"])
def test_resumed_optimizer_makes_the_update_that_the_saved_one_makes(form, build):
    option = (
        ("--parallel.use_distributed_optimizer", "false")
        if form == "unsharded"
        else ("--checkpoint.optimizer_format", form)
    )
    saved = build(*option)
    saved.train()
    saved.checkpoints.save(Progress(1, 8, 128))
    other = build(*option, "--train.seed", "99")
    other.checkpoints.resume()
    for whole in (saved, other):
        whole.train()
    assert all(torch.equal(a, b) for a, b in zip(saved.weights(), other.weights(), strict=True))


def test_resume_gives_the_random_state_that_was_saved(build):
    saved = build().trained()
    torch.manual_seed(5)
    saved.checkpoints.save(Progress(1, 8, 128))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    build().checkpoints.resume()
    assert torch.equal(torch.rand(3), expected)


def test_weights_alone_are_those_that_were_saved(build, tmp_path):
    saved = build()
    saved.train()
    saved.checkpoints.save(Progress(1, 8, 128))
    other = build("--train.seed", "99")
    other.checkpoints.load_weights(tmp_path / "run" / "checkpoints" / "iter_0000001")
    assert all(torch.equal(a, b) for a, b in zip(saved.weights(), other.weights(), strict=True))


def test_weights_alone_start_the_optimizer_from_nothing(build, tmp_path):
    # Adam's first update is lr x g/|g| per element, whatever g; a second one is not.
    saved = build()
    saved.train()
    saved.checkpoints.save(Progress(1, 8, 128))
    other = build("--train.seed", "99")
    other.checkpoints.load_weights(tmp_path / "run" / "checkpoints" / "iter_0000001")
    before = other.weights()
    set_rates(other.optimizer, lr=0.01, weight_decay=0.0)
    for parameter in other.chunk.parameters():
        parameter.main_grad.fill_(-1.0)
    other.optimizer.step()
    changes = torch.cat([(a - b).flatten() for a, b in zip(other.weights(), before, strict=True)])
    torch.testing.assert_close(changes, torch.full_like(changes, 0.01), rtol=1e-3, atol=0)


def test_newest_save_is_remembered(build):
    checkpoints = build().checkpoints
    checkpoints.save(Progress(7, 56, 896))
    assert checkpoints.last_saved == 7


def test_newest_save_of_a_resumed_run_is_the_one_it_resumed_from(build):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    checkpoints = build().checkpoints
    checkpoints.resume()
    assert checkpoints.last_saved == 7


def test_saves_beyond_the_number_kept_remove_the_oldest(build, tmp_path):
    checkpoints = build("--checkpoint.keep_last", "2").checkpoints
    for iteration in (1, 2, 3):
        checkpoints.save(Progress(iteration, 8 * iteration, 128 * iteration))
    checkpoints.close()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert names == ["iter_0000002", "iter_0000003"]


def test_save_describes_the_model_and_the_layout(build, tiny_config, tmp_path):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    found = layout.read_description(tmp_path / "run" / "checkpoints" / "iter_0000007")
    assert found == CheckpointDescription(
        iteration=7,
        consumed_samples=56,
        consumed_tokens=896,
        model=asdict(tiny_config().model),
        config=found.config,
        optimizer_format="dp_reshardable",
        tokenizer_sha256=SHA256,
        topology=ONE | {"transformer_engine": 0},
        weights=found.weights,
    )


def test_save_into_an_impossible_directory_is_refused(build, tmp_path):
    checkpoints = build().checkpoints
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint .Not a directory."):
        checkpoints.save(Progress(1, 8, 128))


def test_resume_names_what_it_ignored(build, tmp_path, caplog):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    layout.prepare_temporary(tmp_path / "run" / "checkpoints", 8)
    build().checkpoints.resume()
    assert "iter_0000008.tmp: it was never published" in caplog.text


def test_resume_clears_what_a_dead_start_left(build, tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    build().trained().checkpoints.save(Progress(7, 56, 896))
    for name in ("iter_0000005.removed", "iter_0000007.replaced"):
        (directory / name).mkdir()
    layout.prepare_temporary(directory, 8, "a1b2c3")
    build().checkpoints.resume()
    assert sorted(path.name for path in directory.iterdir()) == ["iter_0000007", "latest"]


def test_resume_without_a_checkpoint_clears_the_save_that_a_dead_start_left(build, tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    layout.prepare_temporary(directory, 8, "a1b2c3")
    assert build().checkpoints.resume() is None
    assert list(directory.iterdir()) == []


def test_resume_that_is_refused_removes_nothing(refusal, tmp_path):
    left = layout.prepare_temporary(tmp_path / "run" / "checkpoints", 20, "a1b2c3")
    assert "of another model" in refusal("--model.num_layers", "2")
    assert left.is_dir()


def test_resume_takes_the_checkpoint_that_a_dead_start_was_replacing(build, tmp_path, caplog):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    published = tmp_path / "run" / "checkpoints" / "iter_0000007"
    published.rename(published.with_suffix(".replaced"))
    assert build().checkpoints.resume() == Progress(7, 56, 896)
    assert f"{published}: has its name back" in caplog.text


# --- refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("num_layers", 4, 2),
        ("hidden_size", 32, 64),
        ("ffn_hidden_size", 64, 96),
        ("num_query_groups", 2, 4),
        ("rotary_base", 10000.0, 500000.0),
        ("layernorm_epsilon", 1e-5, 1e-6),
        ("share_embeddings_and_output_weights", False, True),
    ],
)
def test_checkpoint_of_another_model_is_refused_naming_the_difference(name, there, here, refusal):
    message = refusal(f"--model.{name}", str(here))
    assert "of another model: " in message and f"{name} {there} there, {here} here" in message


def test_checkpoint_of_another_padding_is_refused(refusal):
    message = refusal("--model.make_vocab_size_divisible_by", "64")
    assert "padded vocab_size 112 there, 128 here" in message


def test_checkpoint_of_another_tokenizer_is_refused(refusal):
    assert "trained with another tokenizer than data.tokenizer" in refusal(tokenizer_sha256="cd" * 32)


def test_checkpoint_of_weights_alone_is_refused(refusal):
    message = refusal(optimizer_format=None)
    assert "holds weights only; start from it with checkpoint.init_from" in message


@pytest.mark.parametrize(("form", "option"), [("unsharded", "true"), ("dp_reshardable", "false")])
def test_checkpoint_of_the_other_kind_of_optimizer_is_refused(form, option, refusal):
    message = refusal("--parallel.use_distributed_optimizer", option, optimizer_format=form)
    assert "saved with parallel.use_distributed_optimizer" in message


def test_checkpoint_that_is_not_reshardable_is_refused_at_another_tensor_size(refusal):
    message = refusal(topology=ONE | {"tensor_model_parallel_size": 2})
    assert "parallel.tensor_model_parallel_size 2 -> 1" in message and "fully_reshardable" in message


def test_checkpoint_of_a_later_version_is_refused(refusal, tiny_config):
    message = refusal(model=asdict(tiny_config().model) | {"experts": 8})
    assert "its model is of another version of megapints" in message


def load_weights(config: Config, one_process, path: Path) -> None:
    Checkpoints(
        config, one_process, directory=path.parent, bare_chunks=[], optimizer=None, tokenizer_sha256=SHA256
    ).load_weights(path)


def test_weights_of_another_shape_are_refused(tiny_config, one_process, tmp_path):
    path = publish(tmp_path, tiny_config())
    with pytest.raises(CheckpointError, match="of another model: num_layers 4 there, 2 here"):
        load_weights(tiny_config("--model.num_layers", "2"), one_process, path)


def test_weights_with_another_rotary_base_are_taken_with_a_warning(build, tmp_path, caplog):
    # CodeLlama is continued from Llama's weights with another base.
    build().trained().checkpoints.save(Progress(1, 8, 128))
    caplog.set_level(logging.WARNING)
    build("--model.rotary_base", "1e6").checkpoints.load_weights(tmp_path / "run" / "checkpoints" / "iter_0000001")
    assert "were trained with rotary_base 10000.0 there, 1000000.0 here" in caplog.text


def test_default_spelt_out_is_no_difference(build):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    # 8 is hidden_size / num_attention_heads.
    assert build("--model.kv_channels", "8").checkpoints.resume() is not None


# --- the order of samples -------------------------------------------------------------------------------------


def test_order_of_samples_of_the_same_configuration_is_the_same(tiny_config):
    assert sample_changes(asdict(tiny_config()), tiny_config()) == []


def test_order_of_samples_read_from_json_is_the_same(tiny_config):
    saved = asdict(tiny_config())
    saved["data"]["train_data"] = list(saved["data"]["train_data"])  # JSON has no tuples
    assert sample_changes(saved, tiny_config()) == []


@pytest.mark.parametrize(
    ("overrides", "change"),
    [
        (("--train.seed", "5"), "train.seed 1234 -> 5"),
        (("--train.seq_length", "8"), "train.seq_length 16 -> 8"),
        (("--data.split", "80,20"), "data.split 90,10 -> 80,20"),
        (("--data.train_weights", "1", "2"), "data.train_weights None -> (1.0, 2.0)"),
        (("--data.sample_index", "lazy"), "data.sample_index gpt_dataset -> lazy"),
        (("--data.eod_mask_loss", "True"), "data.eod_mask_loss False -> True"),
    ],
)
def test_setting_that_changes_the_samples_is_named(overrides, change, tiny_config):
    assert sample_changes(asdict(tiny_config()), tiny_config(*overrides)) == [change]


def test_setting_that_a_checkpoint_does_not_know_yet_was_the_default(tiny_config):
    saved = asdict(tiny_config())
    del saved["data"]["sample_index"]
    assert sample_changes(saved, tiny_config()) == []
    assert sample_changes(saved, tiny_config("--data.sample_index", "lazy")) == [
        "data.sample_index gpt_dataset -> lazy"
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ("--train.train_iters", "50"),
        ("--train.micro_batch_size", "2"),
        ("--train.global_batch_size", "16"),
        ("--optimizer.lr", "1"),
    ],
)
def test_setting_that_leaves_the_order_of_samples_alone_is_not_named(overrides, tiny_config):
    assert sample_changes(asdict(tiny_config()), tiny_config(*overrides)) == []


def test_resume_with_another_seed_warns_of_the_order(build, caplog):
    build().trained().checkpoints.save(Progress(7, 56, 896))
    build("--train.seed", "5").checkpoints.resume()
    assert "train.seed 1234 -> 5" in caplog.text
