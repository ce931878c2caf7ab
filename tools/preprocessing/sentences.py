"""Split texts into sentences as Megatron-LM's `--split-sentences` does: NLTK's punkt, without the network.

The parameters of punkt are data: NLTK's own where it has its `punkt_tab` models, otherwise those that NLTK's trainer
finds in a sample of the input. Either way they are written down as JSON once, so that every worker and rank, and a
run that is resumed, splits alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.durable import write_whole
from megatron_ext.errors import DataError

PIECE_CHARACTERS = 1_000_000
"""Megatron-LM cuts texts here first, within a sentence or not (`max_len`, tools/preprocess_data.py@core_v0.16.1)."""

TRAINING_BYTES = 8_000_000
"""Characters that training takes: about 15 seconds of one core."""

_FOLDER = "tokenizers/punkt_tab"


@dataclass(frozen=True, slots=True, kw_only=True)
class Punkt:
    """What punkt knows of a language."""

    origin: str
    """Where it is from, for people: "NLTK's english model" or "trained on 7.9 MB of the input"."""
    abbreviations: tuple[str, ...]
    collocations: tuple[tuple[str, str], ...]
    sentence_starters: tuple[str, ...]
    orthography: tuple[tuple[str, int], ...]
    """Word types and the flags of the contexts that they were met in."""

    def write(self, path: Path) -> None:
        """Write as JSON; the same knowledge gives the same bytes."""
        content = {name: getattr(self, name) for name in self.__slots__}
        write_whole(path, json.dumps(content, ensure_ascii=True, indent=0))

    @classmethod
    def read(cls, path: Path) -> Punkt:
        """Read what `write` wrote.

        Raises:
            DataError: it is not there, or is something else.
        """
        try:
            content = json.loads(path.read_bytes())
            return cls(
                origin=content["origin"],
                abbreviations=tuple(content["abbreviations"]),
                collocations=tuple((first, second) for first, second in content["collocations"]),
                sentence_starters=tuple(content["sentence_starters"]),
                orthography=tuple((word, int(flags)) for word, flags in content["orthography"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: holds no punkt parameters ({error}); delete it and run again.") from error


def load_or_train(sample: Callable[[], Sequence[str]], *, lang: str = "english") -> Punkt:
    """Load NLTK's model of a language where it is installed, otherwise train one.

    Args:
        sample: gives texts of the input, the same ones each time; asked only if there is no model. Of them
            `TRAINING_BYTES` characters are used.
        lang: name of the model.

    Raises:
        DataError: NLTK is not installed, has other languages than this one, or there is no text to train on.
    """
    try:
        from nltk.data import find
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise DataError("--split-sentences: NLTK (3.9 or later) is not installed: pip install nltk.") from error
    try:
        return _punkt(PunktTokenizer(lang)._params, f"NLTK's {lang} model")
    except (LookupError, ValueError, OSError) as error:
        try:
            folder = Path(str(find(_FOLDER)))
        except LookupError:
            return train(sample())
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
        raise DataError(f"--lang {lang}: NLTK has no such model in {folder}; languages there: {there}.") from error


def train(texts: Sequence[str]) -> Punkt:
    """Train punkt with NLTK's own trainer; the same texts give the same parameters.

    Raises:
        DataError: there is no text.
    """
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    left = TRAINING_BYTES
    for text in texts:
        if left > 0 and text.strip():
            trainer.train(text[:left], finalize=False)
            left -= len(text[:left])
    if left == TRAINING_BYTES:
        raise DataError("--split-sentences: the input holds no text to train NLTK's punkt on.")
    trainer.finalize_training()
    return _punkt(trainer.get_params(), f"trained on {(TRAINING_BYTES - left) / 1e6:.3g} MB of the input")


def _punkt(parameters: Any, origin: str) -> Punkt:
    """Put NLTK's parameters, which are sets, into an order of their own."""
    return Punkt(
        origin=origin,
        abbreviations=tuple(sorted(parameters.abbrev_types)),
        collocations=tuple(sorted((first, second) for first, second in parameters.collocations)),
        sentence_starters=tuple(sorted(parameters.sent_starters)),
        orthography=tuple(sorted((word, int(flags)) for word, flags in parameters.ortho_context.items())),
    )


class SentenceSplitter:
    """Splits texts into sentences.

    Args:
        punkt: what is known of the language.
        keep_newlines: leave the white space between sentences at the end of the first of them, where punkt
            drops it; so does Megatron-LM's `--keep-newlines`.
    """

    def __init__(self, punkt: Punkt, *, keep_newlines: bool) -> None:
        from nltk.tokenize.punkt import PunktLanguageVars, PunktParameters, PunktSentenceTokenizer

        parameters = PunktParameters()
        parameters.abbrev_types = set(punkt.abbreviations)
        parameters.collocations = set(punkt.collocations)
        parameters.sent_starters = set(punkt.sentence_starters)
        parameters.ortho_context.update(punkt.orthography)
        language = PunktLanguageVars()
        if keep_newlines:
            language = _keeping_white_space(PunktLanguageVars)()
        self._tokenizer = PunktSentenceTokenizer(parameters, lang_vars=language)

    def split(self, text: str) -> list[str]:
        """Split one text; an empty one has no sentence."""
        pieces = (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in self._tokenizer.tokenize(piece)]


def _keeping_white_space(plain: Any) -> Any:
    """Derive the language variables whose sentences end after the white space that follows them.

    NLTK's pattern of a possible end of a sentence matches the mark and looks ahead over white space to the next
    word. Here the white space belongs to the match, and so to the sentence; and, as in Megatron-LM's own
    (`CustomLanguageVars`), the match begins with the word before the mark, and the next word need not stand apart.
    """
    pattern = plain._period_context_fmt
    mark, gap = "%(SentEndChars)s", r"\s+(?P<next_tok>"
    assert pattern.count(mark) == 1 and pattern.count(gap) == 1, f"NLTK's pattern has changed: {pattern}"
    word = "" if r"\S*" in pattern.partition(mark)[0] else r"\S*"
    pattern = pattern.replace(mark, rf"{word}{mark}\s*").replace(gap, "(?P<next_tok>")
    return type("KeepingWhiteSpace", (plain,), {"__slots__": (), "_period_context_fmt": pattern})
