#!/usr/bin/env python3
"""Convert a training run's checkpoints: to and from Hugging Face model folders, or for another parallel layout.

to-hf and from-hf need torch only: no megatron (but for --verify), no GPU, no parallel sizes. Weights are streamed,
so the peak memory is a few tensors of one layer, not the model. reshard needs megatron, no GPU, and 20 bytes of memory
per parameter.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.durable import write_whole
from megatron_ext.errors import EXIT_CODE, CheckpointError, MegapintsError
from tools import resharding
from tools.new_folder import aside, keep_rejected, progress, refuse_existing
from tools.saved_checkpoint import find_checkpoint, verify_files

if TYPE_CHECKING:
    import torch

    from megatron_ext.checkpoint.hf_llama import SpecialTokens
    from megatron_ext.config.tree import ModelConfig
    from megatron_ext.data.tokenizer import Tokenizer

EXIT_MISMATCH = 1
FP32_TOLERANCE = 1e-4
NARROWED_TOLERANCE = 0.25
"""For logits after fp32 weights were rounded to bf16, in standard deviations of the logits. Each weight moves
by up to 2^-9 of itself; 24 random layers gave 0.08 at most, swapped or misplaced weights 3 and more."""

_EPILOG = """\
examples:
  the newest checkpoint of a run, as a bf16 folder that transformers and vLLM load:
    python tools/convert_checkpoint.py to-hf --load runs/demo --save hf/demo --dtype bf16
  one checkpoint, and compare the folder's logits with Megatron's:
    python tools/convert_checkpoint.py to-hf --load runs/demo/checkpoints/iter_0001000 --save hf/demo --verify
  start from published weights (then checkpoint.init_from = "runs/tinyllama" in a configuration):
    python tools/convert_checkpoint.py from-hf --load models/TinyLlama-1.1B --save runs/tinyllama
  go on at another tensor- or pipeline-parallel size (then run_dir = "runs/moved" in the configuration):
    python tools/convert_checkpoint.py reshard --load runs/demo --save runs/moved

The architecture comes from the checkpoint or from config.json; there is nothing to say about it, or about the
tensor- and pipeline-parallel layout that a checkpoint was saved at.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0: done, 1: --verify found a difference, 2: something to mend."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except MegapintsError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or arguments.save}: {error.strerror or error}.", file=sys.stderr)
    return EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{to-hf,from-hf,reshard}")
    _add_to_hf(commands)
    _add_from_hf(commands)
    resharding.add_command(commands, epilog=_EPILOG)
    return parser


def _add_to_hf(commands: Any) -> None:
    command = commands.add_parser(
        "to-hf",
        help="checkpoint -> Hugging Face folder",
        description="Write a Llama folder from a checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    load = "a run directory (its newest whole checkpoint) or one checkpoints/iter_* directory"
    add("--load", type=Path, required=True, metavar="RUN|ITER", help=load)
    add("--save", type=Path, required=True, metavar="OUT", help="folder to make; must not exist")
    add("--dtype", choices=("bf16", "fp32"), help="type of the weights; default: the checkpoint's")
    add("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer folder; default: the run's")
    add("--chat_template", type=Path, metavar="FILE", help="Jinja chat template; default: the tokenizer's")
    size = "largest weight file, as 500MB or 5GB (default 5GB)"
    add("--max_shard_size", type=_byte_count, default="5GB", metavar="SIZE", help=size)
    verify = (
        "compare the folder's logits in transformers, fp32, with Megatron's forward pass before publishing "
        "it; exit 1 if they differ"
    )
    add("--verify", action="store_true", help=verify)
    command.set_defaults(run=_to_hf)


def _add_from_hf(commands: Any) -> None:
    command = commands.add_parser(
        "from-hf",
        help="Hugging Face folder -> checkpoint",
        description="Write a run directory whose iteration 0 holds the weights of a Llama or Mistral folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--load", type=Path, required=True, metavar="HF", help="folder with config.json and safetensors")
    add("--save", type=Path, required=True, metavar="DIR", help="run directory to make; must not exist")
    multiple = "pad the vocabulary to a multiple of N, as the configuration that starts from it does (default 128)"
    add("--make_vocab_size_divisible_by", type=int, default=128, metavar="N", help=multiple)
    command.set_defaults(run=_from_hf)


def _byte_count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 500MB or 5GB")
    return count


def _to_hf(arguments: argparse.Namespace) -> int:
    if arguments.verify:
        _require_for_verify()
    target: Path = arguments.save
    refuse_existing(target)
    import torch

    from megatron_ext.checkpoint import hf_convert, layout
    from megatron_ext.checkpoint.dcp import CheckpointReader

    checkpoint = find_checkpoint(arguments.load)
    verify_files(checkpoint)
    description = layout.read_description(checkpoint)
    model = hf_convert.model_of(description, where=checkpoint)
    tokenizer = _tokenizer_for(model, arguments.tokenizer, checkpoint, description.tokenizer_sha256)
    template = _read_text(arguments.chat_template) if arguments.chat_template else None
    reader = CheckpointReader(checkpoint)
    stored = hf_convert.stored_dtype(reader, model)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, None: stored}[arguments.dtype]
    print(f"{checkpoint}: iteration {description.iteration}, {description.consumed_tokens:,} tokens")
    if description.iteration == 0:
        origin = "weights taken from elsewhere" if not description.config else "the run's random initial weights"
        print(f"warning: iteration 0: these are {origin}; nothing was trained here.", file=sys.stderr)
    with aside(target) as folder:
        with progress("exporting", hf_convert.export_bytes(model, dtype)) as advance:
            hf_convert.export_weights(
                reader, model, folder, dtype=dtype, max_shard_bytes=arguments.max_shard_size, on_bytes=advance
            )
        _write_configs(folder, model, tokenizer, dtype, template)
        if arguments.verify:
            agreement = _verify(checkpoint, folder, model, narrowed=dtype not in (stored, torch.float32))
            print(agreement.text)
            if not agreement.good:
                rejected = keep_rejected(folder, target)
                print(f"error: the logits differ; the folder is not published, see {rejected}.", file=sys.stderr)
                return EXIT_MISMATCH
    print(f"{target}: {_name(dtype)}, {sum(p.stat().st_size for p in target.iterdir()):,} bytes")
    return 0


