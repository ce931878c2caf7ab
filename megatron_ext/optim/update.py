"""Megatron's update in two halves, so that a gradient can be looked at and refused before anything moves.

Together they do what `ChainedOptimizer.step` of megatron-core 0.16.1 and 0.19.2 does for a dense model without a
gradient scaler (bf16 and fp32 need none): the same calls in the same order, and so the same bits.
"""

from __future__ import annotations

from typing import Any

import torch


def ready_gradients(optimizer: Any) -> torch.Tensor | float:
    """Hand the reduced gradients to the optimizer, and return their global norm before clipping. Every rank calls it.

    Parameters, moments and step counts stay as they are until `apply_update`; without it the iteration leaves no trace.

    Returns:
        A float, for which the host waited for the device, or a tensor on it, for which nobody waited: as megatron-core
        and the kernels that it found decide.
    """
    found_inf = optimizer.prepare_grads()
    assert not found_inf, "only a gradient scaler finds any"
    norm: torch.Tensor | float = optimizer.get_grad_norm()
    return norm


def apply_update(optimizer: Any, norm: torch.Tensor | float) -> None:
    """Clip by what `ready_gradients` returned, and update the parameters. Every rank calls it."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in optimizer.chained_optimizers:
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
