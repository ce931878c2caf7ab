#!/usr/bin/env python3
"""Build a tokenizer folder with the special-token scheme of 1.5-Pints.

`train` learns a BPE vocabulary from text; `pints` derives the tokenizer of 1.5-Pints from that of
Mistral-7B-v0.1. The scheme (1.5-Pints, tokenizer/README.md and tokenizer/pints): ids 0, 1, 2 are `<unk>`,
`<s>` and `<|im_end|>`, the ChatML turn end being the end of a document from pretraining on; 64 more come
after the BPE vocabulary, for padding, the chat formats in use, and reserve, so that no later stage has to
grow the embedding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError

UNK, BOS, EOS, PAD = "<unk>", "<s>", "<|im_end|>", "<|pad|>"

LEADING = (UNK, BOS, EOS)
"""Ids 0, 1, 2: in the BPE vocabulary and special at once, as Llama-family tokenizers have it."""

APPENDED = (
    "<|end_of_turn|>", PAD, "<|im_start|>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|user|>", "<|system|>", "<|assistant|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    *(f"<|reserved_{number}|>" for number in range(49)),
)  # fmt: skip
"""The 64 ids after the BPE vocabulary, in order."""

ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD}

BASE_VOCAB_SIZE = 32000

GOLDEN = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    [32002, 2188, 13, 16230, 2, 28705, 13, 32002, 13892, 13],
)
"""A chat and its ids by the published tokenizer of 1.5-Pints."""

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Ids 3 to 258: a character outside the vocabulary becomes its UTF-8 bytes, so nothing is ever unknown."""

SPACE = "▁"

MAX_TOKEN_CHARACTERS = 16
"""Longest learned token (SentencePiece's default, so Llama's too): no rulers of 80 dashes."""

BLOCK_CHARACTERS = 1 << 20
"""Plain text is read in blocks of about this size; by lines, each would count as the beginning of a text."""

CHARACTER_COVERAGE = 0.9995
"""Share of the text's characters that get tokens of their own (SentencePiece's default); rarer ones are spelt
in bytes, so a small vocabulary is not spent on characters that occur once."""

WORDS = (
    rf"{SPACE}?[\p{{L}}\p{{M}}]+"  # a word with the space before it
    r"|\p{N}"  # digits stand alone
    rf"|{SPACE}?[^{SPACE}\p{{L}}\p{{M}}\p{{N}}\x00-\x1F]+"  # punctuation
    rf"|{SPACE}+(?={SPACE}[^{SPACE}\p{{N}}])|{SPACE}+"  # indentation, but not the space of a word
)
"""What a learned token may span. Llama's vocabularies keep to about the same (script changes, digits and
control characters break tokens); there the trainer saw to it, here the pre-tokenizer does, which makes
encoding quick too."""

EPILOG = """\
examples:
  python tools/build_tokenizer.py train --input corpus/prose.train.jsonl corpus/code.train.jsonl \\
      --vocab-size 4096 --output tokenizers/demo
  python tools/build_tokenizer.py pints --base Mistral-7B-v0.1/tokenizer.json --output tokenizers/pints

Both write tokenizer.json, tokenizer_config.json (with a ChatML chat template) and special_tokens_map.json.
The same input gives the same bytes.
"""


def special_token(number: int, content: str) -> dict[str, Any]:
    """Describe a special token as tokenizer.json does."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": True}


def pints_tokenizer(base: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Derive the tokenizer of 1.5-Pints from Mistral-7B-v0.1's.

    The end-of-sequence token `</s>` at id 2 becomes `<|im_end|>`, as a vocabulary entry and as a special
    token; the 64 tokens of `APPENDED`, `</s>` among them, follow from 32,000 on. Merges and all else stay.

    Args:
        base: parsed tokenizer.json; left as it is.
        name: file that it came from, for messages.

    Raises:
        DataError: the base is not that tokenizer.
    """
    vocab = base.get("model", {}).get("vocab", {})
    special = {token["id"]: token["content"] for token in base.get("added_tokens", [])}
    expected = {0: UNK, 1: BOS, 2: "</s>"}
    in_place = all(vocab.get(token) == number for number, token in expected.items())
    if len(vocab) != BASE_VOCAB_SIZE or special != expected or not in_place:
        raise DataError(
            f"{name}: must be the tokenizer of Mistral-7B-v0.1 ({BASE_VOCAB_SIZE:,} BPE entries, special "
            f"tokens {expected}); it has {len(vocab):,} entries and special tokens {special}."
        )
    renamed = {EOS if token == "</s>" else token: number for token, number in vocab.items()}
    tokens = (*enumerate(LEADING), *enumerate(APPENDED, start=BASE_VOCAB_SIZE))
    return {
        **base,
        "added_tokens": [special_token(number, content) for number, content in tokens],
        "model": {**base["model"], "vocab": renamed},
    }


