#!/usr/bin/env python3
"""What our iteration costs beyond megatron-core's own calls.

A is a bare script: megatron-core's model, optimizer and schedule, batches ready in memory, the loss read once per
iteration, nothing else. B is our training loop's body: rates from the schedule, samples through the loader, checks
for NaN, the stop check, metrics. Same shapes, same tokens, one process. CPU time, A B B A; the ratio is B / A.

    python bench/loop_overhead.py [--rounds 7] [--units 10]
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from bench.interleave import compare

SHAPE = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 4096,
}  # fmt: skip
SEQ_LENGTH, MICRO_BATCH, MICRO_BATCHES = 256, 2, 2


def bare(threads: int) -> Callable[[], None]:
    """Build the bare loop."""
    import torch

    torch.set_num_threads(threads)
    from bench.bare import build_machine, random_samples

    samples = random_samples(SHAPE["vocab_size"], SEQ_LENGTH)
    machine = build_machine(SHAPE, dtype="fp32", seq_length=SEQ_LENGTH, micro_batch=MICRO_BATCH,
                            micro_batches=MICRO_BATCHES, samples=samples)  # fmt: skip
    from megatron.core.pipeline_parallel import get_forward_backward_func

    (chunk,), optimizer = machine.model.wrapped, machine.optimizer
    drawn = [samples[k] for k in range(MICRO_BATCH)]
    tokens = torch.stack([sample.tokens for sample in drawn])
    labels = torch.stack([sample.labels for sample in drawn])
    positions = torch.arange(SEQ_LENGTH).expand(MICRO_BATCH, -1)

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.detach()}

    def forward_step(_: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(tokens, positions, None, labels=labels), loss_function

    def run() -> None:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        stores = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=None, model=chunk, num_microbatches=MICRO_BATCHES,
            seq_length=SEQ_LENGTH, micro_batch_size=MICRO_BATCH, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        sum(store["loss"].item() for store in stores)

    return run


def ours(threads: int) -> Callable[[], None]:
    """Build the body of our loop, with its log line and metrics row every ten iterations."""
    import logging

    import torch

    torch.set_num_threads(threads)
    from bench.bare import build_machine, random_samples
    from megatron_ext.training.metrics import Metrics
    from megatron_ext.training.state import TrainState, is_due
    from megatron_ext.training.step import train_step
    from megatron_ext.training.stop import Stop

    logging.disable()
    samples = random_samples(SHAPE["vocab_size"], SEQ_LENGTH)
    machine = build_machine(SHAPE, dtype="fp32", seq_length=SEQ_LENGTH, micro_batch=MICRO_BATCH,
                            micro_batches=MICRO_BATCHES, samples=samples)  # fmt: skip
    metrics = Metrics(machine.config, Path(tempfile.mkdtemp()), rank=0, world_size=1)
    stop = Stop(machine.config.train)
    state = TrainState()
    metrics.begin(state)

    def run() -> None:
        assert stop.check(state) is None
        result = train_step(machine, state)
        state.advance(result)
        metrics.count(state, result)
        if is_due(state, machine.config.log.interval):
            metrics.log_train(state, result)

    return run


def main() -> int:
    """Run the comparison and print both costs and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--units", type=int, default=10, help="iterations per turn")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    result = compare(
        functools.partial(bare, arguments.threads),
        functools.partial(ours, arguments.threads),
        rounds=arguments.rounds,
        units=arguments.units,
    )
    print(f"bare megatron-core {1000 * result.first:8.2f} CPU ms per iteration")
    print(f"our loop           {1000 * result.second:8.2f} CPU ms per iteration")
    print(f"ratio {result.ratio:.4f} (rounds from {result.lowest:.4f} to {result.highest:.4f}; "
          f"{arguments.threads} threads)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
