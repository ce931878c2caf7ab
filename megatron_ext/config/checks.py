"""Rules on the values of a configuration, alone and across sections: every problem at once, before torch.

What cannot be known on a login node (is there a GPU, does Transformer Engine import) is checked where the
run starts. Rules of Megatron that only its own training script enforces, or that nothing enforces, are
here and in `layout_checks`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from megatron_ext.config import derived, layout_checks
from megatron_ext.config.tree import Config

_AT_LEAST_ZERO = """train.seed optimizer.lr_warmup_iters optimizer.min_lr optimizer.weight_decay
    optimizer.clip_grad optimizer.adam_beta1 optimizer.adam_beta2 reliability.rewind_skip_iters"""
_AT_LEAST_ONE = """model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads
    model.num_query_groups model.kv_channels model.vocab_size model.make_vocab_size_divisible_by
    model.max_position_embeddings model.rotary_scaling_factor
    parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.context_parallel_size
    parallel.ddp_bucket_size parallel.recompute_num_layers
    train.seq_length train.micro_batch_size train.global_batch_size train.train_iters train.exit_iters
    train.eval_interval train.eval_iters train.manual_gc_interval
    optimizer.lr_decay_iters optimizer.lr_wsd_decay_iters reliability.max_bad_iterations
    reliability.replica_check_interval reliability.straggler_interval
    checkpoint.save_interval checkpoint.keep_last checkpoint.keep_every log.interval"""
_ABOVE_ZERO = """model.layernorm_epsilon model.rotary_base model.init_method_std model.output_init_method_std
    parallel.distributed_timeout_minutes data.max_epochs train.exit_duration_minutes
    optimizer.lr optimizer.adam_eps reliability.spike_deviations log.peak_tflops"""

# Losses without which their standard deviation is not one to go by.
_SMALLEST_WINDOW = 10
# How far the tokens that train_weights add up to may be from those that the run reads.
_PLAN_TOLERANCE = 0.01


def check_config(config: Config, *, world_size: int | None, files: bool = True) -> list[str]:
    """Find every problem of a configuration.

    Args:
        config: the configuration.
        world_size: number of processes; None where it is not known yet (rules on it are then left out).
        files: also look for the files that it names (`check_files`).

    Returns:
        One message per problem; empty when the configuration is sound.
    """
    problems = []
    broken = set()
    for section, message in _range_problems(config):
        problems.append(message)
        broken.add(section)
    for rule, sections in _RULES.items():
        # A rule that divides by a size of 0 would say nothing true; the range problem comes first.
        if not broken.intersection(sections):
            problems.extend(rule(config))
    if not broken.intersection(("model", "parallel", "train")):
        problems.extend(layout_checks.check_world_and_batch(config, world_size))
    problems.extend(_ignored_settings(config))
    if files:
        problems.extend(check_files(config))
    return problems


def check_files(config: Config) -> list[str]:
    """Look for the tokenizer, data files and initial weights; relative paths are from the current folder."""
    problems = []
    tokenizer = Path(config.data.tokenizer)
    if not tokenizer.is_dir():
        problems.append(
            f"data.tokenizer ({tokenizer}) is not a folder; make one with tools/build_tokenizer.py, "
            "or start where the path is right."
        )
    elif not (tokenizer / "tokenizer.json").is_file():
        problems.append(
            f"data.tokenizer ({tokenizer}) has no tokenizer.json; name a folder that has, or make one with "
            "tools/build_tokenizer.py."
        )
    for name in ("train_data", "valid_data"):
        for prefix in getattr(config.data, name) or ():
            missing = [prefix + end for end in (".bin", ".idx") if not Path(prefix + end).is_file()]
            if missing:
                problems.append(
                    f"data.{name} ({prefix}): {' and '.join(missing)} not found; make them with "
                    "tools/preprocess_data.py, or start where the path is right."
                )
    start = config.checkpoint.init_from
    if start is not None and not Path(start).exists():
        problems.append(
            f"checkpoint.init_from ({start}) not found; name a run, a checkpoint, or a Hugging Face folder "
            "on this machine."
        )
    if config.run_dir and Path(config.run_dir).is_file():
        problems.append(f"run_dir ({config.run_dir}) is a file; name a folder (it is made if absent).")
    return problems


def _range_problems(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (section, message) for each value that is out of its range whatever the others are."""
    fits: Callable[[float], bool]
    for paths, fits, range_ in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (_ABOVE_ZERO, lambda value: value > 0, "greater than 0"),
    ):
        for path in paths.split():
            section, _, name = path.partition(".")
            value = getattr(getattr(config, section), name)
            if value is not None and not (math.isfinite(value) and fits(value)):
                yield section, f"{path} ({value}) must be {range_}."
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and chunks < 2:
        yield (
            "parallel",
            f"parallel.virtual_pipeline_model_parallel_size ({chunks}) must be at least 2; "
            "leave it out for one chunk per stage.",
        )
    for name in ("adam_beta1", "adam_beta2"):
        if (beta := getattr(config.optimizer, name)) >= 1:
            yield "optimizer", f"optimizer.{name} ({beta}) must be less than 1."
    if config.train.seed >= 2**31:
        yield "train", f"train.seed ({config.train.seed}) must be less than 2^31."
    ramp = config.train.rampup_batch_size
    if ramp is not None and min(ramp) < 1:
        yield "train", f"train.rampup_batch_size {ramp}: start, increment and samples must be at least 1."


