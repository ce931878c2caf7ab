"""The memory estimate against arithmetic done by hand and against Korthikanti et al. 2022."""

from typing import Any

import pytest

from megatron_ext.config.load import config_from_dict
from megatron_ext.config.tree import Config
from megatron_ext.model.memory import GIB, memory_of_stage, memory_per_gpu

TABLES: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 24,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "vocab_size": 32064,
        "make_vocab_size_divisible_by": 64,
        "max_position_embeddings": 2048,
    },
    "data": {"tokenizer": "tok", "train_data": ["prose"]},
    "train": {"seq_length": 2048, "micro_batch_size": 8, "global_batch_size": 512, "train_iters": 10},
    "optimizer": {"lr": 1e-3},
}
TOKENS = 2048 * 8


def build(**changes: Any) -> Config:
    tables: dict[str, Any] = {section: dict(values) for section, values in TABLES.items()}
    for path, value in changes.items():
        section, _, name = path.partition("__")
        tables.setdefault(section, {})[name] = value
    return config_from_dict({"name": "run", **tables})


def layers_only(**changes: Any) -> float:
    """Return the activation bytes of 12 layers without the output layer: stage 0 of 2, one micro-batch."""
    config = build(**{"parallel__pipeline_model_parallel_size": 2, "train__global_batch_size": 8, **changes})
    world_size = 2 * config.parallel.tensor_model_parallel_size
    return memory_of_stage(config, world_size=world_size, stage=0).activations * GIB


def test_memory_pints_states_match_the_bytes_per_parameter() -> None:
    # 1,565,886,464 parameters: 2 bytes of weight, 4 of gradient, 12 of optimizer over 8 ranks
    estimate = memory_per_gpu(build(), world_size=8)
    assert estimate.weights * GIB == pytest.approx(3.132e9, rel=1e-3)
    assert estimate.gradients * GIB == pytest.approx(6.264e9, rel=1e-3)
    assert estimate.optimizer * GIB == pytest.approx(2.349e9, rel=1e-3)


def test_memory_fp32_has_no_master_weights() -> None:
    estimate = memory_per_gpu(build(precision__dtype="fp32"), world_size=1)
    assert estimate.weights * GIB == pytest.approx(4 * 1_565_886_464)
    assert estimate.optimizer * GIB == pytest.approx(8 * 1_565_886_464)


def test_memory_without_distributed_optimizer_keeps_all_states_on_each_rank() -> None:
    config = build(parallel__use_distributed_optimizer=False)
    assert memory_per_gpu(config, world_size=8).optimizer * GIB == pytest.approx(12 * 1_565_886_464)


def test_memory_total_is_the_sum_of_its_parts() -> None:
    estimate = memory_per_gpu(build(), world_size=8)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer + estimate.activations


def test_activations_multi_head_layer_is_korthikantis_without_masks_and_scores() -> None:
    # Their 34 s b h bytes are 32 without the two dropout masks; f = 8h/3 makes our 3 f equal to their 2 x 4h.
    shape = {"model__num_query_groups": 32, "model__hidden_size": 3072, "model__ffn_hidden_size": 8192}
    assert layers_only(**shape) == pytest.approx(12 * TOKENS * (32 * 3072 + 4 * 32))


def test_activations_sequence_parallel_divides_a_layer_by_the_tensor_parallel_size() -> None:
    whole = layers_only(model__num_query_groups=32)
    split = layers_only(
        model__num_query_groups=32,
        parallel__tensor_model_parallel_size=4,
        parallel__sequence_parallel=True,
    )
    assert split == pytest.approx(whole / 4)


def test_activations_tensor_parallel_alone_leaves_the_norms_whole() -> None:
    # bytes per token and layer: norms 2 x 4h, the rest over 4
    without = layers_only(model__num_query_groups=32, parallel__tensor_model_parallel_size=4)
    with_sequence = layers_only(
        model__num_query_groups=32,
        parallel__tensor_model_parallel_size=4,
        parallel__sequence_parallel=True,
    )
    assert without - with_sequence == pytest.approx(12 * TOKENS * 2 * 4 * 2048 * 3 / 4)