def _from_hf(arguments: argparse.Namespace) -> int:
    target: Path = arguments.save
    refuse_existing(target)
    from megatron_ext.checkpoint import hf_convert, hf_llama, layout
    from megatron_ext.checkpoint.hf_folder import HfReader
    from megatron_ext.data.tokenizer import Tokenizer, export_tokenizer

    reader = HfReader(arguments.load)
    multiple = arguments.make_vocab_size_divisible_by
    if multiple < 1:
        raise CheckpointError(f"--make_vocab_size_divisible_by ({multiple}) must be above 0.")
    model, notes = hf_llama.model_from_hf(reader.config, where=str(reader.config_path))
    model = replace(model, make_vocab_size_divisible_by=multiple)
    reader.check_shapes(hf_llama.hf_shapes(model))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    with aside(target) as folder:
        sha256 = None
        if (arguments.load / "tokenizer.json").exists():
            export_tokenizer(arguments.load, folder / "tokenizer", model_max_length=model.max_position_embeddings)
            sha256 = Tokenizer.load(folder / "tokenizer").sha256
        else:
            print(f"warning: {arguments.load}: no tokenizer.json, so the run has no tokenizer.", file=sys.stderr)
        with progress("importing", hf_convert.import_bytes(reader, model)) as advance:
            hf_convert.import_folder(reader, model, folder, tokenizer_sha256=sha256, on_bytes=advance)
    print(f"{target / layout.CHECKPOINTS / layout.directory_name(0)}: weights of {arguments.load}")
    return 0


# --- parts of an export -------------------------------------------------------------------------------------


def _tokenizer_for(model: ModelConfig, given: Path | None, checkpoint: Path, trained_sha256: str | None) -> Tokenizer:
    """Load the tokenizer to export, and check that it is the one the model was trained with."""
    from megatron_ext.checkpoint import layout
    from megatron_ext.data.tokenizer import Tokenizer

    folder = given or layout.run_of(checkpoint) / "tokenizer"
    if given is None and not folder.is_dir():
        raise CheckpointError(f"{folder}: the run has no tokenizer; name its folder with --tokenizer.")
    tokenizer = Tokenizer.load(folder)
    if trained_sha256 not in (None, tokenizer.sha256):
        raise CheckpointError(
            f"{folder}: its tokenizer.json (sha256 {tokenizer.sha256[:12]}) is not the one that the model "
            f"was trained with ({str(trained_sha256)[:12]}); give that one with --tokenizer."
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{folder}: ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has "
            f"{model.vocab_size} entries; give the tokenizer of this model with --tokenizer."
        )
    return tokenizer


def _write_configs(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, chat_template: str | None
) -> None:
    from megatron_ext.checkpoint import hf_llama
    from megatron_ext.data.tokenizer import export_tokenizer

    special: SpecialTokens = hf_llama.SpecialTokens(bos=tokenizer.bos, eos=tokenizer.eod, pad=tokenizer.pad)
    _write_json(folder / "config.json", hf_llama.model_to_hf(model, dtype=_name(dtype), special=special))
    _write_json(folder / "generation_config.json", hf_llama.generation_config(special))
    export_tokenizer(
        tokenizer.folder, folder, model_max_length=model.max_position_embeddings, chat_template=chat_template
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as text ({error}).") from None


# --- verification -------------------------------------------------------------------------------------------


class _Agreement(NamedTuple):
    text: str
    good: bool


def _require_for_verify() -> None:
    missing = [name for name in ("transformers", "megatron") if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"--verify needs {' and '.join(missing)}, not installed here; install requirements.txt or leave it out."
        )


def _verify(checkpoint: Path, folder: Path, model: ModelConfig, *, narrowed: bool) -> _Agreement:
    """Compare both models on random ids, 2 sequences of up to 128 tokens, weights and arithmetic in fp32."""
    import torch

    length = min(128, model.max_position_embeddings)
    tokens = torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    print(f"verifying on {tokens.numel()} random tokens ...", flush=True)
    with warnings.catch_warnings():
        # megatron-core announces each optional package that it does without.
        warnings.simplefilter("ignore")
        theirs = _transformers_logits(folder, tokens)
        from megatron_ext.training.inference import forward_logits

        ours = forward_logits(checkpoint, tokens)
    difference = (ours - theirs).abs().max().item()
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    tolerance = NARROWED_TOLERANCE * ours.std().item() if narrowed else FP32_TOLERANCE
    reason = ", looser because the export rounds fp32 weights" if narrowed else ""
    text = (
        f"max |logit difference| {difference:.3g} (at most {tolerance:.3g}{reason}), "
        f"top-1 agreement {100 * top1:.2f} %, standard deviation of logits {ours.std().item():.3g}"
    )
    return _Agreement(text, difference <= tolerance)


def _transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from megatron_ext.parallel import device

    logging.disable_progress_bar()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device.current()).eval()
    with torch.no_grad():
        rows = [hf(row.unsqueeze(0).to(device.current())).logits.float().cpu() for row in tokens]
    return torch.cat(rows)


if __name__ == "__main__":
    sys.exit(main())
