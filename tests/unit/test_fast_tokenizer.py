"""The kernel's ids are the `tokenizers` library's, in every family it takes; elsewhere it says why it does not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_ext.data import bpe_tables, native_build
from megatron_ext.data.char_classes import LETTERS, MARKS, NUMBERS, SPACES
from megatron_ext.data.encoder_check import Encoded, adversarial_texts, first_difference
from megatron_ext.data.fast_tokenizer import NativeEncoder, ReferenceEncoder, choose_encoder
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from tests.unit.small_tokenizer import SHARED, build_small_tokenizer, training_text
from tools.generate_char_classes import PATTERNS, library_ranges

pytestmark = pytest.mark.skipif(
    not any(map(native_build.shutil.which, native_build.COMPILERS)), reason="the kernel needs a C++ compiler"
)

SPACE = "\u2581"
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
SMALL = (
    "own_words",
    "prepend",
    "replace_only",
    "first",
    "always",
    "never",
    "byte_level",
    "byte_level_spaced",
    "codegen",
    "int32",
)
FAMILIES = (*SMALL, "shared:pints", "shared:llama2", "shared:mistral_v1")
CONTENTS = [
    *" \n\t\r'\u2581\u00a0\u3000\u200b\u0301\x00\ufeff\x85éß漢字한😀²٣ⅧxA0-.<>|/",
    "  ", "'s", "'ll", "'re", "\u2581\u2581", "👩\u200d🚀", "\U0010ffff", "\ue000", "...", "def ", "<0x0A>", "<|", "s>",
]  # fmt: skip


def byte_level_json(*, spaced: bool = False, whitespace_tokens: bool = False) -> dict[str, Any]:
    """Train a GPT-2-like tokenizer; with the added runs of spaces and tabs that CodeGen's has."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    contractions = "it's he'll they've I'd I'm can't you're 漢字 été  \n\n   1234 " * 50
    trained.train_from_iterator([training_text(), contractions], trainer)
    content = json.loads(trained.to_str())
    # As GPT-2's own file has them: empty, which does the same as none.
    content["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "unk_token": "<|endoftext|>"}
    if whitespace_tokens:
        runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
        first = len(content["model"]["vocab"])
        for number, run in enumerate(runs):
            content["added_tokens"].append({"id": first + number, "content": run} | ADDED | {"normalized": True})
    return content


def metaspace_json(content: dict[str, Any], family: str) -> dict[str, Any]:
    """Change a Llama-2-like tokenizer into a family of its kind."""
    if family == "own_words":
        return content
    first = max(content["model"]["vocab"].values()) + 1
    content["pre_tokenizer"] = None
    if family == "replace_only":
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"]["normalizers"][1]]}
    elif family == "int32":
        content["model"]["vocab"]["far away"] = 70_000
    elif family != "prepend":
        content |= {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": family}}
        # Without a normalizer, tokens that ask for one are looked for after the others, in the text itself.
        late = [("the", True), ("[X]", False), (f"{SPACE}[X] ", True)]
        for number, (text, normalized) in enumerate(late):
            content["added_tokens"].append({"id": first + number, "content": text} | ADDED | {"normalized": normalized})
    return content


def write_tokenizer(folder: Path, content: dict[str, Any], eos: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


@pytest.fixture(scope="module")
def small_json(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = build_small_tokenizer(tmp_path_factory.mktemp("small"))
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, small_json: dict[str, Any]) -> Callable[[str], Tokenizer]:
    """Give a family's tokenizer."""
    made: dict[str, Tokenizer] = {}

    def get(family: str) -> Tokenizer:
        if family not in made:
            made[family] = Tokenizer.load(folder(family))
        return made[family]

    def folder(family: str) -> Path:
        if family.startswith("shared:"):
            path = SHARED / "tokenizers" / family.removeprefix("shared:")
            if not path.is_dir():
                pytest.skip(f"{path} is not there")
            return path
        target = tmp_path_factory.mktemp(family)
        if family.startswith("byte_level") or family == "codegen":
            content = byte_level_json(spaced=family.endswith("spaced"), whitespace_tokens=family == "codegen")
            return write_tokenizer(target, content, "<|endoftext|>")
        copied = json.loads(json.dumps(small_json))
        return write_tokenizer(target, metaspace_json(copied, family), copied["added_tokens"][1]["content"])

    return get


def fuzz(tokenizer: Tokenizer, count: int, *, seed: int) -> Iterator[str]:
    """Make strings of vocabulary pieces, odd characters, runs, and whole and broken added tokens."""
    chance = random.Random(seed)
    vocab = sorted(tokenizer.backend.get_vocab(with_added_tokens=False))
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]

    def any_char() -> str:
        while 0xD800 <= (code := chance.randrange(chance.choice((0x80, 0x3000, 0x10000, 0x110000)))) < 0xE000:
            pass
        return chr(code)

    makers: tuple[Callable[[], str], ...] = (
        lambda: chance.choice(vocab),
        lambda: chance.choice(vocab).replace(SPACE, " ").replace("Ġ", " "),
        lambda: chance.choice(CONTENTS),
        lambda: chance.choice(CONTENTS) * int(1 + chance.expovariate(0.2)),
        any_char,
        lambda: chance.choice(added),
        lambda: chance.choice(added)[: chance.randrange(5)],
        lambda: "".join(chr(chance.randrange(32, 127)) for _ in range(chance.randrange(9))),
    )
    for _ in range(count):
        parts = int(chance.expovariate(0.1)) * (10 if chance.random() < 0.02 else 1)
        yield "".join(chance.choice(makers)() for _ in range(parts))


@pytest.mark.parametrize("special_tokens_in_text", ["parse", "escape"])
@pytest.mark.parametrize("family", FAMILIES)
def test_native_fuzzed_strings_equal_the_library(
    load: Callable[[str], Tokenizer], family: str, special_tokens_in_text: str
) -> None:
    tokenizer = load(family)
    native = NativeEncoder(tokenizer, special_tokens_in_text=special_tokens_in_text)
    reference = ReferenceEncoder(tokenizer, special_tokens_in_text=special_tokens_in_text)
    texts = list(fuzz(tokenizer, 800, seed=len(family)))
    assert first_difference(native, reference, texts) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_native_adversarial_texts_equal_the_library(load: Callable[[str], Tokenizer], family: str) -> None:
    tokenizer = load(family)
    texts = adversarial_texts(tokenizer)
    assert first_difference(NativeEncoder(tokenizer), ReferenceEncoder(tokenizer), texts) is None


@pytest.mark.parametrize("before", ["", "y" * 62, "y" * 63, "'" * 63], ids=["0", "62", "63", "63 quotes"])
def test_native_words_of_ascii_pairs_around_a_block_equal_the_library(
    load: Callable[[str], Tokenizer], tmp_path: Path, before: str
) -> None:
    """Every pair of bytes has a token, so that a word that starts elsewhere gets other ids."""
    content = json.loads((load("byte_level").folder / "tokenizer.json").read_text(encoding="utf-8"))
    # GPT-2 spells bytes that cannot be printed as characters from 256 on.
    spelt = [chr(256 + byte) if byte < 33 else chr(289) if byte == 127 else chr(byte) for byte in range(128)]
    pairs = [(first, second) for first in spelt for second in spelt]
    vocab = {token: number for token, number in content["model"]["vocab"].items() if len(token) == 1}
    content["added_tokens"] = [{"id": len(vocab), "content": "<|endoftext|>"} | ADDED]
    vocab = {token: number for number, token in enumerate(vocab)}
    tokens = {first + second: len(vocab) + 1 + number for number, (first, second) in enumerate(pairs)}
    content["model"] |= {"vocab": vocab | tokens, "merges": [list(pair) for pair in pairs], "unk_token": None}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, content, "<|endoftext|>"))
    texts = [before + chr(a) + chr(b) + "s" for a in range(128) for b in range(128)]
    assert first_difference(NativeEncoder(tokenizer), ReferenceEncoder(tokenizer), texts) is None