def test_activations_full_recomputation_keeps_inputs_and_one_layer() -> None:
    layer = layers_only() / 12
    kept = layers_only(parallel__recompute_granularity="full")
    assert kept == pytest.approx(12 * TOKENS * 2048 * 2 + layer)


def test_activations_selective_recomputation_saves_the_log_sum_exp_only() -> None:
    saved = layers_only() - layers_only(parallel__recompute_granularity="selective")
    assert saved == pytest.approx(12 * TOKENS * 4 * 32)


def test_activations_first_stage_keeps_as_many_micro_batches_as_stages() -> None:
    config = build(parallel__pipeline_model_parallel_size=4)
    first, second = (memory_of_stage(config, world_size=4, stage=stage).activations for stage in (0, 1))
    assert first / second == pytest.approx(4 / 3)


def test_activations_few_micro_batches_bound_what_is_in_flight() -> None:
    config = build(parallel__pipeline_model_parallel_size=4, train__global_batch_size=16)
    first, second = (memory_of_stage(config, world_size=4, stage=stage).activations for stage in (0, 1))
    assert first == pytest.approx(second)


def test_activations_interleaving_costs_the_first_stage_more() -> None:
    plain = build(parallel__pipeline_model_parallel_size=4)
    interleaved = build(parallel__pipeline_model_parallel_size=4, parallel__virtual_pipeline_model_parallel_size=2)
    # 2 x 3 + 1 x 4 + 1 = 11 chunks of 3 layers against 4 micro-batches of 6 layers
    ratio = (
        memory_of_stage(interleaved, world_size=4, stage=0).activations
        / memory_of_stage(plain, world_size=4, stage=0).activations
    )
    assert ratio == pytest.approx(33 / 24)


def test_activations_output_layer_has_logits_in_both_formats() -> None:
    # micro-batch 16 at 2K and 32,128 rows: bf16 and fp32 logits are 6.3 GB
    config = build(train__micro_batch_size=16, model__make_vocab_size_divisible_by=128)
    with_output = memory_per_gpu(config, world_size=1).activations * GIB
    layers = 24 * layers_only(train__micro_batch_size=16, train__global_batch_size=16) / 12
    assert with_output - layers == pytest.approx(6.317e9 + 2 * 2 * 2048 * 16 * 2048, rel=1e-3)


def test_memory_stages_hold_every_parameter_once() -> None:
    config = build(parallel__pipeline_model_parallel_size=4)
    held = sum(memory_of_stage(config, world_size=4, stage=stage).gradients for stage in range(4)) * GIB / 4
    assert held == pytest.approx(1_565_886_464)


def test_memory_tied_embedding_is_copied_to_the_last_stage_only_when_there_are_several() -> None:
    def held(stages: int) -> float:
        config = build(model__share_embeddings_and_output_weights=True, parallel__pipeline_model_parallel_size=stages)
        parts = [memory_of_stage(config, world_size=stages, stage=stage).gradients for stage in range(stages)]
        return sum(parts) * GIB / 4

    assert held(2) - held(1) == pytest.approx(65_667_072)


def test_memory_per_gpu_is_that_of_the_fullest_stage() -> None:
    config = build(parallel__pipeline_model_parallel_size=4)
    stages = [memory_of_stage(config, world_size=4, stage=stage) for stage in range(4)]
    assert memory_per_gpu(config, world_size=4) == max(stages, key=lambda estimate: estimate.total)


def test_memory_fp8_keeps_a_copy_and_a_transpose_of_the_layers_matrices() -> None:
    bf16 = memory_per_gpu(build(), world_size=8)
    fp8 = memory_per_gpu(build(precision__dtype="fp8"), world_size=8)
    assert (fp8.weights - bf16.weights) * GIB == pytest.approx(2 * (226_492_416 + 1_207_959_552))
