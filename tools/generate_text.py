#!/usr/bin/env python3
"""Generate text from a Hugging Face model folder, through transformers.

Greedy by default; with --temperature it samples. Runs on the CPU, or on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Print each prompt and, after a bar, its continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='example:\n  python tools/generate_text.py hf/pints "Explain photosynthesis." --max-new-tokens 100',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="FOLDER", help="folder made by tools/convert_checkpoint.py to-hf")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="texts to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default); above: sampling")
    parser.add_argument("--repetition-penalty", type=float, default=1.3, help="1: none (default 1.3, as 1.5-Pints)")
    parser.add_argument("--seed", type=int, default=0, help="for sampling")
    arguments = parser.parse_args(argv)
    try:
        for prompt, continuation in zip(arguments.prompts, _generate(arguments), strict=True):
            print(textwrap.indent(f"{prompt}▌{continuation}", "    "), end="\n\n")
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


def _generate(arguments: argparse.Namespace) -> list[str]:
    folder: Path = arguments.model
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a Hugging Face model folder (no config.json); make one with "
                              "tools/convert_checkpoint.py to-hf.")  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from megatron_ext.parallel import device

    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device.current())
    sampling: dict[str, object] = {"do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        sampling["temperature"] = arguments.temperature
    continuations = []
    for prompt in arguments.prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=arguments.max_new_tokens,
                repetition_penalty=arguments.repetition_penalty,
                **sampling,
            )
        continuations.append(tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True))
    return continuations


if __name__ == "__main__":
    sys.exit(main())