def _run(config: Config) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield (
            f'name ("{config.name}") must be letters, digits, ".", "_" and "-", beginning with a letter or '
            "digit, because it names the run's folder."
        )
    if config.run_dir == "":
        yield 'run_dir ("") must name a folder; leave it out for runs/NAME.'


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.tokenizer:
        yield 'data.tokenizer ("") must name a folder with a tokenizer.json.'
    for name in ("train_data", "valid_data"):
        yield from _prefixes(name, getattr(data, name))
    for prefix in sorted(set(data.train_data).intersection(data.valid_data or ())):
        yield f"data.valid_data ({prefix}) is in data.train_data too; validate on other documents."
    if data.train_weights is not None and len(data.train_weights) != len(data.train_data):
        yield (
            f"data.train_weights has {len(data.train_weights)} values, and data.train_data "
            f"{len(data.train_data)} prefixes; give one weight for each."
        )
    for weight in data.train_weights or ():
        if not (weight > 0 and math.isfinite(weight)):
            yield f"data.train_weights ({weight}) must be greater than 0; leave out a prefix not wanted."


def _plan(config: Config) -> Iterator[str]:
    data = config.data
    if data.train_weights is not None and data.train_weights_unit == "tokens":
        yield from plan_problem(config, sum(data.train_weights) / config.train.seq_length)


def plan_problem(config: Config, planned_samples: float) -> Iterator[str]:
    """Compare the samples that train_weights add up to, counted in tokens or epochs, with those that the run reads."""
    train, data = config.train, config.data
    if layout_checks.ramp_problem(config) is not None:
        return
    read = derived.samples_after(train, train.train_iters)
    if abs(planned_samples - read) > _PLAN_TOLERANCE * planned_samples:
        fitting = max(1, train.train_iters + round((planned_samples - read) / train.global_batch_size))
        yield (
            f"data.train_weights (in {data.train_weights_unit}) add up to "
            f"{round(planned_samples * train.seq_length):,} tokens, and the run reads {read * train.seq_length:,}; "
            f"set train.train_iters to {fitting}, or change the weights."
        )


def _document_mask(config: Config) -> Iterator[str]:
    if config.data.document_mask == "none":
        return
    if not config.data.eod_mask_loss:
        yield (
            "data.document_mask (reset) needs data.eod_mask_loss: the token after an end of document begins another "
            "one, which nothing before it can tell; set that to true too."
        )
    context = config.parallel.context_parallel_size
    if context > 1:
        yield (
            f"data.document_mask (reset) does not go with parallel.context_parallel_size ({context}), whose ranks "
            'share whole samples and not documents; use 1, or set data.document_mask to "none".'
        )


