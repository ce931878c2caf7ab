"""Layer 4: texts to ids for preprocessing, by a kernel of our own where it is proved equal to the library.

`choose_encoder` gives the kernel (bpe_kernel.cpp) where it follows the tokenizer.json, can be compiled here, and
gives the ids of the `tokenizers` library on a sample and on texts made to break it. Everywhere else it gives the
library's batch path and the reason.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.bpe_tables import BpeTables, NotApplicable, read_tables
from megatron_ext.data.encoder_check import Encoded, Encoder, adversarial_texts, first_difference
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.native_build import BuildError, load_library
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

KERNEL = Path(__file__).with_name("bpe_kernel.cpp")
SPECIAL_TOKENS_IN_TEXT = ("parse", "escape")
"""A special token spelt out in a text becomes its id, or is text like any other."""

CHECK_CHARS = 192 << 10
"""How much of the sample `choose_encoder` compares; the library takes about 0.1 s for it."""
_CHECK_CHARS_PER_TEXT = 16 << 10
_PADDING = bytes(256)
"""What the kernel may read, and not use, past the last text."""


class ReferenceEncoder:
    """The `tokenizers` library's own batch path.

    It uses all cores unless TOKENIZERS_PARALLELISM is "false" or the process was forked after a use.
    """

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer, *, special_tokens_in_text: str = "parse") -> None:
        self._backend = tokenizer.backend
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._escape = _is_escape(special_tokens_in_text)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; see `Encoder`."""
        before = self._backend.encode_special_tokens
        self._backend.encode_special_tokens = self._escape
        try:
            ids = [each.ids for each in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            _to_utf8(texts)
            raise
        finally:
            self._backend.encode_special_tokens = before
        lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
        total = int(lengths.sum(dtype=np.int64))
        return Encoded(np.fromiter(itertools.chain.from_iterable(ids), dtype=self._dtype, count=total), lengths)


class NativeEncoder:
    """The kernel. One batch at a time; the interpreter's lock is free meanwhile."""

    name = "native"

    def __init__(self, tokenizer: Tokenizer, *, special_tokens_in_text: str = "parse") -> None:
        """Read the tables and load the kernel, compiling it if this was not yet done.

        Raises:
            NotApplicable: the kernel cannot follow this tokenizer.
            BuildError: it cannot be had on this machine.
        """
        tables = read_tables(tokenizer.backend, escape_special_tokens=_is_escape(special_tokens_in_text))
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._library = _open_kernel()
        config = _kernel_config(tables, id_bytes=self._dtype.itemsize)
        self._handle = self._library.mp_create(ctypes.byref(config))
        if not self._handle:
            raise MemoryError("the tokenizer's tables")
        weakref.finalize(self, self._library.mp_destroy, self._handle)
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; see `Encoder`."""
        parts = _to_utf8(texts)
        sizes = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        # A space before each text: the kernel takes it for the one that most tokenizers put there.
        buffer = b" ".join([b"", *parts, _PADDING])
        ends = np.cumsum(sizes + 1)
        starts = ends - sizes
        lengths = np.empty(len(parts), dtype=np.int32)
        found = ctypes.c_void_p()
        with self._lock:
            total = self._library.mp_encode(
                self._handle, buffer, starts.ctypes.data, ends.ctypes.data, len(parts), lengths.ctypes.data,
                ctypes.byref(found),
            )  # fmt: skip
            if total == -1:
                raise MemoryError("the ids of a batch of texts")
            if total < 0:
                raise DataError(f"text {-2 - total} of a batch has more than 2^31 - 1 tokens; cut it up.")
            ids = np.empty(total, dtype=self._dtype)
            ctypes.memmove(ids.ctypes.data, found, ids.nbytes)
        return Encoded(ids, lengths)


def choose_encoder(
    tokenizer: Tokenizer, *, special_tokens_in_text: str, sample: Sequence[str]
) -> tuple[Encoder, str | None]:
    """Choose the kernel, or the library and the reason why, in one line to be said aloud.

    Args:
        tokenizer: the run's.
        special_tokens_in_text: one of `SPECIAL_TOKENS_IN_TEXT`.
        sample: texts of this very input; about the first `CHECK_CHARS` characters of them are compared.
    """
    reference = ReferenceEncoder(tokenizer, special_tokens_in_text=special_tokens_in_text)
    try:
        native = NativeEncoder(tokenizer, special_tokens_in_text=special_tokens_in_text)
    except (NotApplicable, BuildError) as reason:
        return reference, str(reason)
    texts = [*_shortened(sample), *adversarial_texts(tokenizer)]
    different = first_difference(native, reference, texts)
    if different is not None:
        return reference, f"its ids differ from the tokenizers library's, for one on {different[:60]!r}"
    return native, None


def _shortened(sample: Sequence[str]) -> Iterator[str]:
    left = CHECK_CHARS
    for text in sample:
        if left <= 0:
            return
        # Half a surrogate pair is refused by every encoder; here it would hide what the sample is for.
        text = text[: min(_CHECK_CHARS_PER_TEXT, left)].encode(errors="ignore").decode()
        left -= len(text)
        yield text


def _is_escape(special_tokens_in_text: str) -> bool:
    assert special_tokens_in_text in SPECIAL_TOKENS_IN_TEXT, special_tokens_in_text
    return special_tokens_in_text == "escape"


def _to_utf8(texts: Sequence[str]) -> list[bytes]:
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"text {number} of a batch: holds half a surrogate pair (character {error.start}), "
                    "which no tokenizer takes; mend the text."
                ) from error
        raise


class _KernelConfig(ctypes.Structure):
    """`MpConfig` of bpe_kernel.cpp, field by field."""

    _fields_ = (
        ("style", ctypes.c_int32),
        ("prefix", ctypes.c_int32),
        ("id_bytes", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("num_merges", ctypes.c_int64),
        ("merge_left", ctypes.c_void_p),
        ("merge_right", ctypes.c_void_p),
        ("merge_result", ctypes.c_void_p),
        ("byte_ids", ctypes.c_void_p),
        ("num_chars", ctypes.c_int64),
        ("chars", ctypes.c_void_p),
        ("char_ids", ctypes.c_void_p),
        ("num_pairs", ctypes.c_int64),
        ("pair_left", ctypes.c_void_p),
        ("pair_right", ctypes.c_void_p),
        ("num_ranges", ctypes.c_int64),
        ("range_first", ctypes.c_void_p),
        ("range_last", ctypes.c_void_p),
        ("range_class", ctypes.c_void_p),
        ("num_added", ctypes.c_int64),
        ("added_bytes", ctypes.c_char_p),
        ("added_ends", ctypes.c_void_p),
        ("added_ids", ctypes.c_void_p),
        ("added_late", ctypes.c_void_p),
        ("added_hidden", ctypes.c_void_p),
    )


def _kernel_config(tables: BpeTables, *, id_bytes: int) -> _KernelConfig:
    """Point into the tables' arrays; what is returned keeps them alive."""
    added = tables.added
    ends = np.cumsum([len(content) for content in added.contents], dtype=np.int64)
    classes = tables.ranges[2].astype(np.uint8)
    kept = (tables, ends, classes)
    config = _KernelConfig(
        tables.style, tables.prefix, id_bytes, 0,
        tables.merges.shape[1], *_addresses(*tables.merges), *_addresses(tables.byte_ids),
        tables.chars.shape[1], *_addresses(*tables.chars),
        tables.pairs.shape[1], *_addresses(*tables.pairs),
        tables.ranges.shape[1], *_addresses(tables.ranges[0], tables.ranges[1], classes),
        len(added.contents), b"".join(added.contents), *_addresses(ends, added.ids, added.late, added.hidden),
    )  # fmt: skip
    config.kept = kept
    return config


def _addresses(*arrays: npt.NDArray[Any]) -> list[int]:
    assert all(array.flags.c_contiguous for array in arrays)
    return [array.ctypes.data for array in arrays]


def _open_kernel() -> ctypes.CDLL:
    library = load_library(KERNEL)
    library.mp_create.argtypes = [ctypes.c_void_p]
    library.mp_create.restype = ctypes.c_void_p
    library.mp_destroy.argtypes = [ctypes.c_void_p]
    library.mp_destroy.restype = None
    pointer = ctypes.c_void_p
    library.mp_encode.argtypes = [pointer, ctypes.c_char_p, pointer, pointer, ctypes.c_int64, pointer, pointer]
    library.mp_encode.restype = ctypes.c_int64
    return library
