"""Texts to token ids as arrays: which library makes them, and where BOS, end of document and sentences go."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_ext.data.bpe_tables import NotApplicable
from megatron_ext.data.fast_tokenizer import Encoded, Encoder, NativeEncoder, ReferenceEncoder, choose_encoder
from megatron_ext.data.indexed import TokenArray, token_dtype
from megatron_ext.data.native_build import BuildError
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

_SHOWN_CHARACTERS = 60

Split = Callable[[str], list[str]]
"""Cuts a document into sentences."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What shapes the output besides the inputs and the tokenizer's files."""

    tokenizer: str
    """Tokenizer folder."""
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    prepend_bos: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    lang: str = "english"
    special_tokens_in_text: str = "parse"
    backend: str = "auto"

    @property
    def level(self) -> str:
        """What a sequence is, in Megatron's names of files."""
        return "sentence" if self.split_sentences else "document"

    def options(self) -> dict[str, Any]:
        """Name the settings whose change would change bytes, as the command line spells them."""
        sentences = {"keep_newlines": self.keep_newlines, "lang": self.lang} if self.split_sentences else {}
        return {
            "append_eod": self.append_eod,
            "prepend_bos": self.prepend_bos,
            "split_sentences": self.split_sentences,
            **sentences,
            "special_tokens_in_text": self.special_tokens_in_text,
            "tokenizer_backend": "transformers" if self.backend == "transformers" else "tokenizers",
        }


class Documents(NamedTuple):
    """The ids of some documents."""

    ids: TokenArray
    """`[tokens]` in the output's type, one document after another."""
    lengths: npt.NDArray[np.int32]
    """`[documents]` tokens of each, 0 for an empty one; with `sequences` `[sequences]` tokens, never 0."""
    sequences: npt.NDArray[np.int32] | None
    """`[documents]` sentences of each; None where each document is one sequence."""


class ChosenEncoder(NamedTuple):
    """The encoder of a run, and what to say of it."""

    encoder: Encoder
    message: str


def choose(settings: Settings, tokenizer: Tokenizer, sample: Callable[[], Sequence[str]]) -> ChosenEncoder:
    """Decide once for a whole run how ids are made; every process then uses the same way (`rebuild`).

    Args:
        sample: gives some texts of this very input, for the fast encoder to prove itself on.

    Raises:
        DataError: the library that is asked for is not installed, or its tokenizer is not the folder's.
    """
    if settings.backend == "transformers":
        return ChosenEncoder(TransformersEncoder(tokenizer), "encoder: transformers' AutoTokenizer, as Megatron-LM's")
    if settings.backend == "tokenizers":
        return ChosenEncoder(rebuild("tokenizers", settings, tokenizer), "encoder: the tokenizers library")
    encoder, reason = choose_encoder(tokenizer, special_tokens_in_text=settings.special_tokens_in_text, sample=sample())
    if reason is None:
        return ChosenEncoder(encoder, f"encoder: {encoder.name}; same ids as the tokenizers library on a sample")
    return ChosenEncoder(encoder, f"encoder: {encoder.name}, not the fast one: {reason}")


def rebuild(name: str, settings: Settings, tokenizer: Tokenizer) -> Encoder:
    """Build the encoder that `choose` named, in another process.

    Raises:
        DataError: it cannot be had on this machine.
    """
    if name == "transformers":
        return TransformersEncoder(tokenizer)
    if name == "tokenizers":
        return ReferenceEncoder(tokenizer, special_tokens_in_text=settings.special_tokens_in_text)
    assert name == NativeEncoder.name, name
    try:
        return NativeEncoder(tokenizer, special_tokens_in_text=settings.special_tokens_in_text)
    except (NotApplicable, BuildError) as error:
        raise DataError(
            f"{platform.node()}: the native encoder, which the run has chosen, cannot be had here ({error}); "
            "give --tokenizer-backend tokenizers."
        ) from error


