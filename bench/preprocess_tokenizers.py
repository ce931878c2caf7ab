"""The tokenizers of bench/preprocess.py: given folders, or trained on the spot."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from megatron_ext.errors import DataError

TRAINED = {"llama-style": 32_000, "gpt2-style": 50_257}
"""What can be trained, with its number of tokens."""


def tokenizer_folder(name: str, *, training: Path, folder: Path) -> Path:
    """Name the folder of a tokenizer; one that is to be trained is trained on `training` into a folder in `folder`.

    Raises:
        DataError: the name is neither a tokenizer folder's nor in `TRAINED`, or training failed.
    """
    if name not in TRAINED:
        if not (Path(name) / "tokenizer.json").is_file():
            raise DataError(
                f"--tokenizers {name}: is no folder with a tokenizer.json, nor one of {', '.join(TRAINED)}."
            )
        return Path(name)
    target = folder / name
    if not (target / "tokenizer.json").is_file():
        train = train_llama_style if name == "llama-style" else train_gpt2_style
        # In another process: a command that is started later inherits this one's peak of memory as its own.
        process = multiprocessing.get_context("spawn").Process(target=train, args=(training, target, TRAINED[name]))
        process.start()
        process.join()
        if process.exitcode:
            raise DataError(f"--tokenizers {name}: could not be trained (exit code {process.exitcode}).")
    return target


def train_llama_style(source: Path, folder: Path, vocab_size: int) -> None:
    """Train a tokenizer with Llama-2's algorithm: spaces become a character, nothing else cuts the text."""
    from tools.build_tokenizer import train_tokenizer, write_folder

    content = train_tokenizer([source], key="text", vocab_size=vocab_size, limit_alphabet=1024, show_progress=False)
    # Words only guide the training: in use merges apply to the whole text, as in Llama-2's tokenizer.
    write_folder({**content, "pre_tokenizer": None}, folder)


def train_gpt2_style(source: Path, folder: Path, vocab_size: int) -> None:
    """Train a byte-level tokenizer as GPT-2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megatron_ext.data.records import read_texts
    from megatron_ext.data.tokenizer import UNLIMITED_LENGTH, write_tokenizer_folder

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(source, "text"), trainer)
    roles = {"bos_token": end, "eos_token": end, "unk_token": end}
    write_tokenizer_folder(folder, tokenizer.to_str().encode(), roles=roles, model_max_length=UNLIMITED_LENGTH)
