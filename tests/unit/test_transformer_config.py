"""The adapter to Megatron's TransformerConfig: a Llama, and nothing silently off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.errors import ConfigError
from megatron_ext.model.transformer_config import build_transformer_config, uses_transformer_engine
from megatron_ext.parallel import device

pytestmark = pytest.mark.usefixtures("one_process")
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without CUDA does")


@pytest.fixture
def build(tiny_config):
    return lambda *overrides: build_transformer_config(tiny_config(*overrides))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 4),
        ("hidden_size", 32),
        ("ffn_hidden_size", 64),
        ("num_attention_heads", 4),
        ("num_query_groups", 2),
        ("kv_channels", 8),
        ("normalization", "RMSNorm"),
        ("layernorm_epsilon", 1e-5),
        ("gated_linear_unit", True),
        ("activation_func", F.silu),
        ("add_bias_linear", False),
        ("add_qkv_bias", False),
        ("hidden_dropout", 0.0),
        ("attention_dropout", 0.0),
        ("calculate_per_token_loss", True),
        ("params_dtype", torch.float32),
        ("bf16", False),
        ("fp8", None),
        ("recompute_granularity", None),
    ],
)
def test_config_of_the_tiny_llama_has(field, value, build):
    assert getattr(build(), field) == value


def test_kv_channels_apart_from_the_hidden_size_are_kept(build):
    assert build("--model.kv_channels", "6").kv_channels == 6


@pytest.mark.parametrize("dtype", ["params_dtype", "pipeline_dtype"])
def test_bf16_sets_the_type_of(dtype, build):
    assert getattr(build("--precision.dtype", "bf16"), dtype) is torch.bfloat16


def test_interleaved_chunks_talk_pairwise(build):
    # Batched point-to-point with interleaving gives silently wrong gradients.
    stages = ("--parallel.pipeline_model_parallel_size", "2")
    interleaved = build(*stages, "--parallel.virtual_pipeline_model_parallel_size", "2")
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)


def test_recompute_full_recomputes_blocks_of_the_length_given(build):
    config = build("--parallel.recompute_granularity", "full", "--parallel.recompute_num_layers", "2")
    found = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
    assert found == ("full", "uniform", 2)


def test_recompute_selective_recomputes_the_core_attention(build):
    config = build("--parallel.recompute_granularity", "selective")
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["core_attn"])


@pytest.mark.parametrize("size", ["tensor", "pipeline"])
def test_parallel_size_is_handed_on(size, build):
    name = f"{size}_model_parallel_size"
    assert getattr(build(f"--parallel.{name}", "2"), name) == 2


def test_sequence_parallel_is_handed_on(build):
    tensor = ("--parallel.tensor_model_parallel_size", "2")
    assert build(*tensor, "--parallel.sequence_parallel", "true").sequence_parallel is True


@pytest.mark.parametrize("method", ["init_method", "output_layer_init_method", "embedding_init_method"])
def test_initialisers_leave_weights_as_they_are(method, build):
    weight = torch.full((3, 3), 7.0)
    getattr(build(), method)(weight)
    assert weight.tolist() == [[7.0] * 3] * 3


@CPU_ONLY
def test_auto_without_cuda_takes_the_local_modules(tiny_config):
    assert uses_transformer_engine(tiny_config()) is False


@CPU_ONLY
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.transformer_impl", "transformer_engine"), "model.transformer_impl (transformer_engine) needs"),
        (("--precision.dtype", "fp8"), "precision.dtype (fp8) needs Transformer Engine"),
        (("--parallel.context_parallel_size", "2"), "parallel.context_parallel_size > 1 needs"),
    ],
)
def test_what_this_machine_lacks_is_refused(overrides, message, tiny_config):
    with pytest.raises(ConfigError) as caught:
        uses_transformer_engine(tiny_config(*overrides))
    assert message in str(caught.value)


@CPU_ONLY
def test_everything_that_this_machine_lacks_is_told_at_once(tiny_config):
    config = tiny_config("--precision.dtype", "fp8", "--model.transformer_impl", "transformer_engine")
    with pytest.raises(ConfigError) as caught:
        uses_transformer_engine(config)
    assert len(caught.value.problems) == 2


def test_fp8_before_hopper_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr(device, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(device, "is_hopper_or_later", lambda: False)
    monkeypatch.setattr(device, "name", lambda: "NVIDIA A100")
    with pytest.raises(ConfigError, match="needs a Hopper GPU or later, not NVIDIA A100; use bf16"):
        uses_transformer_engine(tiny_config("--precision.dtype", "fp8"))


@pytest.mark.parametrize(("implementation", "taken"), [("auto", True), ("transformer_engine", True), ("local", False)])
def test_where_transformer_engine_is_there_the_setting_decides(implementation, taken, tiny_config, monkeypatch):
    monkeypatch.setattr(device, "has_transformer_engine", lambda: True)
    config = tiny_config("--model.transformer_impl", implementation, "--precision.dtype", "bf16")
    assert uses_transformer_engine(config) is taken


def test_auto_in_fp32_means_the_local_modules_also_where_transformer_engine_is_there(tiny_config, monkeypatch):
    monkeypatch.setattr(device, "has_transformer_engine", lambda: True)
    assert not uses_transformer_engine(tiny_config("--precision.dtype", "fp32"))


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_deterministic_mode_is_handed_on(wanted, build):
    assert build("--reliability.deterministic", wanted).deterministic_mode is (wanted == "true")


@pytest.mark.parametrize(("wanted", "fused"), [("true", False), ("false", True)])
def test_deterministic_run_does_without_the_fused_loss(wanted, fused, build, monkeypatch):
    monkeypatch.setattr(device, "is_cuda", lambda: True)
    local = ("--model.transformer_impl", "local", "--precision.dtype", "bf16")
    assert build(*local, "--reliability.deterministic", wanted).cross_entropy_loss_fusion is fused
