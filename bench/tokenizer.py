#!/usr/bin/env python3
"""Tokenising alone: our kernel against the `tokenizers` library and fastokens, on text that no cache has seen.

Text is collected from this machine (bench/real_text.py). A is ours, B the peer; each has a process of its own, they
take turns A B B A, and each turn encodes documents that neither has met before. CPU time of one core. A tokenizer is a
folder, or "gpt2-style" or "llama-style": then one is trained first, on text of its own.

    python bench/tokenizer.py --tokenizers ../shared/data/tokenizers/pints gpt2-style
    python bench/tokenizer.py --tokenizers tokenizers/pints --fuzz 1000000    # compare ids instead of speed

With --fuzz the ids of that many random strings, and of all the text, are compared with the library's; exit code 1 if
one differs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

import numpy as np

from bench.interleave import compare
from bench.preprocess_tokenizers import TRAINED, tokenizer_folder
from bench.real_text import collect
from megatron_ext.data.encoder_check import Encoder, first_difference
from megatron_ext.data.fast_tokenizer import NativeEncoder, ReferenceEncoder
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import EXIT_CODE, MegapintsError

PEERS = ("encode", "encode_batch_fast", "fastokens")
TRAINING_BYTES = 10_000_000
_FUZZ_BATCH = 5_000
_ODD = [
    *" \n\t\r'\u2581\u00a0\u3000\u200b\u0301\x00\ufeff\x85éßİ漢字한😀𝔘²٣ⅧxA01-.<>|/\ue000\U0010ffff",
    "  ", "\u2581\u2581", "'s", "'ll", "'re", "👩\u200d🚀", "...", "--", "def ", "return", "http://", "<0x0A>", "<|",
]  # fmt: skip


def read_units(corpus: Path, unit_bytes: int) -> list[list[str]]:
    """Cut a corpus into lists of documents of about that many bytes of text; the rest at the end is left out."""
    units: list[list[str]] = []
    unit: list[str] = []
    size = 0
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            unit.append(json.loads(line)["text"])
            size += len(unit[-1].encode())
            if size >= unit_bytes:
                units.append(unit)
                unit, size = [], 0
    return units


def encoder(peer: str, folder: Path) -> Callable[[list[str]], Any]:
    """Build what turns a list of texts into ids."""
    if peer == "fastokens":
        import fastokens

        theirs = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda texts: theirs.encode_batch_flat(texts, add_special_tokens=False)
    tokenizer = Tokenizer.load(folder)
    if peer == "ours":
        return NativeEncoder(tokenizer).encode
    if peer == "encode":
        return lambda texts: [tokenizer.encode(text) for text in texts]
    return ReferenceEncoder(tokenizer).encode


def build(peer: str, folder: Path, corpus: Path, unit_bytes: int) -> Callable[[], None]:
    """Build an implementation; each call encodes the next unit of the corpus, which it has not seen before."""
    units = iter(read_units(corpus, unit_bytes))
    encode = encoder(peer, folder)
    return lambda: (encode(next(units)), None)[1]


def is_applicable(peer: str, folder: Path) -> str | None:
    """Say why a peer cannot be compared with, if so; it must give the library's ids for a sentence at least."""
    text = "The quick brown fox, 12 €.\n\tif x:\n"
    try:
        got = encoder(peer, folder)([text])
    except ImportError:
        return "is not installed"
    except Exception as error:  # a foreign library: whatever it raises means that it does not take the file
        return f"refuses it ({str(error)[:80]})"
    first = np.frombuffer(got[0], dtype="<u4") if peer == "fastokens" else np.asarray(got[0]).ravel()
    return None if first.tolist() == Tokenizer.load(folder).encode(text) else "gives other ids"


def fuzz(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[str]:
    """Make strings of vocabulary pieces, odd characters, runs, and added tokens whole and broken."""
    chance = random.Random(seed)
    vocab = sorted(tokenizer.backend.get_vocab(with_added_tokens=False))
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()] or vocab

    def any_char() -> str:
        while 0xD800 <= (code := chance.randrange(chance.choice((0x80, 0x3000, 0x10000, 0x110000)))) < 0xE000:
            pass
        return chr(code)

    makers: tuple[Callable[[], str], ...] = (
        lambda: chance.choice(vocab),
        lambda: chance.choice(vocab).replace("\u2581", " ").replace("Ġ", " ").replace("Ċ", "\n"),
        lambda: chance.choice(_ODD),
        lambda: chance.choice(_ODD) * int(1 + chance.expovariate(0.2)),
        any_char,
        lambda: chance.choice(added),
        lambda: chance.choice(added)[: chance.randrange(6)],
        lambda: "".join(chr(chance.randrange(32, 127)) for _ in range(chance.randrange(9))),
    )
    for _ in range(count):
        parts = int(chance.expovariate(0.1)) * (10 if chance.random() < 0.02 else 1)
        yield "".join(chance.choice(makers)() for _ in range(parts))