def choose_alphabet(texts: Iterator[str], limit: int) -> list[str]:
    """Choose the characters that get a token of their own: the most frequent, ties by code point.

    They make up `CHARACTER_COVERAGE` of the text, or are `limit` characters if that takes more. Control
    characters are never among them: a newline is the byte token <0x0A>, as in Llama's tokenizers.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    counts[SPACE] += counts.pop(" ", 0) + 1
    ranked = sorted((-count, char) for char, count in counts.items() if ord(char) >= 32)
    wanted = CHARACTER_COVERAGE * sum(counts[char] for _, char in ranked)
    covered = itertools.accumulate(counts[char] for _, char in ranked)
    size = 1 + sum(count < wanted for count in covered)
    return sorted(char for _, char in ranked[: min(size, limit)])


def train_tokenizer(
    inputs: Sequence[Path], *, key: str, vocab_size: int, limit_alphabet: int, show_progress: bool
) -> dict[str, Any]:
    """Learn a BPE vocabulary; returns the content of tokenizer.json.

    Args:
        inputs: JSON Lines files (`*.jsonl`), other files as plain text.
        key: key of the text in JSON Lines.
        vocab_size: all ids, special tokens included.
        limit_alphabet: most single characters in the vocabulary; others are spelt in bytes.
        show_progress: let the library draw its progress bars.

    Raises:
        DataError: an input cannot be read, or has too little text for that many tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = choose_alphabet(read_inputs(inputs, key), limit_alphabet)
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    # While training, characters without a token cut words, as their bytes will in use.
    outside = Regex("[^" + "".join(f"\\x{{{ord(char):X}}}" for char in alphabet) + "]")
    trainee = Tokenizer(models.BPE(unk_token=UNK, fuse_unk=True, byte_fallback=True))
    trainee.normalizer = normalizer
    trainee.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(outside, behavior="removed"), words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(APPENDED),
        min_frequency=2,
        special_tokens=[*LEADING, *BYTE_TOKENS],
        # Chosen above: the library's own choice among equally frequent characters varies from run to run.
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=MAX_TOKEN_CHARACTERS,
        show_progress=show_progress,
    )
    trainee.train_from_iterator(read_inputs(inputs, key), trainer)
    trainee.pre_tokenizer = words
    content: dict[str, Any] = json.loads(trainee.to_str())
    learned = len(content["model"]["vocab"])
    if learned + len(APPENDED) != vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size}: the input has only enough text for {learned + len(APPENDED)}; "
            "give more text, or a vocabulary of at most that size."
        )
    tokens = (*enumerate(LEADING), *enumerate(APPENDED, start=learned))
    content["added_tokens"] = [special_token(number, token) for number, token in tokens]
    content["post_processor"] = _begin_with_bos()
    content["decoder"] = _decoder()
    return content


def _begin_with_bos() -> dict[str, Any]:
    """Add BOS where a caller asks for special tokens, as Llama's tokenizers do; training never asks."""
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second_bos = {"SpecialToken": {"id": BOS, "type_id": 1}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second_bos, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [LEADING.index(BOS)], "tokens": [BOS]}},
    }


def _decoder() -> dict[str, Any]:
    """Undo the normalizer and the byte fallback."""
    return {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }


def read_inputs(inputs: Sequence[Path], key: str) -> Iterator[str]:
    """Read all texts in order: documents of JSON Lines files, blocks of whole lines of other files."""
    from megatron_ext.data.records import read_texts

    for path in inputs:
        if path.suffix == ".jsonl":
            yield from read_texts(path, key)
            continue
        try:
            with path.open(encoding="utf-8") as file:
                while lines := file.readlines(BLOCK_CHARACTERS):
                    yield "".join(lines)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def write_folder(content: dict[str, Any], output: Path) -> None:
    """Write the tokenizer folder."""
    from megatron_ext.data.tokenizer import CHAT_TEMPLATE, UNLIMITED_LENGTH, write_tokenizer_folder

    write_tokenizer_folder(
        output,
        json.dumps(content, indent=2, ensure_ascii=False).encode(),
        roles=ROLES,
        model_max_length=UNLIMITED_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )


def run_train(args: argparse.Namespace) -> str:
    """Run `train`; returns the closing line."""
    from megatron_ext.data.tokenizer import Tokenizer

    inputs = [Path(name) for name in args.input]
    for path in inputs:
        if not path.is_file():
            raise DataError(f"--input {path}: no such file; give JSON Lines (*.jsonl) or plain text files.")
    limit = args.limit_alphabet or max(args.vocab_size // 16, 128)
    least = len(LEADING) + len(BYTE_TOKENS) + limit + len(APPENDED)
    if args.vocab_size <= least:
        raise DataError(
            f"--vocab-size {args.vocab_size}: must be above {least} (special tokens "
            f"{len(LEADING) + len(APPENDED)}, bytes {len(BYTE_TOKENS)}, characters {limit}); "
            "use 1024 or more, or a smaller --limit-alphabet."
        )
    content = train_tokenizer(
        inputs,
        key=args.json_key,
        vocab_size=args.vocab_size,
        limit_alphabet=limit,
        show_progress=sys.stderr.isatty(),
    )
    write_folder(content, Path(args.output))
    tokenizer = Tokenizer.load(args.output)
    compression = bytes_per_token(tokenizer, inputs, args.json_key)
    return f"{args.output}: {tokenizer.vocab_size:,} tokens, {compression}"


def bytes_per_token(tokenizer: Any, inputs: Sequence[Path], key: str) -> str:
    """Measure the compression on the start of each input (1 MB)."""
    figures = []
    for path in inputs:
        num_bytes = num_tokens = 0
        for text in read_inputs([path], key):
            num_bytes += len(text.encode())
            num_tokens += len(tokenizer.encode(text))
            if num_bytes > 1e6:
                break
        figures.append(f"{num_bytes / max(num_tokens, 1):.2f} on {path.name}")
    return f"bytes per token: {', '.join(figures)}"


def run_pints(args: argparse.Namespace) -> str:
    """Run `pints`; returns the closing line."""
    from tokenizers import Tokenizer

    path = Path(args.base)
    try:
        base = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--base {path}: must be a tokenizer.json ({error}).") from error
    if not isinstance(base, dict) or not isinstance(base.get("model"), dict):
        raise DataError(f"--base {path}: must be a tokenizer.json with a BPE model.")
    content = pints_tokenizer(base, name=f"--base {path}")
    text, expected = GOLDEN
    ids = Tokenizer.from_str(json.dumps(content)).encode(text, add_special_tokens=False).ids
    if ids != expected:
        raise DataError(
            f"--base {path}: is not the tokenizer of Mistral-7B-v0.1: the chat {text!r} gets the ids {ids}, "
            f"1.5-Pints' are {expected}."
        )
    write_folder(content, Path(args.output))
    return f"{args.output}: {BASE_VOCAB_SIZE + len(APPENDED):,} tokens, ids of 1.5-Pints confirmed"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Build a tokenizer folder with the special tokens of 1.5-Pints.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{train,pints}")
    train = commands.add_parser("train", help="learn a BPE vocabulary from text")
    train.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines (*.jsonl) or plain text")
    train.add_argument("--json-key", default="text", metavar="KEY", help="key of the text (default: text)")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="all ids, special ones included")
    train.add_argument("--output", required=True, metavar="FOLDER", help="tokenizer folder to write")
    train.add_argument(
        "--limit-alphabet", type=int, metavar="N",
        help="most characters with a token of their own (default: a sixteenth of the vocabulary; fewer if "
        "they make up 99.95%% of the text)",
    )  # fmt: skip
    train.set_defaults(run=run_train)
    pints = commands.add_parser("pints", help="derive 1.5-Pints' 32,064 tokens from Mistral-7B-v0.1's tokenizer.json")
    pints.add_argument("--base", required=True, metavar="FILE", help="tokenizer.json of Mistral-7B-v0.1")
    pints.add_argument("--output", required=True, metavar="FOLDER", help="tokenizer folder to write")
    pints.set_defaults(run=run_pints)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        print(args.run(args))
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