@pytest.mark.parametrize("family", ["prepend", "codegen"])
def test_native_standard_library_sources_equal_the_library(load: Callable[[str], Tokenizer], family: str) -> None:
    paths = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    tokenizer = load(family)
    assert first_difference(NativeEncoder(tokenizer), ReferenceEncoder(tokenizer), texts) is None


@pytest.mark.parametrize("family", ["prepend", "byte_level"])
@pytest.mark.parametrize("unit", ["a", "ba", " ", "é", "ke mi", "'s"])
def test_native_long_run_equals_the_library(load: Callable[[str], Tokenizer], family: str, unit: str) -> None:
    tokenizer = load(family)
    text = unit * 30_000
    assert (
        first_difference(NativeEncoder(tokenizer), ReferenceEncoder(tokenizer), [text, text[:65], "x" + text]) is None
    )


def test_native_long_word_takes_no_quadratic_time(load: Callable[[str], Tokenizer]) -> None:
    # 2 million symbols: a scan per merge would take days, and the suite's timeout would end it.
    encoded = NativeEncoder(load("byte_level")).encode(["ba" * 1_000_000])
    assert encoded.lengths[0] == encoded.ids.size > 0


@pytest.mark.parametrize(("family", "dtype"), [("prepend", "<u2"), ("int32", "<i4")])
def test_encode_ids_have_the_type_of_the_vocabulary(load: Callable[[str], Tokenizer], family: str, dtype: str) -> None:
    for encoder in (NativeEncoder(load(family)), ReferenceEncoder(load(family))):
        encoded = encoder.encode(["The bake", ""])
        assert (encoded.ids.dtype, encoded.lengths.dtype) == (np.dtype(dtype), np.dtype(np.int32))