class TransformersEncoder:
    """The ids that Megatron-LM's HuggingFaceTokenizer gives: `AutoTokenizer`, with its BOS (core_v0.19.0).

    Transformers 5 rebuilds tokenizers of Llama class, so that text around special tokens may get other ids
    than tokenizer.json gives it.
    """

    name = "transformers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import transformers
        except ImportError as error:
            raise DataError(
                "--tokenizer-backend transformers: it is not installed: pip install transformers."
            ) from error
        folder = tokenizer.folder
        try:
            backend = transformers.AutoTokenizer.from_pretrained(
                str(folder.resolve()), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the library's many layers raise
            reason = " ".join(str(error).split())
            raise DataError(f"{folder}: transformers' AutoTokenizer does not load it ({reason}).") from error
        if backend.eos_token_id != tokenizer.eod:
            raise DataError(
                f"{folder}: transformers ends documents with id {backend.eos_token_id}, tokenizer.json and its "
                f"companions say {tokenizer.eod}; make the folder's files agree."
            )
        self._backend = backend
        self._folder = folder
        self._vocab_size = tokenizer.vocab_size

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode each text by itself, as Megatron does."""
        # Not one batch: that goes over all cores, and the workers are the parallelism.
        ids = [self._backend(text, verbose=False).input_ids for text in texts]
        lengths = np.array([len(one) for one in ids], dtype=np.int32)
        flat = np.array([number for one in ids for number in one], dtype=np.int64)
        if flat.size and int(flat.max()) >= self._vocab_size:
            raise _out_of_range(flat, lengths, texts, self._vocab_size)
        return Encoded(flat.astype(token_dtype(self._vocab_size)), lengths)


class DocumentEncoder:
    """Encode documents with their BOS and end-of-document tokens, whole or by sentences.

    Each sentence is encoded by itself and gets its own BOS; the end of the document joins its last sentence;
    sentences without a token drop out (Megatron-LM's tools/preprocess_data.py, core_v0.16.1).
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer, encoder: Encoder, split: Split | None) -> None:
        assert (split is not None) == settings.split_sentences, settings
        self._encoder = encoder
        self._split = split
        self._vocab_size = tokenizer.vocab_size
        self._bos = tokenizer.bos if settings.prepend_bos else None
        self._eod = tokenizer.eod if settings.append_eod else None
        assert self._bos is not None or not settings.prepend_bos, settings

    def encode(self, texts: Sequence[str]) -> Documents:
        """Encode some documents.

        Raises:
            DataError: an id is not in the vocabulary; the message lacks the file.
        """
        if self._split is None:
            ids, lengths = self._encode(texts)
            return Documents(*self._mark(ids, lengths, ends=np.ones(lengths.size, dtype=bool)), None)
        sentences = [self._split(text) for text in texts]
        counts = np.array([len(document) for document in sentences], dtype=np.int32)
        ids, lengths = self._encode([sentence for document in sentences for sentence in document])
        # With BOS even an empty sentence holds a token.
        held = lengths > 0 if self._bos is None else np.ones(lengths.size, dtype=bool)
        owners = np.repeat(np.arange(counts.size), counts)[held]
        lengths = lengths[held]
        ends = np.ones(owners.size, dtype=bool)
        ends[:-1] = owners[1:] != owners[:-1]
        sequences = np.bincount(owners, minlength=counts.size).astype(np.int32)
        return Documents(*self._mark(ids, lengths, ends=ends), sequences)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        ids, lengths = self._encoder.encode(texts)
        # Seen as unsigned, a negative number is a high one.
        if ids.size and int(ids.view(f"u{ids.itemsize}").max()) >= self._vocab_size:
            raise _out_of_range(ids, lengths, texts, self._vocab_size)
        return Encoded(ids, lengths)

    def _mark(self, ids: TokenArray, lengths: npt.NDArray[np.int32], *, ends: npt.NDArray[np.bool_]) -> Encoded:
        """Put BOS before each text, and the end-of-document token after those that end one and hold a token."""
        if self._bos is None and self._eod is None:
            return Encoded(ids, lengths)
        bos = np.full(lengths.size, self._bos is not None)
        eod = ends & (bos | (lengths > 0)) if self._eod is not None else np.zeros(lengths.size, dtype=bool)
        after = np.cumsum(lengths, dtype=np.int64)
        places = np.stack([after - lengths, after], axis=1)  # before and after each text, in the order of the output
        chosen = np.stack([bos, eod], axis=1)
        marks = np.array([self._bos or 0, self._eod or 0], dtype=ids.dtype)
        values = np.broadcast_to(marks, places.shape)[chosen]
        lengths = lengths + bos.astype(np.int32) + eod.astype(np.int32)
        return Encoded(np.insert(ids, places[chosen], values), lengths)


def _out_of_range(
    ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32], texts: Sequence[str], vocab_size: int
) -> DataError:
    """Say which text has an id beyond the vocabulary."""
    place = int(((ids < 0) | (ids >= vocab_size)).argmax())
    text = texts[int(np.searchsorted(np.cumsum(lengths), place, side="right"))]
    return DataError(
        f"the text that begins {text[:_SHOWN_CHARACTERS]!r} gets id {ids[place]}, but the highest of tokenizer.json "
        f"is {vocab_size - 1}; make the tokenizer folder's files agree."
    )