def _prefixes(name: str, prefixes: tuple[str, ...] | None) -> Iterator[str]:
    if prefixes is None:
        return
    if not prefixes:
        hint = " or give a data.blend_file" if name == "train_data" else ""
        yield f"data.{name} is empty; name at least one prefix{hint}."
    seen = set()
    for prefix in prefixes:
        if prefix.endswith((".bin", ".idx")):
            yield f"data.{name} ({prefix}) must be a prefix; leave the ending away: {prefix[:-4]}."
        if Path(prefix) in seen:
            yield f"data.{name} names {prefix} twice; name it once (data.train_weights can raise its share)."
        seen.add(Path(prefix))


def _split(config: Config) -> Iterator[str]:
    split = config.data.split
    shares = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*", split)
    if shares is None:
        yield f'data.split ("{split}") must be two numbers, for training and validation; for example "99,1".'
    elif float(shares[1]) == 0:
        yield f'data.split ("{split}") leaves nothing for training; for example "99,1".'
    elif float(shares[2]) == 0 and config.data.valid_data is None and config.train.eval_interval is not None:
        yield (
            f'data.split ("{split}") leaves nothing for validation; give a share, name data.valid_data, or '
            'set train.eval_interval to "none".'
        )


def _schedule(config: Config) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if train.exit_iters is not None and train.exit_iters > train.train_iters:
        yield (
            f"train.exit_iters ({train.exit_iters}) must not exceed train.train_iters ({train.train_iters}); "
            "lower it or leave it out."
        )
    if optimizer.lr_decay_style != "constant" and optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr ({optimizer.min_lr}) must not exceed optimizer.lr ({optimizer.lr})."
    wsd = optimizer.lr_decay_style == "wsd"
    if wsd and optimizer.lr_wsd_decay_iters is None:
        yield "optimizer.lr_decay_style (wsd) needs optimizer.lr_wsd_decay_iters; give the decay's length."
    if optimizer.lr_decay_style == "constant" or layout_checks.ramp_problem(config) is not None:
        return
    # Counted in samples, because the ramp-up makes early iterations shorter.
    size = train.global_batch_size
    room = derived.decay_samples(optimizer, train) - derived.warmup_samples(optimizer, train)
    if room <= 0:
        yield (
            f"optimizer.lr_warmup_iters ({optimizer.lr_warmup_iters}) must end before the decay does "
            f"({derived.decay_samples(optimizer, train) // size} iterations at the full batch); shorten it."
        )
    elif wsd and (optimizer.lr_wsd_decay_iters or 0) * size > room:
        yield (
            f"optimizer.lr_wsd_decay_iters ({optimizer.lr_wsd_decay_iters}) must fit between the end of the "
            f"warm-up and the end of the decay; use at most {room // size}."
        )


def _checkpoints(config: Config) -> Iterator[str]:
    every, interval = config.checkpoint.keep_every, config.checkpoint.save_interval
    if every is not None and interval is not None and every % interval:
        yield (
            f"checkpoint.keep_every ({every}) must be a multiple of checkpoint.save_interval ({interval}): "
            "other iterations are not saved."
        )


def _bad_iterations(config: Config) -> Iterator[str]:
    settings = config.reliability
    if settings.spike_window_iters < _SMALLEST_WINDOW:
        yield (
            f"reliability.spike_window_iters ({settings.spike_window_iters}) must be at least {_SMALLEST_WINDOW}: "
            "fewer losses say nothing of how much they vary."
        )
    if settings.bad_iteration_policy == "rewind" and config.checkpoint.save_interval is None:
        yield (
            "reliability.bad_iteration_policy (rewind) goes back to the last checkpoint, and checkpoint.save_interval "
            '("none") saves none before the run stops; give an interval, or take the policy skip.'
        )


def _stragglers(config: Config) -> Iterator[str]:
    ratio = config.reliability.straggler_ratio
    if not 1 < ratio < math.inf:
        yield f"reliability.straggler_ratio ({ratio}) must be greater than 1, which is the median rank itself."