def count_differences(folder: Path, corpus: Path, strings: int) -> int:
    """Compare ids on random strings, special tokens parsed and escaped in turn, and on the corpus; print each batch
    that differs and return how many do."""
    tokenizer = Tokenizer.load(folder)
    differences = 0

    def check(ours: Encoder, theirs: Encoder, texts: list[str]) -> None:
        nonlocal differences
        if (different := first_difference(ours, theirs, texts)) is not None:
            differences += 1
            print(f"  differs: {different[:200]!r}", flush=True)

    pairs = [
        (NativeEncoder(tokenizer, special_tokens_in_text=how), ReferenceEncoder(tokenizer, special_tokens_in_text=how))
        for how in ("parse", "escape")
    ]
    for start in range(0, strings, _FUZZ_BATCH):
        check(*pairs[start // _FUZZ_BATCH % 2], list(fuzz(tokenizer, min(_FUZZ_BATCH, strings - start), start)))
    size = 0
    for unit in read_units(corpus, 1_000_000):
        check(*pairs[0], unit)
        size += sum(len(text.encode()) for text in unit)
    print(
        f"{folder.name}: {strings:,} strings and {size / 1e6:.1f} MB of text, {differences} batches differ", flush=True
    )
    return differences


def compare_speed(folder: Path, corpus: Path, *, peers: Sequence[str], rounds: int, unit_bytes: int) -> None:
    """Print MB per CPU second of ours and of each peer, and their ratio."""
    for peer in peers:
        if (problem := is_applicable(peer, folder)) is not None:
            print(f"{folder.name:12} {peer} {problem}")
            continue
        ours, theirs = (functools.partial(build, name, folder, corpus, unit_bytes) for name in ("ours", peer))
        result = compare(ours, theirs, rounds=rounds, units=1)
        measured = read_units(corpus, unit_bytes)[1 : 1 + 2 * rounds]
        megabytes = sum(len(text.encode()) for unit in measured for text in unit) / len(measured) / 1e6
        print(f"{folder.name:12} ours {megabytes / result.first:6.1f} MB/s, {peer} {megabytes / result.second:5.2f}: "
              f"ratio {result.ratio:5.1f} (rounds from {result.lowest:.1f} to {result.highest:.1f})",
              flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, for each tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=list(TRAINED), metavar="FOLDER_OR_STYLE")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--mb", type=float, default=60, help="text to collect, in 10^6 bytes (60)")
    parser.add_argument("--unit-mb", type=float, default=4, help="text per turn (4)")
    parser.add_argument("--rounds", type=int, default=5, help="times A B B A (5)")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="compare ids on N random strings instead")
    args = parser.parse_args(argv)
    # One core: threads would cost more CPU time for the same.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    needed = args.unit_mb * (1 + 2 * args.rounds)
    if not args.fuzz and args.mb < needed + 2:
        parser.error(f"--mb {args.mb:g} is too little for {args.rounds} rounds of unseen text; give {needed + 2:g}.")
    try:
        with tempfile.TemporaryDirectory(prefix="megapints-bench-") as name:
            work = Path(name)
            corpus, training = work / "all.jsonl", work / "training.jsonl"
            found = collect(corpus, max_bytes=int(args.mb * 1e6 + TRAINING_BYTES))
            hold_out(corpus, training)
            print(f"{found.text_bytes / 1e6:.1f} MB of text, {found.code_bytes / found.text_bytes:.0%} code; "
                  f"styles are trained on the first {TRAINING_BYTES / 1e6:.0f} MB, which is then left out")  # fmt: skip
            differences = 0
            for tokenizer in args.tokenizers:
                folder = tokenizer_folder(tokenizer, training=training, folder=work)
                if args.fuzz:
                    differences += count_differences(folder, corpus, args.fuzz)
                else:
                    unit_bytes = int(args.unit_mb * 1e6)
                    compare_speed(folder, corpus, peers=args.peers, rounds=args.rounds, unit_bytes=unit_bytes)
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 1 if differences else 0


def hold_out(corpus: Path, training: Path) -> None:
    """Move the first documents of a corpus into a file to train on."""
    with corpus.open("rb") as file:
        head = [file.readline()]
        while sum(map(len, head)) < TRAINING_BYTES and (line := file.readline()):
            head.append(line)
        rest = file.read()
    training.write_bytes(b"".join(head))
    corpus.write_bytes(rest)


if __name__ == "__main__":  # the measured processes import this file
    sys.exit(main())
