"""tools/preprocessing/encode.py against loops over lists that do the same one document at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.fast_tokenizer import Encoded
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from tests.unit.small_tokenizer import build_small_tokenizer
from tools.preprocessing.encode import DocumentEncoder, Settings, TransformersEncoder, choose, rebuild

BOS, EOD = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Letters:
    """Gives each character an id of its own, and "~" none."""

    name = "letters"

    def __init__(self, dtype: str = "<u2") -> None:
        self._dtype = np.dtype(dtype)

    def ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter != "~"]

    def encode(self, texts: Sequence[str]) -> Encoded:
        ids = [self.ids(text) for text in texts]
        lengths = np.array([len(one) for one in ids], dtype=np.int32)
        return Encoded(np.array([number for one in ids for number in one], dtype=self._dtype), lengths)


def expected(documents: Sequence[Sequence[str]], *, bos: bool, eod: bool) -> list[list[list[int]]]:
    """Encode documents of sentences as Megatron-LM's Encoder.encode does (tools/preprocess_data.py, core_v0.16.1)."""
    result = []
    for sentences in documents:
        document = []
        for sentence in sentences:
            ids = [BOS] * bos + Letters().ids(sentence)
            if ids:
                document.append(ids)
        if document and eod:
            document[-1].append(EOD)
        result.append(document)
    return result


def make(tokenizer: Tokenizer, *, split: bool, encoder: Any = None, **settings: Any) -> DocumentEncoder:
    chosen = Settings(tokenizer=str(tokenizer.folder), split_sentences=split, **settings)
    return DocumentEncoder(chosen, tokenizer, encoder or Letters(), (lambda text: text.split("|")) if split else None)


def random_texts(generator: random.Random) -> list[str]:
    return ["".join(generator.choices("ab~|", k=generator.randrange(7))) for _ in range(generator.randrange(9))]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("eod", [False, True], ids=["no eod", "eod"])
def test_documents_get_their_marks(tokenizer: Tokenizer, bos: bool, eod: bool) -> None:
    encoder = make(tokenizer, split=False, prepend_bos=bos, append_eod=eod)
    generator = random.Random(0)
    for _ in range(300):
        texts = random_texts(generator)
        wanted = [sum(document, []) for document in expected([[text] for text in texts], bos=bos, eod=eod)]
        got = encoder.encode(texts)
        assert got.ids.tolist() == sum(wanted, [])
        assert (got.lengths.tolist(), got.lengths.dtype) == ([len(ids) for ids in wanted], np.int32)
        assert (got.sequences, got.ids.dtype) == (None, np.dtype("<u2"))


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("eod", [False, True], ids=["no eod", "eod"])
def test_sentences_get_their_marks(tokenizer: Tokenizer, bos: bool, eod: bool) -> None:
    encoder = make(tokenizer, split=True, prepend_bos=bos, append_eod=eod)
    generator = random.Random(1)
    for _ in range(300):
        texts = random_texts(generator)
        wanted = expected([text.split("|") for text in texts], bos=bos, eod=eod)
        got = encoder.encode(texts)
        assert got.sequences is not None
        assert got.sequences.tolist() == [len(document) for document in wanted]
        assert got.lengths.tolist() == [len(ids) for document in wanted for ids in document]
        assert got.ids.tolist() == [number for document in wanted for ids in document for number in ids]
        assert {got.lengths.dtype, got.sequences.dtype} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("dtype", "text"), [("<u2", "ü\u0400"), ("<i4", "ü\U0001f600")])
def test_id_beyond_the_vocabulary_names_its_text(tokenizer: Tokenizer, dtype: str, text: str) -> None:
    encoder = make(tokenizer, split=False, encoder=Letters(dtype))
    number = ord(text[1])
    with pytest.raises(DataError, match=rf"the text that begins 'b{text}.* gets id {number}, .* is 1023;"):
        encoder.encode(["fine", "", f"b{text}", text])


def test_negative_id_is_beyond_the_vocabulary(tokenizer: Tokenizer) -> None:
    class Negative(Letters):
        def encode(self, texts: Sequence[str]) -> Encoded:
            return Encoded(np.array([5, -1], dtype="<i4"), np.array([1, 1], dtype=np.int32))

    with pytest.raises(DataError, match="the text that begins 'second' gets id -1"):
        make(tokenizer, split=False, encoder=Negative()).encode(["first", "second"])


@pytest.mark.parametrize("backend", ["auto", "tokenizers", "transformers"])
def test_encoder_rebuilt_by_name_gives_the_same_ids(tokenizer: Tokenizer, backend: str) -> None:
    settings = Settings(tokenizer=str(tokenizer.folder), backend=backend)
    texts = ["The bake and the mino.", "", "naïve </s>"]
    chosen = choose(settings, tokenizer, lambda: texts).encoder
    again = rebuild(chosen.name, settings, tokenizer)
    assert again.encode(texts).ids.tolist() == chosen.encode(texts).ids.tolist()


def test_tokenizers_backend_never_asks_for_the_sample(tokenizer: Tokenizer) -> None:
    settings = Settings(tokenizer=str(tokenizer.folder), backend="tokenizers")
    assert choose(settings, tokenizer, lambda: pytest.fail("asked")).encoder.name == "tokenizers"


def test_transformers_that_ends_documents_otherwise_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"transformers ends documents with id 2, tokenizer.json and its companions say 5"
    ):
        TransformersEncoder(replace(tokenizer, eod=5))


def test_transformers_that_does_not_load_is_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="AutoTokenizer does not load it") as caught:
        TransformersEncoder(replace(tokenizer, folder=tmp_path))
    assert "\n" not in str(caught.value)
