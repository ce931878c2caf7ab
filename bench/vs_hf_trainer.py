#!/usr/bin/env python3
"""Tokens per second of one process against transformers' own Llama in a plain torch loop.

Same shape, precision, batch and data; both update with torch's fused AdamW, clip the gradient norm at 1, and read
the loss each iteration. A is ours (the real training step), B is the peer. CPU time, A B B A.

    python bench/vs_hf_trainer.py [--dtype fp32|bf16] [--rounds 4] [--units 1] [--threads 1]
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from bench.interleave import compare

SHAPE = {
    "num_layers": 6, "hidden_size": 384, "ffn_hidden_size": 1024, "num_attention_heads": 6, "num_query_groups": 2,
    "vocab_size": 8192,
}  # fmt: skip
SEQ_LENGTH, MICRO_BATCH, MICRO_BATCHES = 256, 4, 8  # 1.5-Pints accumulates eight micro batches too


def ours(dtype: str, threads: int) -> Callable[[], None]:
    """Build our training step on random tokens."""
    import torch

    torch.set_num_threads(threads)
    from bench.bare import build_machine, random_samples
    from megatron_ext.training.state import TrainState
    from megatron_ext.training.step import train_step

    samples = random_samples(SHAPE["vocab_size"], SEQ_LENGTH)
    machine = build_machine(SHAPE, dtype=dtype, seq_length=SEQ_LENGTH, micro_batch=MICRO_BATCH,
                            micro_batches=MICRO_BATCHES, samples=samples)  # fmt: skip
    state = TrainState()

    def run() -> None:
        state.advance(train_step(machine, state))

    return run


def transformers_llama(dtype: str, threads: int) -> Callable[[], None]:
    """Build the peer: LlamaForCausalLM, SDPA attention, gradient accumulation, fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=SHAPE["num_layers"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=SHAPE["num_query_groups"],
        vocab_size=SHAPE["vocab_size"],
        max_position_embeddings=SEQ_LENGTH,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    # Mixed precision as a plain loop does it: fp32 weights, autocast to bf16.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(MICRO_BATCHES):
            text = torch.randint(SHAPE["vocab_size"], (MICRO_BATCH, SEQ_LENGTH + 1), generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
                # shift_labels: logits of all places count, as ours do.
                loss = model(input_ids=text[:, :-1], labels=text[:, 1:], shift_labels=text[:, 1:].contiguous()).loss
            (loss / MICRO_BATCHES).backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()

    return run


def main() -> int:
    """Run the comparison and print both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--units", type=int, default=1, help="iterations per turn")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    result = compare(
        functools.partial(ours, arguments.dtype, arguments.threads),
        functools.partial(transformers_llama, arguments.dtype, arguments.threads),
        rounds=arguments.rounds,
        units=arguments.units,
    )
    tokens = SEQ_LENGTH * MICRO_BATCH * MICRO_BATCHES
    print(f"ours                 {tokens / result.first:9,.0f} tokens per CPU second")
    print(f"transformers + torch {tokens / result.second:9,.0f} tokens per CPU second")
    print(f"ratio {result.ratio:.3f} (rounds from {result.lowest:.3f} to {result.highest:.3f}; {arguments.dtype}, "
          f"{arguments.threads} threads)")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
