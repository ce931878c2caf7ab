"""tools/preprocessing/sentences.py: sentences are NLTK's, with or without the white space, trained or loaded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from tools.preprocessing import sentences
from tools.preprocessing.sentences import Punkt, SentenceSplitter, load_or_train, train

nltk = pytest.importorskip("nltk", reason="nltk is not installed")
from nltk.tokenize.punkt import (  # noqa: E402
    PunktLanguageVars,
    PunktParameters,
    PunktSentenceTokenizer,
    PunktTrainer,
    save_punkt_params,
)

ROOT = Path(__file__).resolve().parents[2]

TRAINING = (
    "Dr. Smith met Mr. Brown at 3 p.m. on Monday. They spoke of Prof. Green. Mr. Brown left early.\n\n"
    'Then Dr. Green said: "No!" However, it was late. See fig. 3 for that. The end... is near. However, not yet. '
) * 40

KNOWN = Punkt(
    origin="by hand",
    abbreviations=("dr", "e.g", "mr"),
    collocations=(("##number##", "street"),),
    sentence_starters=("however",),
    orthography=(("however", 2), ("street", 4)),
)

PIECES = [
    "Hello",
    "mr.",
    "Mr.",
    "e.g.",
    "!",
    "?",
    ".",
    "...",
    '"',
    ")",
    "(",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "However",
    "3.14",
]
PIECES += ["x!y", "'", ";", "\u2014", "\u3002", "\u00a0", "12", "street", "\r\n", "\u00e9t\u00e9"]


def parameters(punkt: Punkt) -> PunktParameters:
    """Give NLTK's form of what is known."""
    params = PunktParameters()
    params.abbrev_types = set(punkt.abbreviations)
    params.collocations = set(punkt.collocations)
    params.sent_starters = set(punkt.sentence_starters)
    for word, flags in punkt.orthography:
        params.ortho_context[word] = flags
    return params


def odd_texts() -> list[str]:
    """Make texts in which marks, gaps and words meet in every way."""
    chance = random.Random(0)
    return [
        "".join(chance.choice(PIECES) + chance.choice(["", " "]) for _ in range(chance.randint(0, 30)))
        for _ in range(3000)
    ]


def test_sentences_end_without_the_white_space_after_them() -> None:
    text = "Hello there. \n\nMr. Smith came. Bye!\n"
    assert SentenceSplitter(KNOWN, keep_newlines=False).split(text) == ["Hello there.", "Mr. Smith came.", "Bye!"]


def test_sentences_with_newlines_kept_end_with_the_white_space_after_them() -> None:
    text = "Hello there. \n\nMr. Smith came. Bye!\n"
    # NLTK takes the white space off the end of a text in any case, and so does Megatron-LM.
    expected = ["Hello there. \n\n", "Mr. Smith came. ", "Bye!"]
    assert SentenceSplitter(KNOWN, keep_newlines=True).split(text) == expected


def test_sentences_of_odd_texts_equal_nltks() -> None:
    splitter = SentenceSplitter(KNOWN, keep_newlines=False)
    reference = PunktSentenceTokenizer(parameters(KNOWN))
    for text in odd_texts():
        assert splitter.split(text) == reference.tokenize(text)


def test_sentences_with_newlines_kept_equal_those_of_the_known_pattern() -> None:
    class KeepingNewlines(PunktLanguageVars):  # the same pattern, written out by hand
        _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"

    splitter = SentenceSplitter(KNOWN, keep_newlines=True)
    reference = PunktSentenceTokenizer(parameters(KNOWN), lang_vars=KeepingNewlines())
    for text in odd_texts():
        found = splitter.split(text)
        assert found == reference.tokenize(text)


def test_text_of_more_than_a_piece_is_cut_before_it_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "PIECE_CHARACTERS", 10)
    splitter = SentenceSplitter(KNOWN, keep_newlines=False)
    assert splitter.split("One two three four. Five.") == ["One two th", "ree four.", "Five."]