@pytest.mark.parametrize("kind", [NativeEncoder, ReferenceEncoder])
def test_encode_no_texts_gives_no_ids(load: Callable[[str], Tokenizer], kind: type[Any]) -> None:
    encoded = kind(load("prepend")).encode([])
    assert (encoded.ids.size, encoded.lengths.size) == (0, 0)


def test_native_batch_equals_one_text_at_a_time(load: Callable[[str], Tokenizer]) -> None:
    native = NativeEncoder(load("first"))
    texts = ["", "one", "", " two\n", "<s>three", "the the"]
    encoded = native.encode(texts)
    alone = [native.encode([text]).ids.tolist() for text in texts]
    assert encoded.lengths.tolist() == [len(ids) for ids in alone]
    assert encoded.ids.tolist() == [number for ids in alone for number in ids]


def test_native_special_token_in_text_is_parsed_or_escaped(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("byte_level")
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    text = "a<|endoftext|>b"
    parsed = NativeEncoder(tokenizer, special_tokens_in_text="parse").encode([text]).ids
    escaped = NativeEncoder(tokenizer, special_tokens_in_text="escape").encode([text]).ids
    assert (parsed == end).sum() == 1
    assert end not in escaped
    assert tokenizer.decode(escaped.tolist()) == text


def test_reference_escape_leaves_the_tokenizer_as_it_was(load: Callable[[str], Tokenizer]) -> None:
    tokenizer = load("byte_level")
    ReferenceEncoder(tokenizer, special_tokens_in_text="escape").encode(["<|endoftext|>"])
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.backend.token_to_id("<|endoftext|>")]


@pytest.mark.parametrize("kind", [NativeEncoder, ReferenceEncoder])
def test_encode_half_a_surrogate_pair_says_which_text(load: Callable[[str], Tokenizer], kind: type[Any]) -> None:
    with pytest.raises(DataError, match=r"text 1 of a batch: holds half a surrogate pair \(character 2\)"):
        kind(load("prepend")).encode(["fine", "ab\ud800"])


@pytest.mark.parametrize("family", FAMILIES)
def test_choose_encoder_known_family_is_native(load: Callable[[str], Tokenizer], family: str) -> None:
    encoder, reason = choose_encoder(load(family), special_tokens_in_text="parse", sample=["a sample\n", "b\ud800"])
    assert (encoder.name, reason) == ("native", None)


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *parents, last = path.split("/")
        for part in parents:
            content = content[int(part) if part.isdigit() else part]
        content[last] = value

    return change


