"""Build Megatron's optimizer, and set its learning rate and weight decay for an iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_ext.config.tree import Config
from megatron_ext.optim.adam import FusedAdam


def build_optimizer(config: Config, chunks: Sequence[Any]) -> Any:
    """Build a MegatronOptimizer over this rank's DDP-wrapped chunks. Every rank calls it."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    _supply_adam()
    settings, parallel = config.optimizer, config.parallel
    fp32 = config.precision.dtype == "fp32"
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        # At 0 Megatron would not compute the norm, and a NaN in a gradient would pass unseen.
        clip_grad=settings.clip_grad or math.inf,
        bf16=not fp32,
        params_dtype=torch.float32 if fp32 else torch.bfloat16,
        fp8_recipe=config.precision.fp8_recipe if config.precision.dtype == "fp8" else None,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # None: Megatron's standard overrides, no decay on vectors. An empty mapping: decay on all.
    overrides: dict[Any, Any] | None = {} if settings.weight_decay_scope == "all" else None
    return get_megatron_optimizer(megatron_config, list(chunks), config_overrides=overrides)


def set_rates(optimizer: Any, *, lr: float, weight_decay: float) -> None:
    """Set the rates of the coming update on every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def _supply_adam() -> None:
    """Give megatron-core our Adam where it found neither Transformer Engine's nor apex's."""
    import megatron.core.optimizer as package
    import megatron.core.optimizer.distrib_optimizer as distributed

    if package.USING_PYTORCH_OPTIMIZER:
        package.Adam = distributed.Adam = FusedAdam
        package.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
