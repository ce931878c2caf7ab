"""One iteration: forward and backward over all micro batches, reduction, update.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import torch

from megatron_ext.config.tree import Config
from megatron_ext.data.batch import Batch
from megatron_ext.data.loader import Loader
from megatron_ext.model.gpt import Model
from megatron_ext.optim.build import set_rates
from megatron_ext.optim.schedule import global_batch_size_at, learning_rate
from megatron_ext.optim.update import apply_update, ready_gradients
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place
from megatron_ext.training.bad_iterations import find_fault
from megatron_ext.training.state import StepResult, TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What an iteration works with: this rank's model, optimizer and data."""

    config: Config
    place: Place
    model: Model
    optimizer: Any
    loader: Loader


def connect(config: Config, model: Model, optimizer: Any) -> None:
    """Give Megatron's schedules the hooks through which they reach the optimizer and the gradient buffers."""
    from megatron.core.distributed import finalize_model_grads

    transformer = model.transformer_config
    # Without it, data-parallel replicas and sequence-parallel norms would drift apart in silence.
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if config.parallel.overlap_grad_reduce:
        hooks = [chunk.no_sync for chunk in model.wrapped]
        transformer.no_sync_func = hooks if len(hooks) > 1 else hooks[0]


def train_step(machine: Machine, state: TrainState) -> StepResult:
    """Run one iteration. Every rank calls it.

    Where its loss or gradient is bad (`find_fault`), no update is made: parameters and optimizer stay bit for bit as
    they were, and the result says why; on every rank alike.
    """
    config = machine.config
    samples = global_batch_size_at(config.train, state.consumed_samples)
    lr = learning_rate(config.optimizer, config.train, state.consumed_samples)
    set_rates(machine.optimizer, lr=lr, weight_decay=config.optimizer.weight_decay)
    for chunk in machine.model.wrapped:
        chunk.zero_grad_buffer()
    machine.optimizer.zero_grad()
    batches = machine.loader.iteration(state.consumed_samples, global_batch_size=samples)
    totals = run_micro_batches(machine, batches, samples=samples, forward_only=False)
    norm = ready_gradients(machine.optimizer)
    # The one moment of an iteration at which the host waits for the device: for the norm, which comes after the loss,
    # and before the update, which the device then makes while the host prepares the next iteration.
    grad_norm = float(norm)
    loss_sum, num_tokens = totals.tolist()
    loss = loss_sum / num_tokens if num_tokens else math.nan
    fault = find_fault(loss, grad_norm, state.recent_losses, config.reliability)
    if fault is None:
        apply_update(machine.optimizer, norm)
    tokens = samples * config.train.seq_length
    return StepResult(loss, grad_norm, lr, samples, tokens, updated=fault is None, fault=fault)


def run_micro_batches(machine: Machine, batches: Iterator[Batch], *, samples: int, forward_only: bool) -> torch.Tensor:
    """Run Megatron's schedule over one global batch.

    Returns:
        [2] float64 on the device: the sum of the token losses and the number of tokens that count, over all ranks;
        the same on every rank.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config, chunks = machine.config, machine.model.wrapped
    num_microbatches = samples // (config.train.micro_batch_size * machine.place.data_size)
    rows, length = machine.loader.shape
    stores = get_forward_backward_func()(
        forward_step_func=partial(forward_step, every_stage_reads=machine.loader.document_end is not None),
        # Interleaving wants a list. Chunks take turns, and each one that reads must see every micro batch.
        data_iterator=list(tee(batches, len(chunks))) if len(chunks) > 1 else batches,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    totals = torch.zeros(2, dtype=torch.float64, device=device.current())
    for store in stores:  # only the last pipeline stage has any
        totals += store["loss"].double()
    if stores:
        groups.sum_over_data_ranks(totals)
    totals = groups.broadcast_from_last_stage(totals)
    if config.reliability.spike_deviations is not None:
        # Tensor ranks add up over groups of their own, and may differ in the last bit where NCCL adds in another order.
        # What is compared with a limit must not: a rank that alone sees a spike would go another way than the rest.
        groups.broadcast_over_tensor_ranks(totals)
    return totals


def forward_step(
    batches: Iterator[Batch], chunk: Any, *, every_stage_reads: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run one micro batch through one chunk, as Megatron's schedules call it.

    Args:
        batches: the micro batches for this chunk.
        chunk: the wrapped chunk.
        every_stage_reads: stages between the first and the last need the batch too, to know where documents begin.

    Returns:
        The chunk's output (token losses [b, s] fp32 on the last stage, activations elsewhere) and the loss function.
    """
    bare = _unwrap(chunk)
    if not (bare.pre_process or bare.post_process or every_stage_reads):
        return chunk(None, None, None), _no_loss
    batch = next(batches)
    labels = batch.labels if bare.post_process else None
    output = chunk(batch.tokens, batch.position_ids, None, labels=labels, packed_seq_params=batch.documents)
    return output, partial(_masked_loss, batch.loss_mask)


def _masked_loss(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss_sum = (token_losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    return loss_sum, num_tokens.int(), {"loss": torch.stack((loss_sum.detach(), num_tokens))}


def _no_loss(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    raise AssertionError("only the last pipeline stage has a loss")


@contextlib.contextmanager
def gathered_parameters(machine: Machine) -> Iterator[None]:
    """Let every rank hold the newest parameters, and keep them so, within the block.

    With overlap_param_gather, what the last update did to the other ranks' shares only arrives with the next forward
    pass. Whoever reads the parameters before it would find those of the iteration before.
    """
    chunks = machine.model.wrapped if machine.config.parallel.overlap_param_gather else []
    for chunk in chunks:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()


def _unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