def _merge_byte_token(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["<0x41>a"] = max(content["model"]["vocab"].values()) + 1
    content["model"]["merges"].append(["<0x41>", "a"])


INAPPLICABLE = {
    "dropout": (_set("model/dropout", 0.1), "dropout"),
    "ignore_merges": (_set("model/ignore_merges", True), "ignores merges"),
    "byte_fallback": (_set("model/byte_fallback", False), "no byte fallback"),
    "suffix": (_set("model/end_of_word_suffix", "</w>"), "end_of_word_suffix"),
    "one byte missing": (lambda content: content["model"]["vocab"].pop("<0x7F>"), "lacks tokens of the byte fallback"),
    "merges byte tokens": (_merge_byte_token, "merges tokens of the byte fallback"),
    "no merges": (_set("model/merges", []), "no merges"),
    "huge id": (lambda content: content["model"]["vocab"].update(zzzz=1 << 20), "too large"),
    "no normalizer": (_set("normalizer", None), "its normalizer is not Prepend and Replace"),
    "lower case": (_set("normalizer", {"type": "Lowercase"}), "its normalizer is not"),
    "other prefix": (_set("normalizer/normalizers/0/prepend", "_"), "its normalizer is not"),
    "both": (_set("pre_tokenizer", METASPACE), "both a normalizer and the pre-tokenizer"),
    "other words": (_set("pre_tokenizer/pattern/Regex", r"\s+|\S+"), "its pre-tokenizer is Split"),
    "other split": (_set("pre_tokenizer", {"type": "Whitespace"}), "its pre-tokenizer is Whitespace"),
    "stripping token": (_set("added_tokens/0/lstrip", True), "has lstrip"),
    "whole-word token": (_set("added_tokens/0/single_word", True), "has single_word"),
    "normalized token": (_set("added_tokens/0/normalized", True), "is normalized"),
    "processor": (
        _set("post_processor", {"type": "BertProcessing", "sep": ["<s>", 1], "cls": ["<s>", 1]}),
        "its post-processor is BertProcessing",
    ),
}


@pytest.mark.parametrize("case", INAPPLICABLE)
def test_choose_encoder_unknown_field_names_the_reason(tmp_path: Path, small_json: dict[str, Any], case: str) -> None:
    change, expected = INAPPLICABLE[case]
    content = json.loads(json.dumps(small_json))
    change(content)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, content, content["added_tokens"][1]["content"]))
    encoder, reason = choose_encoder(tokenizer, special_tokens_in_text="parse", sample=[])
    assert encoder.name == "tokenizers"
    assert reason is not None and expected in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [
        (METASPACE | {"split": True}, "its Metaspace is"),
        (METASPACE | {"replacement": "_"}, "its Metaspace is"),
        (BYTE_LEVEL, "its vocabulary lacks bytes"),
        (
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "its ByteLevel is",
        ),
        ({"type": "Sequence", "pretokenizers": [METASPACE]}, "its pre-tokenizer is Sequence"),
    ],
)
def test_choose_encoder_unknown_pre_tokenizer_names_the_reason(
    tmp_path: Path, small_json: dict[str, Any], pre_tokenizer: dict[str, Any], expected: str
) -> None:
    content = small_json | {"normalizer": None, "pre_tokenizer": pre_tokenizer}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, content, content["added_tokens"][1]["content"]))
    encoder, reason = choose_encoder(tokenizer, special_tokens_in_text="parse", sample=[])
    assert encoder.name == "tokenizers" and reason is not None and expected in reason


