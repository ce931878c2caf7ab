#!/usr/bin/env python3
"""The whole of megapints in minutes, on a CPU: text -> tokenizer -> training -> Hugging Face -> generated text.

`make demo` runs it. Each step is a command that it prints, and that you could type yourself. Everything goes into
demo/ (removed and made anew each time); nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.config.load import find_config, load_config
from megatron_ext.config.tree import Config
from megatron_ext.errors import EXIT_CODE, MegapintsError

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("demo")
MARK = DEMO / "made-by-tools-demo"
PROMPTS = ("def __init__(self", "This module provides", "The return value is")
SOURCES = ("prose", "code")


class StepFailedError(Exception):
    """A step's command ended with an error; it has said why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps in the current folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, metavar="N", help="train for N iterations instead of the config's")
    arguments = parser.parse_args(argv)
    if DEMO.exists() and not MARK.exists():
        print(f"error: {DEMO.resolve()} exists and was not made by this demo; move it away.", file=sys.stderr)
        return EXIT_CODE
    began = time.monotonic()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    MARK.touch()
    try:
        _steps(arguments.train_iters, began)
    except StepFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def _steps(train_iters: int | None, began: float) -> None:
    config = load_config(find_config("demo"))
    _title(1, "A corpus: text that every Python installation carries")
    _tool("sample_corpus", "--output-dir", "demo/corpus", "--max-mb", "8", "--valid-fraction", "0.02")
    _title(2, f"A tokenizer: BPE of {config.model.vocab_size:,} tokens, trained on it")
    inputs = [f"demo/corpus/{source}.train.jsonl" for source in SOURCES]
    size = str(config.model.vocab_size)
    _tool("build_tokenizer", "train", "--input", *inputs, "--vocab-size", size, "--output", "demo/tokenizer")
    _title(3, "Token files in Megatron's format")
    for source in SOURCES:
        for part in ("train", "valid"):
            _tool(
                "preprocess_data", "--input", f"demo/corpus/{source}.{part}.jsonl", "--tokenizer", "demo/tokenizer",
                "--output-prefix", f"demo/data/{source}_{part}", "--append-eod", "--workers", "2",
            )  # fmt: skip
    _title(4, "Training with megatron-core, tensor-parallel over two processes")
    overrides = ["--train.train_iters", str(train_iters)] if train_iters else []
    _train(config, overrides)
    _title(5, "The curves")
    _tool("plot_run", str(config.run_dir), "--output", "demo/curves.png")
    _title(6, "A Hugging Face folder, compared with Megatron logit by logit")
    _tool("convert_checkpoint", "to-hf", "--load", str(config.run_dir), "--save", "demo/hf", "--verify")
    _title(7, "Text from it, through transformers")
    _tool("generate_text", "demo/hf", *PROMPTS, "--max-new-tokens", "40")
    _summary(config, time.monotonic() - began)


def _train(config: Config, overrides: Sequence[str]) -> None:
    ranks = str(config.parallel.tensor_model_parallel_size)
    # A port of our own: two demos on one machine must not meet.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port]
    shown = f"torchrun --nproc-per-node {ranks} pretrain_pints.py demo {' '.join(overrides)}"
    _run([*launcher, str(ROOT / "pretrain_pints.py"), "demo", *overrides], shown.strip())


def _summary(config: Config, seconds: float) -> None:
    from tools.ngram_entropy import from_files

    rows = [json.loads(line) for line in Path(f"{config.run_dir}/metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["kind"] == "valid"][-1]
    base = from_files(config.data.train_data, config.data.valid_data or (), vocab_size=config.model.vocab_size)
    print(
        f"""
What came out, after {seconds / 60:.1f} minutes
  trained on        {valid["consumed_tokens"]:,} tokens
  held-out loss     {valid["loss"]:.3f} nats per token, over {valid["tokens"]:,} tokens
  to compare with   {base.unigram:.3f} the unigram, {base.bigram:.3f} the bigram cross-entropy of the same held-out text
  checkpoints       {config.run_dir}/checkpoints
  metrics           {config.run_dir}/metrics.jsonl   (TensorBoard: {config.run_dir}/tensorboard)
  curves            demo/curves.png
  model             demo/hf   (AutoModelForCausalLM.from_pretrained("demo/hf"))
Next: README.md, then `python pretrain_pints.py pints_1.5b_2k --dry_run --world_size 8`."""
    )


def _tool(name: str, *arguments: str) -> None:
    shown = f"python tools/{name}.py {' '.join(shlex.quote(argument) for argument in arguments)}"
    _run([str(ROOT / "tools" / f"{name}.py"), *arguments], shown)


def _run(command: Sequence[str], shown: str) -> None:
    print(f"$ {shown}", flush=True)
    # One thread per process for the two ranks (torchrun would warn that it chose so itself).
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ}
    done = subprocess.run([sys.executable, *command], env=environment, check=False)
    if done.returncode != 0:
        raise StepFailedError(f"the step above ended with exit code {done.returncode}.")


def _title(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
