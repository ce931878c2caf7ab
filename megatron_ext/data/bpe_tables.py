"""Layer 4: read a tokenizer.json into the tables of bpe_kernel.cpp, or say why the kernel cannot follow it.

Strict: every field is either known to do what the kernel does, or the tokenizer is refused. What is read is the
`tokenizers` library's own account of what it has loaded, so that defaults are spelt out and ids are final.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from megatron_ext.data.char_classes import LETTERS, MARKS, NUMBERS, SPACES

METASPACE, BYTE_LEVEL, OWN_WORDS = 0, 1, 2
"""Styles, as the kernel numbers and describes them."""
PREFIX_NEVER, PREFIX_FIRST, PREFIX_ALWAYS, PREFIX_EVEN = 0, 1, 2, 3
"""When a section of text gets a space in front: never; the text's first section, or every one, unless it begins
with a space; every one in any case."""

_SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_OWN_SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": rf"{_SPACE}?[\p{{L}}\p{{M}}]+|\p{{N}}|{_SPACE}?[^{_SPACE}\p{{L}}\p{{M}}\p{{N}}\x00-\x1F]+"
        rf"|{_SPACE}+(?={_SPACE}[^{_SPACE}\p{{N}}])|{_SPACE}+"
    },
    "behavior": "Isolated",
    "invert": False,
}
"""What tools/build_tokenizer.py writes; between the same normalizers as Llama's."""
_TOP_FIELDS = frozenset(
    ("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
)
_MODEL_FIELDS = frozenset(
    (
        "type",
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
    )
)
_MAX_ID, _MAX_MERGES = (1 << 20) - 1, (1 << 24) - 1
"""What a slot of the kernel's table of merges can hold."""
_ADDED_FIELDS = frozenset(("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"))

_Ids = npt.NDArray[np.uint32]


class NotApplicable(Exception):
    """The kernel does not do what this tokenizer.json asks for; the message is a reason, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTokens:
    """Tokens that are found in the text before anything else."""

    contents: tuple[bytes, ...]
    ids: _Ids
    late: npt.NDArray[np.uint8]
    """1 for those that are looked for in what the others leave over (`normalized`)."""
    hidden: npt.NDArray[np.uint8]
    """1 for those that are found and then left as text (escaped special tokens)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BpeTables:
    """All that the kernel needs; code points and ids are uint32."""

    style: int
    prefix: int
    merges: _Ids
    """`[3, merges]` left id, right id and result, by rank."""
    byte_ids: _Ids
    """`[256]`"""
    chars: _Ids
    """`[2, chars]` characters of the vocabulary and their ids."""
    pairs: _Ids
    """`[2, pairs]` last character of a merge's left part, first character of its right part."""
    ranges: _Ids
    """`[3, ranges]` first and last code point and class (1 letters, 2 numbers, 3 spaces)."""
    added: AddedTokens


def read_tables(backend: tokenizers.Tokenizer, *, escape_special_tokens: bool) -> BpeTables:
    """Read what a tokenizer does.

    Args:
        backend: with truncation and padding off, as `Tokenizer.load` leaves it.
        escape_special_tokens: special tokens spelt out in a text are text.

    Raises:
        NotApplicable: the kernel cannot follow it.
    """
    _require(sys.byteorder == "little", "this processor is big-endian")
    content = json.loads(backend.to_str())
    model = content.pop("model")
    _require(content.keys() == _TOP_FIELDS, f"tokenizer.json has fields {sorted(content.keys() ^ _TOP_FIELDS)}")
    _require(content["version"] == "1.0", f"its version is {content['version']!r}, not '1.0'")
    _require(content["truncation"] is None and content["padding"] is None, "it truncates or pads")
    _check_post_processor(content["post_processor"])
    vocab, merges = _read_model(model, size=backend.get_vocab_size(with_added_tokens=False))
    normalizer, pre_tokenizer = content["normalizer"], content["pre_tokenizer"]
    style = _style(normalizer, pre_tokenizer)
    prefix = _prefix(normalizer, pre_tokenizer)
    added = _read_added_tokens(
        content["added_tokens"], normalized_as_is=normalizer is None, escape=escape_special_tokens
    )
    if style == BYTE_LEVEL:
        return _byte_level_tables(vocab, merges, prefix=prefix, added=added)
    _require(model["byte_fallback"], "its model has no byte fallback")
    return _metaspace_tables(vocab, merges, style=style, prefix=prefix, added=added)


def class_ranges(style: int) -> _Ids:
    """List the ranges of a style's character classes, after asking the library at every edge of them.

    Raises:
        NotApplicable: the library's regular expressions follow another version of Unicode.
    """
    kinds = [(1, LETTERS, r"\p{L}"), (2, NUMBERS, r"\p{N}")]
    kinds.append((1, MARKS, r"\p{M}") if style == OWN_WORDS else (3, SPACES, r"\s"))
    ranges = np.array([(*edges, kind) for kind, known, _ in kinds for edges in known], dtype=np.uint32)
    around = np.unique(ranges[:, :2].astype(np.int64)[..., None] + [-1, 0, 1])
    text = "".join(chr(code) for code in around.tolist() if 0 <= code < 0x110000 and not 0xD800 <= code < 0xE000)
    for _, known, pattern in kinds:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
        found = "".join(piece for piece, _ in split.pre_tokenize_str(text))
        firsts = [first for first, _ in known]
        last_before = ((c, known[bisect_right(firsts, ord(c)) - 1][1]) for c in text if ord(c) >= firsts[0])
        expected = "".join(c for c, last in last_before if ord(c) <= last)
        _require(found == expected, "the library's character classes are no longer those of char_classes.py")
    return np.ascontiguousarray(ranges.T)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotApplicable(reason)


def _style(normalizer: Any, pre_tokenizer: Any) -> int:
    if pre_tokenizer is None:
        return METASPACE
    if pre_tokenizer == _OWN_SPLIT:
        return OWN_WORDS
    kind = pre_tokenizer.get("type")
    _require(kind in ("Metaspace", "ByteLevel"), f"its pre-tokenizer is {kind}, not ByteLevel or Metaspace")
    _require(normalizer is None, f"it has both a normalizer and the pre-tokenizer {kind}")
    return METASPACE if kind == "Metaspace" else BYTE_LEVEL


def _prefix(normalizer: Any, pre_tokenizer: Any) -> int:
    """Find when a space is put in front, and that nothing else is changed before the merging."""
    if pre_tokenizer is None or pre_tokenizer["type"] == "Split":
        if normalizer in (_REPLACE, {"type": "Sequence", "normalizers": [_REPLACE]}):
            return PREFIX_NEVER
        if normalizer == {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}:
            return PREFIX_EVEN
        shown = "none" if normalizer is None else json.dumps(normalizer, ensure_ascii=False)
        raise NotApplicable(f"its normalizer is not Prepend and Replace of {_SPACE} (but {shown[:100]})")
    if pre_tokenizer["type"] == "Metaspace":
        schemes = {"never": PREFIX_NEVER, "first": PREFIX_FIRST, "always": PREFIX_ALWAYS}
        scheme = pre_tokenizer.get("prepend_scheme")
        known = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
        _require(pre_tokenizer == known and scheme in schemes, f"its Metaspace is {json.dumps(pre_tokenizer)[:150]}")
        return schemes[scheme]
    spaced, trim = pre_tokenizer.get("add_prefix_space"), pre_tokenizer.get("trim_offsets")
    # trim_offsets changes where tokens are said to lie, never their ids.
    known = {"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": trim, "use_regex": True}
    _require(pre_tokenizer == known and isinstance(spaced, bool), f"its ByteLevel is {json.dumps(pre_tokenizer)[:150]}")
    return PREFIX_ALWAYS if spaced else PREFIX_NEVER


def _check_post_processor(processor: Any) -> None:
    """Check that without special tokens it leaves ids alone."""
    if processor is None or processor.get("type") == "ByteLevel":
        return
    if processor.get("type") == "Sequence":
        for inner in processor.get("processors", ()):
            _check_post_processor(inner)
        return
    _require(processor.get("type") == "TemplateProcessing", f"its post-processor is {processor.get('type')}")
    sequences = [piece["Sequence"]["id"] for piece in processor["single"] if "Sequence" in piece]
    _require(sequences == ["A"], f"its template has the sequences {sequences}, not one 'A'")


def _read_model(model: dict[str, Any], *, size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Check the model's options, and take vocabulary and merges out of it."""
    _require(model.get("type") == "BPE", f"its model is {model.get('type')}, not BPE")
    vocab, merges = model.pop("vocab"), model.pop("merges")
    _require(model.keys() == _MODEL_FIELDS, f"its model has fields {sorted(model.keys() ^ _MODEL_FIELDS)}")
    _require(not model["dropout"], "its model has dropout")
    _require(not model["ignore_merges"], "its model ignores merges for whole words")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model[name], f"its model has a {name}")
    _require(len(set(vocab.values())) == len(vocab) == size, "its vocabulary gives one id to several tokens")
    _require(bool(merges), "its model has no merges")
    _require(max(vocab.values()) < _MAX_ID and len(merges) < _MAX_MERGES, "its vocabulary is too large for the kernel")
    return vocab, merges


def _read_added_tokens(tokens: Sequence[Mapping[str, Any]], *, normalized_as_is: bool, escape: bool) -> AddedTokens:
    for token in tokens:
        content = token.get("content")
        _require(token.keys() == _ADDED_FIELDS and bool(content), f"its added token {content!r} has unknown fields")
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(not token[flag], f"its added token {content!r} has {flag}")
        _require(normalized_as_is or not token["normalized"], f"its added token {content!r} is normalized")
    return AddedTokens(
        contents=tuple(token["content"].encode() for token in tokens),
        ids=np.array([token["id"] for token in tokens], dtype=np.uint32),
        late=np.array([token["normalized"] for token in tokens], dtype=np.uint8),
        hidden=np.array([escape and token["special"] for token in tokens], dtype=np.uint8),
    )


def _metaspace_tables(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, style: int, prefix: int, added: AddedTokens
) -> BpeTables:
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    _require(all(name in vocab for name in names), "its vocabulary lacks tokens of the byte fallback")
    _require(_SPACE in vocab, f"its vocabulary lacks {_SPACE}")
    parts = {part for merge in merges for part in merge} | {left + right for left, right in merges}
    _require(parts.isdisjoint(names), "it merges tokens of the byte fallback")
    chars = [token for token in vocab if len(token) == 1]
    joined = {(left[-1], right[0]) for left, right in merges}
    return BpeTables(
        style=style,
        prefix=prefix,
        merges=_merge_ids(vocab, merges),
        byte_ids=np.array([vocab[name] for name in names], dtype=np.uint32),
        chars=np.array([[ord(c) for c in chars], [vocab[c] for c in chars]], dtype=np.uint32),
        pairs=np.array([[ord(pair[side]) for pair in sorted(joined)] for side in (0, 1)], dtype=np.uint32),
        ranges=class_ranges(style) if style == OWN_WORDS else np.zeros((3, 0), dtype=np.uint32),
        added=added,
    )


def _byte_level_tables(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, prefix: int, added: AddedTokens
) -> BpeTables:
    letters = _byte_letters()
    _require(all(letter in vocab for letter in letters), "its vocabulary lacks bytes")
    return BpeTables(
        style=BYTE_LEVEL,
        prefix=prefix,
        merges=_merge_ids(vocab, merges),
        byte_ids=np.array([vocab[letter] for letter in letters], dtype=np.uint32),
        chars=np.zeros((2, 0), dtype=np.uint32),
        pairs=np.zeros((2, 0), dtype=np.uint32),
        ranges=class_ranges(BYTE_LEVEL),
        added=added,
    )


def _merge_ids(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> _Ids:
    return np.array(
        [
            [vocab[left] for left, _ in merges],
            [vocab[right] for _, right in merges],
            [vocab[left + right] for left, right in merges],
        ],
        dtype=np.uint32,
    )


def _byte_letters() -> list[str]:
    """Give the character that stands for each byte: itself where it can be seen, else one from U+0100 on.

    The table of GPT-2's src/encoder.py.
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(0x100 + unseen.index(byte)) for byte in range(256)]
