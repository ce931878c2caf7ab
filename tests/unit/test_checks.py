"""Rules of the configuration: each bad setting gives its message, and a sound one none."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.checks import check_config, check_files
from megatron_ext.config.load import config_from_dict
from megatron_ext.config.tree import Config

SOUND = """
name = "run"
[model]
num_layers = 24
hidden_size = 2048
ffn_hidden_size = 8192
num_attention_heads = 32
num_query_groups = 4
vocab_size = 32064
make_vocab_size_divisible_by = 64
max_position_embeddings = 2048
[data]
tokenizer = "tok"
train_data = ["prose", "code"]
[train]
seq_length = 2048
micro_batch_size = 8
global_batch_size = 512
train_iters = 1000
[optimizer]
lr = 4e-4
min_lr = 4e-5
lr_warmup_iters = 100
"""


def build(**changes: Any) -> Config:
    """Build the sound configuration with some fields changed; `model__num_layers=3` is model.num_layers."""
    tables = tomllib.loads(SOUND)
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    return config_from_dict(tables)


def problems(world_size: int | None = 8, **changes: Any) -> list[str]:
    return check_config(build(**changes), world_size=world_size, files=False)


BAD: list[tuple[str, dict[str, Any]]] = [
    # ranges
    ("model.num_layers (0) must be at least 1.", {"model__num_layers": 0}),
    ("train.micro_batch_size (-8) must be at least 1.", {"train__micro_batch_size": -8}),
    ("optimizer.lr (0.0) must be greater than 0.", {"optimizer__lr": 0, "optimizer__min_lr": 0}),
    ("optimizer.lr (nan) must be greater than 0.", {"optimizer__lr": float("nan")}),
    ("optimizer.weight_decay (inf) must be at least 0.", {"optimizer__weight_decay": float("inf")}),
    ("optimizer.adam_beta2 (1.0) must be less than 1.", {"optimizer__adam_beta2": 1}),
    ("checkpoint.keep_last (0) must be at least 1.", {"checkpoint__keep_last": 0}),
    ("train.eval_iters (0) must be at least 1.", {"train__eval_iters": 0}),
    ("train.seed (2147483648) must be less than 2^31.", {"train__seed": 2**31}),
    (
        'name ("a/b") must be letters, digits, ".", "_" and "-", beginning with a letter or digit, because'
        " it names the run's folder.",
        {"name": "a/b"},
    ),
    # heads and lengths
    (
        "model.num_attention_heads (24) must divide model.hidden_size (2048); or set model.kv_channels.",
        {"model__num_attention_heads": 24},
    ),
    (
        "the width of a head (63) must be even, because the rotary embedding turns pairs; change "
        "model.kv_channels or model.num_attention_heads.",
        {"model__kv_channels": 63},
    ),
    (
        "model.num_query_groups (5) must divide model.num_attention_heads (32); use 1, 2, 4, 8, 16 or 32.",
        {"model__num_query_groups": 5},
    ),
    (
        "train.seq_length (4096) must not exceed model.max_position_embeddings (2048); shorten the one or "
        "raise the other.",
        {"train__seq_length": 4096},
    ),
    # tensor parallelism
    (
        "parallel.tensor_model_parallel_size (3) must divide model.num_attention_heads (32); use 1, 2, 4 or 8.",
        {"parallel__tensor_model_parallel_size": 3},
    ),
    (
        "parallel.tensor_model_parallel_size (4) must divide model.num_query_groups (6) or be a multiple "
        "of it; use 1 or 2.",
        {
            "parallel__tensor_model_parallel_size": 4,
            "model__num_query_groups": 6,
            "model__num_attention_heads": 24,
            "model__kv_channels": 64,
        },
    ),
    (
        "parallel.tensor_model_parallel_size (8) must divide model.ffn_hidden_size (8188); use 1, 2 or 4.",
        {"parallel__tensor_model_parallel_size": 8, "model__ffn_hidden_size": 8188},
    ),
    (
        "parallel.tensor_model_parallel_size (4) must divide the padded vocabulary (32062; see "
        "model.make_vocab_size_divisible_by); use 1 or 2.",
        {
            "parallel__tensor_model_parallel_size": 4,
            "model__make_vocab_size_divisible_by": 2,
            "model__vocab_size": 32061,
        },
    ),
    # pipeline parallelism
    (
        "parallel.pipeline_model_parallel_size (2) must divide model.num_layers (25); use 1, 5 or 25.",
        {"parallel__pipeline_model_parallel_size": 2, "model__num_layers": 25},
    ),
    (
        "parallel.virtual_pipeline_model_parallel_size (2) needs parallel.pipeline_model_parallel_size "
        "greater than 1; raise it or leave the chunks out.",
        {"parallel__virtual_pipeline_model_parallel_size": 2},
    ),
    (
        "parallel.virtual_pipeline_model_parallel_size (1) must be at least 2; leave it out for one chunk per stage.",
        {"parallel__virtual_pipeline_model_parallel_size": 1},
    ),
    (
        "parallel.pipeline_model_parallel_size (2) x parallel.virtual_pipeline_model_parallel_size (5) "
        "must divide model.num_layers (24); together they may be 1, 2, 3, 4, 6, 8, 12 or 24.",
        {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 5},
    ),
    (
        "train.global_batch_size (96) makes 3 micro-batches, which must be a multiple of "
        "parallel.pipeline_model_parallel_size (2) with interleaved chunks; change the batch, or leave "
        "virtual_pipeline_model_parallel_size out.",
        {
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__virtual_pipeline_model_parallel_size": 2,
            "train__global_batch_size": 96,
        },
    ),
    (
        "parallel.recompute_num_layers (13) must not exceed the 12 layers of a model chunk; lower it.",
        {
            "parallel__pipeline_model_parallel_size": 2,
            "parallel__recompute_granularity": "full",
            "parallel__recompute_num_layers": 13,
        },
    ),
    # sequence and context parallelism
    (
        "parallel.sequence_parallel (true) has no effect with parallel.tensor_model_parallel_size 1; raise"
        " the size or leave it out.",
        {"parallel__sequence_parallel": True},
    ),
    (
        "train.seq_length (2047) must be a multiple of parallel.tensor_model_parallel_size x "
        "context_parallel_size (2) for parallel.sequence_parallel; change one of them.",
        {
            "parallel__sequence_parallel": True,
            "parallel__tensor_model_parallel_size": 2,
            "train__seq_length": 2047,
        },
    ),
    (
        "parallel.context_parallel_size (2) needs Transformer Engine's attention; set "
        "model.transformer_impl to auto or transformer_engine, or use 1.",
        {"parallel__context_parallel_size": 2, "model__transformer_impl": "local"},
    ),
    (
        "train.seq_length (2046) must be a multiple of 2 x parallel.context_parallel_size (4), because "
        "each rank takes two slices; change one of them.",
        {"parallel__context_parallel_size": 2, "train__seq_length": 2046},
    ),
    # batches
    (
        "train.global_batch_size (500) must be a multiple of train.micro_batch_size x data-parallel size "
        "(8 x 8 = 64); change one of them.",
        {"train__global_batch_size": 500},
    ),
    (
        "the ramp-up's batch size (96) must be a multiple of train.micro_batch_size x data-parallel size "
        "(8 x 8 = 64); change one of them.",
        {"train__rampup_batch_size": [64, 32, 10000]},
    ),
    (
        "train.rampup_batch_size: its increment (100) must divide the way from 64 to train.global_batch_size "
        "(512); use 1, 2, 4, 7, 8, 14 ... or 448.",
        {"train__rampup_batch_size": [64, 100, 10000]},
    ),
    (
        "train.rampup_batch_size: its start (512) must be less than train.global_batch_size (512); lower "
        "it or leave the ramp-up out.",
        {"train__rampup_batch_size": [512, 64, 10000]},
    ),
    # overlap and FP8
    (
        "parallel.overlap_param_gather (true) needs parallel.overlap_grad_reduce; set that to true too.",
        {"parallel__overlap_param_gather": True},
    ),
    (
        "parallel.overlap_param_gather (true) needs parallel.use_distributed_optimizer; set that to true too.",
        {
            "parallel__overlap_param_gather": True,
            "parallel__overlap_grad_reduce": True,
            "parallel__use_distributed_optimizer": False,
        },
    ),
    (
        "precision.dtype (fp8) needs Transformer Engine; set model.transformer_impl to auto or "
        "transformer_engine, or use bf16.",
        {"precision__dtype": "fp8", "model__transformer_impl": "local"},
    ),
    (
        "precision.first_last_layers_bf16 (true) does not go with precision.fp8_recipe (delayed); use "
        "tensorwise or blockwise.",
        {
            "precision__dtype": "fp8",
            "precision__fp8_recipe": "delayed",
            "precision__first_last_layers_bf16": True,
        },
    ),
    (
        "precision.fp8_param_gather (true) needs parallel.use_distributed_optimizer; set it too.",
        {
            "precision__dtype": "fp8",
            "precision__fp8_param_gather": True,
            "parallel__use_distributed_optimizer": False,
        },
    ),
    (
        "model.ffn_hidden_size is 1028 on each rank, which must be a multiple of 16 for precision.dtype "
        "(fp8); change the shape or the parallel sizes, or use bf16.",
        {
            "precision__dtype": "fp8",
            "model__ffn_hidden_size": 4112,
            "parallel__tensor_model_parallel_size": 4,
        },
    ),
    # data and evaluation
    (
        "data.train_weights has 1 values, and data.train_data 2 prefixes; give one weight for each.",
        {"data__train_weights": [1.0]},
    ),
    (
        "data.train_weights (0.0) must be greater than 0; leave out a prefix not wanted.",
        {"data__train_weights": [1.0, 0.0]},
    ),
    ("data.train_data is empty; name at least one prefix or give a data.blend_file.", {"data__train_data": []}),
    ("data.valid_data is empty; name at least one prefix.", {"data__valid_data": []}),
    (
        # 1000 iterations of 512 samples of 2048 tokens
        "data.train_weights (in tokens) add up to 2,000,000,000 tokens, and the run reads 1,048,576,000; set "
        "train.train_iters to 1907, or change the weights.",
        {"data__train_weights": [1.5e9, 0.5e9], "data__train_weights_unit": "tokens"},
    ),
    (
        "data.train_weights_unit (tokens) has no effect without data.train_weights; leave it out or change that.",
        {"data__train_weights_unit": "tokens"},
    ),
    (
        "data.path_to_cache (cache) has no effect with data.sample_index lazy; leave it out or change that.",
        {"data__sample_index": "lazy", "data__path_to_cache": "cache"},
    ),
    (
        "data.train_data (prose.bin) must be a prefix; leave the ending away: prose.",
        {"data__train_data": ["prose.bin"]},
    ),
    (
        "data.train_data names prose twice; name it once (data.train_weights can raise its share).",
        {"data__train_data": ["prose", "prose"]},
    ),
    (
        "data.valid_data (prose) is in data.train_data too; validate on other documents.",
        {"data__valid_data": ["prose"]},
    ),
    (
        'data.split ("90") must be two numbers, for training and validation; for example "99,1".',
        {"data__split": "90"},
    ),
    (
        'data.split ("100,0") leaves nothing for validation; give a share, name data.valid_data, or set '
        'train.eval_interval to "none".',
        {"data__split": "100,0"},
    ),
    # schedule and length
    (
        "train.exit_iters (1001) must not exceed train.train_iters (1000); lower it or leave it out.",
        {"train__exit_iters": 1001},
    ),
    ("optimizer.min_lr (0.001) must not exceed optimizer.lr (0.0004).", {"optimizer__min_lr": 1e-3}),
    (
        "optimizer.lr_warmup_iters (1000) must end before the decay does (1000 iterations at the full "
        "batch); shorten it.",
        {"optimizer__lr_warmup_iters": 1000},
    ),
    (
        "optimizer.lr_decay_style (wsd) needs optimizer.lr_wsd_decay_iters; give the decay's length.",
        {"optimizer__lr_decay_style": "wsd"},
    ),
    (
        "optimizer.lr_wsd_decay_iters (901) must fit between the end of the warm-up and the end of the "
        "decay; use at most 900.",
        {"optimizer__lr_decay_style": "wsd", "optimizer__lr_wsd_decay_iters": 901},
    ),
    (
        "checkpoint.keep_every (1500) must be a multiple of checkpoint.save_interval (1000): other "
        "iterations are not saved.",
        {"checkpoint__keep_last": 1, "checkpoint__keep_every": 1500},
    ),
    # settings that would be silently ignored
    (
        "precision.fp8_param_gather (true) has no effect with precision.dtype bf16; leave it out or change that.",
        {"precision__fp8_param_gather": True},
    ),
    (
        "parallel.ddp_bucket_size (40000000) has no effect without parallel.overlap_grad_reduce; leave it "
        "out or change that.",
        {"parallel__ddp_bucket_size": 40_000_000},
    ),
    (
        "parallel.recompute_num_layers (2) has no effect with parallel.recompute_granularity none; leave "
        "it out or change that.",
        {"parallel__recompute_num_layers": 2},
    ),
    (
        "data.split (90,10) has no effect with data.valid_data; leave it out or change that.",
        {"data__split": "90,10", "data__valid_data": ["held_out"]},
    ),
    (
        'train.eval_iters (5) has no effect with train.eval_interval "none"; leave it out or change that.',
        {"train__eval_interval": "none", "train__eval_iters": 5},
    ),
    (
        "optimizer.lr_wsd_decay_iters (10) has no effect with optimizer.lr_decay_style cosine; leave it "
        "out or change that.",
        {"optimizer__lr_wsd_decay_iters": 10},
    ),
    (
        "optimizer.min_lr (4e-05) has no effect with optimizer.lr_decay_style constant; leave it out or change that.",
        {"optimizer__lr_decay_style": "constant"},
    ),
    (
        "checkpoint.keep_every (2000) has no effect without checkpoint.keep_last, because all are kept; "
        "leave it out or change that.",
        {"checkpoint__keep_every": 2000},
    ),
    (
        'checkpoint.async_save (true) has no effect with checkpoint.save_interval "none"; leave it out or change that.',
        {"checkpoint__async_save": True, "checkpoint__save_interval": "none"},
    ),
    (
        "model.init_method (megatron) has no effect with checkpoint.init_from, because the weights are read; "
        "leave it out or change that.",
        {"model__init_method": "megatron", "checkpoint__init_from": "hf/model"},
    ),
    ("reliability.max_bad_iterations (0) must be at least 1.", {"reliability__max_bad_iterations": 0}),
    ("reliability.rewind_skip_iters (-1) must be at least 0.", {"reliability__rewind_skip_iters": -1}),
    ("reliability.spike_deviations (0.0) must be greater than 0.", {"reliability__spike_deviations": 0.0}),
    ("reliability.replica_check_interval (0) must be at least 1.", {"reliability__replica_check_interval": 0}),
    ("reliability.straggler_interval (0) must be at least 1.", {"reliability__straggler_interval": 0}),
    (
        "reliability.straggler_ratio (1.0) must be greater than 1, which is the median rank itself.",
        {"reliability__straggler_ratio": 1.0},
    ),
    (
        'reliability.straggler_ratio (2.0) has no effect with reliability.straggler_interval "none"; leave it out or '
        "change that.",
        {"reliability__straggler_ratio": 2.0, "reliability__straggler_interval": "none"},
    ),
    (
        "reliability.spike_window_iters (9) must be at least 10: fewer losses say nothing of how much they vary.",
        {"reliability__spike_deviations": 6.0, "reliability__spike_window_iters": 9},
    ),
    (
        "reliability.bad_iteration_policy (rewind) goes back to the last checkpoint, and checkpoint.save_interval "
        '("none") saves none before the run stops; give an interval, or take the policy skip.',
        {"reliability__bad_iteration_policy": "rewind", "checkpoint__save_interval": "none"},
    ),
    (
        "reliability.max_bad_iterations (5) has no effect with reliability.bad_iteration_policy stop; leave it out or "
        "change that.",
        {"reliability__max_bad_iterations": 5},
    ),
    (
        "reliability.rewind_skip_iters (2) has no effect with reliability.bad_iteration_policy skip; leave it out or "
        "change that.",
        {"reliability__bad_iteration_policy": "skip", "reliability__rewind_skip_iters": 2},
    ),
    (
        "reliability.spike_window_iters (50) has no effect without reliability.spike_deviations; leave it out or "
        "change that.",
        {"reliability__spike_window_iters": 50},
    ),
]


@pytest.mark.parametrize(("message", "changes"), BAD, ids=[message.split(" (")[0] for message, _ in BAD])
def test_check_config_bad_setting_gives_its_message(message: str, changes: dict[str, Any]) -> None:
    assert message in problems(**changes)


def test_check_config_sound_configuration_has_no_problem() -> None:
    assert problems() == []


@pytest.mark.parametrize("tokens", [1.04e9, 1.05e9])
def test_check_config_planned_tokens_close_to_those_of_the_run_are_accepted(tokens: float) -> None:
    changes = {"data__train_weights": [tokens - 1e8, 1e8], "data__train_weights_unit": "tokens"}
    assert problems(**changes) == []


def test_check_config_proportions_need_not_add_up_to_anything() -> None:
    assert problems(data__train_weights=[3.0, 4.0]) == []


def test_check_config_three_mistakes_are_listed_at_once() -> None:
    found = problems(
        parallel__tensor_model_parallel_size=3, optimizer__min_lr=1.0, train__exit_iters=2000, world_size=None
    )
    assert [message.split(" ")[0] for message in found] == [
        "parallel.tensor_model_parallel_size",
        "train.exit_iters",
        "optimizer.min_lr",
    ]


def test_check_config_size_of_zero_does_not_hide_other_sections() -> None:
    found = problems(train__micro_batch_size=0, parallel__tensor_model_parallel_size=3)
    assert "train.micro_batch_size (0) must be at least 1." in found
    assert any(message.startswith("parallel.tensor_model_parallel_size (3)") for message in found)


def test_check_config_world_size_not_a_multiple_of_the_replica_is_refused() -> None:
    assert problems(world_size=6, parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2) == [
        "the number of processes (6) must be a multiple of tensor x pipeline x context parallel size "
        "(2 x 2 x 1 = 4); start 4 or a multiple, or change them."
    ]


def test_check_config_unknown_world_size_leaves_the_data_parallel_rules_out() -> None:
    assert problems(world_size=None, train__global_batch_size=8) == []
    assert problems(world_size=8, train__global_batch_size=8) != []


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_check_config_tensor_parallel_size_above_the_groups_is_accepted(size: int) -> None:
    assert problems(parallel__tensor_model_parallel_size=size, model__num_query_groups=1) == []


def test_check_config_interleaved_pipeline_with_fitting_batches_is_accepted() -> None:
    assert (
        problems(
            parallel__pipeline_model_parallel_size=2,
            parallel__virtual_pipeline_model_parallel_size=2,
            train__global_batch_size=128,
        )
        == []
    )


def test_check_config_warmup_longer_than_a_short_ramped_run_is_refused() -> None:
    # 40 iterations stay below the full batch: 40 x 64 samples, and the warm-up counts 10 x 512.
    changes = {"train__rampup_batch_size": [64, 448, 10**6], "train__train_iters": 40}
    assert any(
        message.startswith("optimizer.lr_warmup_iters (10) must end before")
        for message in problems(optimizer__lr_warmup_iters=10, **changes)
    )


def test_check_files_missing_files_are_each_named(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "prose.bin").touch()
    config = build(
        data__tokenizer=str(tmp_path / "tok"),
        data__train_data=[str(tmp_path / "prose"), str(tmp_path / "code")],
        checkpoint__init_from=str(tmp_path / "hf"),
    )
    tokenizer, prose, code, start = check_files(config)
    assert tokenizer.startswith(f"data.tokenizer ({tmp_path}/tok) has no tokenizer.json;")
    assert prose.startswith(f"data.train_data ({tmp_path}/prose): {tmp_path}/prose.idx not found;")
    assert f"{tmp_path}/code.bin and {tmp_path}/code.idx not found" in code
    assert start.startswith(f"checkpoint.init_from ({tmp_path}/hf) not found;")


def test_check_files_tokenizer_that_is_no_folder_is_named(tmp_path: Path) -> None:
    assert check_files(build(data__tokenizer=str(tmp_path / "no")))[0].startswith(
        f"data.tokenizer ({tmp_path}/no) is not a folder;"
    )


def test_check_config_with_all_files_there_has_no_problem(tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").touch()
    for name in ("prose.bin", "prose.idx"):
        (tmp_path / name).touch()
    config = build(data__tokenizer=str(tmp_path / "tok"), data__train_data=[str(tmp_path / "prose")])
    assert check_config(config, world_size=8) == []


def test_check_config_files_false_does_not_look_at_the_disk() -> None:
    config = build()
    assert check_config(config, world_size=8, files=False) == []
    assert len(check_config(config, world_size=8)) == 3