def _ignored_settings(config: Config) -> Iterator[str]:
    """Refuse settings that another setting makes meaningless, wherever they differ from their default."""
    for section, names, ignored, reason in _ignoring(config):
        values = getattr(config, section)
        for field in fields(values) if ignored else ():
            value = getattr(values, field.name)
            if field.name in names.split() and value != field.default:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield f"{section}.{field.name} ({shown}) has no effect {reason}; leave it out or change that."


def _ignoring(config: Config) -> tuple[tuple[str, str, bool, str], ...]:
    """Return (section, its fields, whether they are ignored, why)."""
    precision, parallel, data = config.precision, config.parallel, config.data
    train, optimizer, checkpoint = config.train, config.optimizer, config.checkpoint
    reliability, never_validates = config.reliability, train.eval_interval is None
    policy = reliability.bad_iteration_policy
    style = optimizer.lr_decay_style
    return (
        (
            "precision",
            "fp8_recipe fp8_format fp8_param_gather first_last_layers_bf16",
            precision.dtype != "fp8",
            f"with precision.dtype {precision.dtype}",
        ),
        ("parallel", "ddp_bucket_size", not parallel.overlap_grad_reduce, "without parallel.overlap_grad_reduce"),
        (
            "parallel",
            "recompute_num_layers",
            parallel.recompute_granularity != "full",
            f"with parallel.recompute_granularity {parallel.recompute_granularity}",
        ),
        ("data", "split", data.valid_data is not None, "with data.valid_data"),
        ("data", "train_weights_unit", data.train_weights is None, "without data.train_weights"),
        ("data", "path_to_cache", data.sample_index == "lazy", "with data.sample_index lazy"),
        ("data", "valid_data", never_validates, 'with train.eval_interval "none"'),
        ("train", "eval_iters", never_validates, 'with train.eval_interval "none"'),
        (
            "optimizer",
            "lr_wsd_decay_iters lr_wsd_decay_style",
            style != "wsd",
            f"with optimizer.lr_decay_style {style}",
        ),
        ("optimizer", "min_lr lr_decay_iters", style == "constant", "with optimizer.lr_decay_style constant"),
        ("optimizer", "weight_decay_scope", optimizer.weight_decay == 0, "with optimizer.weight_decay 0"),
        (
            "checkpoint",
            "keep_every",
            checkpoint.keep_last is None,
            "without checkpoint.keep_last, because all are kept",
        ),
        (
            "checkpoint",
            "async_save keep_every",
            checkpoint.save_interval is None,
            'with checkpoint.save_interval "none"',
        ),
        (
            "model",
            "init_method init_method_std output_init_method_std",
            checkpoint.init_from is not None,
            "with checkpoint.init_from, because the weights are read",
        ),
        ("reliability", "max_bad_iterations", policy == "stop", "with reliability.bad_iteration_policy stop"),
        ("reliability", "rewind_skip_iters", policy != "rewind", f"with reliability.bad_iteration_policy {policy}"),
        (
            "reliability",
            "spike_window_iters",
            reliability.spike_deviations is None,
            "without reliability.spike_deviations",
        ),
        (
            "reliability",
            "straggler_ratio",
            reliability.straggler_interval is None,
            'with reliability.straggler_interval "none"',
        ),
    )


# Each rule with the sections whose ranges it takes for granted.
_RULES: dict[Callable[[Config], Iterator[str]], tuple[str, ...]] = {
    _run: (),
    layout_checks.check_heads: ("model", "train"),
    layout_checks.check_tensor_parallel: ("model", "parallel"),
    layout_checks.check_pipeline: ("model", "parallel"),
    layout_checks.check_sequence: ("train", "parallel"),
    layout_checks.check_overlap: (),
    layout_checks.check_fp8: ("model", "parallel", "train"),
    _data: (),
    _plan: ("train",),
    _document_mask: (),
    _split: (),
    _schedule: ("train", "optimizer"),
    _checkpoints: ("checkpoint",),
    _bad_iterations: (),
    _stragglers: (),
}