def test_piece_is_a_million_characters() -> None:
    splitter = SentenceSplitter(KNOWN, keep_newlines=False)
    assert list(map(len, splitter.split("x" * 2_000_001))) == [1_000_000, 1_000_000, 1]


@pytest.mark.parametrize("keep_newlines", [False, True])
@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_text_without_words_has_no_sentence_but_what_nltk_makes_of_it(text: str, keep_newlines: bool) -> None:
    found = SentenceSplitter(KNOWN, keep_newlines=keep_newlines).split(text)
    assert found == PunktSentenceTokenizer(parameters(KNOWN)).tokenize(text)


def test_training_gives_what_nltks_trainer_gives() -> None:
    trained = train([TRAINING])
    expected = PunktTrainer(TRAINING).get_params()
    assert set(trained.abbreviations) == expected.abbrev_types
    assert set(trained.collocations) == expected.collocations
    assert set(trained.sentence_starters) == expected.sent_starters
    assert dict(trained.orthography) == dict(expected.ortho_context)
    assert {"dr", "mr", "prof"} <= set(trained.abbreviations)


def test_training_takes_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "TRAINING_BYTES", 500)
    assert (
        train([TRAINING[:300], TRAINING[300:], "Never seen."]).abbreviations
        == train([TRAINING[:300], TRAINING[300:500]]).abbreviations
    )
    assert "never" not in dict(train([TRAINING[:300], TRAINING[300:], "Never seen."]).orthography)


def test_training_on_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="holds no text to train NLTK's punkt on"):
        train(["", " \n"])


def test_training_does_not_depend_on_the_seed_of_hashes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tools.preprocessing.sentences import train;"
        "train([sys.stdin.read()]).write(Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / seed)],
            input=TRAINING, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_parameters_written_are_read_again(tmp_path: Path) -> None:
    KNOWN.write(tmp_path / "punkt.json")
    assert Punkt.read(tmp_path / "punkt.json") == KNOWN
    assert json.loads((tmp_path / "punkt.json").read_text())["abbreviations"] == ["dr", "e.g", "mr"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"origin": "x", "abbreviations": 3}'])
def test_parameters_that_are_something_else_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "punkt.json").write_text(content)
    with pytest.raises(DataError, match="punkt.json: holds no punkt parameters"):
        Punkt.read(tmp_path / "punkt.json")


@pytest.fixture
def nltk_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a data folder of NLTK the only one."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    return tmp_path


def test_installed_model_is_loaded_and_the_sample_not_asked_for(nltk_data: Path) -> None:
    folder = nltk_data / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    save_punkt_params(parameters(KNOWN), dir=str(folder))

    def never() -> list[str]:
        raise AssertionError("asked for a sample")

    loaded = load_or_train(never)
    assert loaded.origin == "NLTK's english model"
    assert loaded.abbreviations == KNOWN.abbreviations
    assert (loaded.collocations, loaded.sentence_starters) == (KNOWN.collocations, KNOWN.sentence_starters)
    assert loaded.orthography == KNOWN.orthography


@pytest.mark.parametrize("lang", ["klingon", "../english"])
def test_language_that_nltk_lacks_is_refused_with_those_there(nltk_data: Path, lang: str) -> None:
    for name in ("german", "english"):
        (nltk_data / "tokenizers" / "punkt_tab" / name).mkdir(parents=True)
    with pytest.raises(
        DataError, match=f"--lang {lang}: NLTK has no such model in .*; languages there: english, german."
    ):
        load_or_train(lambda: [TRAINING], lang=lang)


def test_without_models_punkt_is_trained_on_the_sample(nltk_data: Path) -> None:
    trained = load_or_train(lambda: [TRAINING])
    assert trained == train([TRAINING])
    assert trained.origin == f"trained on {len(TRAINING) / 1e6:.3g} MB of the input"


def test_without_nltk_splitting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.data", None)
    with pytest.raises(DataError, match="--split-sentences: NLTK .* is not installed: pip install nltk."):
        load_or_train(lambda: [TRAINING])