def test_choose_encoder_word_piece_names_the_reason(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    folder = write_tokenizer(tmp_path, json.loads(backend.to_str()), "a")
    _, reason = choose_encoder(Tokenizer.load(folder), special_tokens_in_text="parse", sample=[])
    assert reason == "its model is WordPiece, not BPE"


def test_choose_encoder_kernel_with_one_wrong_id_is_caught(
    load: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = NativeEncoder.encode

    def wrong(self: NativeEncoder, texts: list[str]) -> Encoded:
        encoded = right(self, texts)
        encoded.ids[len(encoded.ids) // 2] += 1
        return encoded

    monkeypatch.setattr(NativeEncoder, "encode", wrong)
    encoder, reason = choose_encoder(load("prepend"), special_tokens_in_text="parse", sample=["some text"])
    assert encoder.name == "tokenizers"
    assert reason is not None and reason.startswith("its ids differ from the tokenizers library's")


def test_choose_encoder_sample_decides_too(load: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeEncoder.encode

    def wrong(self: NativeEncoder, texts: list[str]) -> Encoded:
        return right(self, [text.replace("gruesome", "grue some") for text in texts])

    monkeypatch.setattr(NativeEncoder, "encode", wrong)
    tokenizer = load("prepend")
    assert choose_encoder(tokenizer, special_tokens_in_text="parse", sample=["fine"])[1] is None
    assert choose_encoder(tokenizer, special_tokens_in_text="parse", sample=["fine", "gruesome"])[1] is not None


def test_choose_encoder_without_compiler_names_the_reason(
    load: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native_build, "cache_folders", lambda: (tmp_path,))
    encoder, reason = choose_encoder(load("prepend"), special_tokens_in_text="parse", sample=[])
    assert encoder.name == "tokenizers"
    assert reason == "there is no C++ compiler (c++, g++, clang++) in PATH"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def test_load_library_second_time_does_not_compile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native_build.load_library(source, folders=[tmp_path / "kept"]).answer() == 42
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native_build.load_library(source, folders=[tmp_path / "kept"]).answer() == 42


def test_load_library_without_compiler_takes_what_another_compiled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_build.load_library(source, folders=[tmp_path / "kept"])
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert native_build.load_library(source, folders=[tmp_path / "kept"]).answer() == 42


def test_load_library_changed_source_is_compiled_anew(source: Path, tmp_path: Path) -> None:
    native_build.load_library(source, folders=[tmp_path / "kept"])
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert native_build.load_library(source, folders=[tmp_path / "kept"]).answer() == 43


def test_load_library_unwritable_folder_takes_the_next(source: Path, tmp_path: Path) -> None:
    # A file stands where the folder should be: nobody, not even root, can write there.
    native_build.load_library(source, folders=[source / "no", tmp_path / "next"])
    assert [path.suffix for path in (tmp_path / "next").iterdir()] == [".so"]


def test_load_library_no_writable_folder_says_so(source: Path) -> None:
    with pytest.raises(native_build.BuildError, match="no folder can hold the compiled kernel"):
        native_build.load_library(source, folders=[source / "no"])


def test_load_library_broken_source_shows_the_compilers_error(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer( {\n")
    with pytest.raises(native_build.BuildError, match=r"cannot compile answer.cpp \(.*error"):
        native_build.load_library(source, folders=[tmp_path / "kept"])
    assert list((tmp_path / "kept").iterdir()) == []


def test_load_library_several_processes_at_once_all_get_it(source: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from megatron_ext.data.native_build import load_library as load; "
        f"print(load(Path({str(source)!r}), folders=[Path({str(tmp_path / 'kept')!r})]).answer())"
    )
    root = Path(__file__).resolve().parents[2]
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[0] for process in started] == ["42\n"] * 3
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "known"), [("LETTERS", LETTERS), ("MARKS", MARKS), ("NUMBERS", NUMBERS), ("SPACES", SPACES)]
)
def test_char_classes_equal_the_library_at_every_code_point(name: str, known: tuple[tuple[int, int], ...]) -> None:
    assert list(known) == library_ranges(PATTERNS[name])


def test_choose_encoder_other_unicode_version_names_the_reason(
    load: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_tables, "LETTERS", (*LETTERS[:-1], (LETTERS[-1][0], LETTERS[-1][1] + 1)))
    _, reason = choose_encoder(load("byte_level"), special_tokens_in_text="parse", sample=[])
    assert reason == "the library's character classes are no longer those of char_classes.py"


def test_load_library_missing_source_says_so(tmp_path: Path) -> None:
    with pytest.raises(native_build.BuildError, match="none.cpp cannot be read"):
        native_build.load_library(tmp_path / "none.cpp", folders=[tmp_path])
