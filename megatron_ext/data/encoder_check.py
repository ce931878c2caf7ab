"""Layer 4: what an encoder is, and whether two of them give the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed import TokenArray
from megatron_ext.data.tokenizer import Tokenizer

_SPACE = "\u2581"
_ODD_TEXTS = (
    # nothing, spaces of all kinds, ends of lines
    "", " ", "  ", _SPACE, _SPACE * 2, f" {_SPACE}", f"{_SPACE} x", "x ", " x", "\n", "\t", " \n ", "\r\n\r\n", "\x00",
    "a\x00b\x00\x00c", "\u00a0nbsp\u00a0 \u3000\u2003wide", "\x85\u2028\u2029", "\ufeff", "\ufeffBOM",
    # other scripts, combining marks, joined emoji, the ends of Unicode
    "\u200b\u200d\u2060", "e\u0301a\u0308\u0323 n\u0303", "\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea\U0001f3fd",
    "漢字かな交じり文、全角　空白", "한국어 글자", "שלום עולם، مرحبا", "Привет, мир… «ёлки»", "ﬁ ﬀ ½ ² Ⅷ ①②",
    "\U0010ffff\ue000\ufffd", "ÿþ¿ŸžĀĠĊ Ġthe Ċ",
    # apostrophes, which GPT-2's expression treats apart
    "don't I'll we've they'RE he'd 's 'sx ''s '' 't' x's's'll a'vx a'rx a'lx 'v 'r 'l", "'" * 70,
    ("ab'" + "s" * 9) * 20, "x" * 63 + "'ll'" * 40,
    # numbers, code, addresses, what looks like tokens of the byte fallback or special ones
    "1234567890 3.14159 0x1F 1_000", "if x:\n    return  y\n\n\n\t\tpass   # ok\n", "http://a.b/c?d=e&f=%20",
    "<0x41><0x0A>", "<<s>> <s <s>x</s></s <|im_start| <unk>",
    # long runs
    "-" * 300, "=" * 65, " " * 1000, "\n" * 200, " \t" * 100, "a" * 5000, "ab" * 3000, "é" * 500, "日本" * 300,
    "\U0001f600" * 200, _SPACE * 600, "the " * 500,
)  # fmt: skip


class Encoded(NamedTuple):
    """The ids of some texts."""

    ids: TokenArray
    """`[tokens]` of all texts one after another, `token_dtype(vocab_size)`."""
    lengths: npt.NDArray[np.int32]
    """`[texts]` tokens of each."""


class Encoder(Protocol):
    """Turns texts into ids, special tokens never added."""

    name: str
    """What logs and manifests call it: "native", "tokenizers" or "transformers"."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, on one core.

        Raises:
            DataError: a text holds half a surrogate pair, or has more than 2^31 - 1 tokens.
        """


def first_difference(encoder: Encoder, reference: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text whose ids differ, encoding twice: the second time words come from a cache, if any."""
    expected = reference.encode(texts)
    for _ in range(2):
        got = encoder.encode(texts)
        if np.array_equal(got.lengths, expected.lengths) and np.array_equal(got.ids, expected.ids):
            continue
        for text, ours, theirs in zip(texts, _each(got), _each(expected), strict=True):
            if not np.array_equal(ours, theirs):
                return text
    return None


def adversarial_texts(tokenizer: Tokenizer) -> list[str]:
    """Make texts of what trips tokenizers: a fixed list, pieces of the vocabulary, added tokens whole and broken."""
    vocab = sorted(tokenizer.backend.get_vocab(with_added_tokens=False))
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()][:100]
    step = len(vocab) // 40 + 1
    glued = ["".join(vocab[start::step]).replace(_SPACE, " ") for start in range(min(step, 30))]
    apart = [" ".join(vocab[start : start + 50]) for start in range(0, len(vocab), step)]
    around = [
        text
        for token in added
        for text in (token, f"a {token} b{token}{token}\n", f" {token[1:]} {token[:-1]} {token}{token[0]}")
    ]
    # A block of 64 bytes of the kernel, and the text, may end at each place within odd things.
    token = added[0] if added else ""
    tails = (
        " don't é漢'll  \n x" + "z" * 70,
        "'s",
        "'ll",
        "  ",
        "é",
        " 漢",
        "  " + token,
        "é  " + token,
        "\n" + token + " x",
    )
    shifted = ["y" * shift + tail for shift in (*range(45, 70), *range(124, 132)) for tail in tails]
    return [*_ODD_TEXTS, *glued, *apart, *around, *shifted]


def _each(encoded: Encoded) -> list[TokenArray]:
    return np.split(encoded.ids, np.cumsum(encoded.lengths[:-1], dtype=np.int64))
