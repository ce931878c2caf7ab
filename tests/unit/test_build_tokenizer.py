"""tools/build_tokenizer.py: the special-token scheme, exact text, equal bytes, 1.5-Pints' own tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.tokenizer import Tokenizer
from tests.unit.small_tokenizer import SHARED, build_small_tokenizer, training_text
from tools import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PINTS = SHARED / "tokenizers" / "pints"
MISTRAL = SHARED / "tokenizers" / "mistral_v1" / "tokenizer.json"
needs_shared = pytest.mark.skipif(
    not (PINTS.is_dir() and MISTRAL.is_file()), reason="../shared/data/tokenizers is not there"
)

# Written by hand from the table of 1.5-Pints (specs, 2.1), less 32,000.
APPENDED_IDS = {
    "<|end_of_turn|>": 0,
    "<|pad|>": 1,
    "<|im_start|>": 2,
    "</s>": 3,
    "[INST]": 4,
    "[/INST]": 5,
    "<<SYS>>": 6,
    "<</SYS>>": 7,
    "<|user|>": 8,
    "<|system|>": 9,
    "<|assistant|>": 10,
    "<|begin_of_text|>": 11,
    "<|start_header_id|>": 12,
    "<|end_header_id|>": 13,
    "<|eot_id|>": 14,
    "<|reserved_0|>": 15,
    "<|reserved_48|>": 63,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(build_small_tokenizer(tmp_path_factory.mktemp("small")))


def content_of(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    return content


def test_train_gives_exactly_the_vocabulary_asked_for(small: Tokenizer) -> None:
    assert sorted(small.backend.get_vocab().values()) == list(range(1024))


def test_train_special_tokens_have_the_ids_of_the_scheme(small: Tokenizer) -> None:
    expected = {"<unk>": 0, "<s>": 1, "<|im_end|>": 2} | {t: 960 + n for t, n in APPENDED_IDS.items()}
    assert {token: small.backend.token_to_id(token) for token in expected} == expected


def test_train_bytes_follow_the_first_three_ids(small: Tokenizer) -> None:
    assert [small.backend.id_to_token(number) for number in (3, 13, 258)] == ["<0x00>", "<0x0A>", "<0xFF>"]


def test_train_end_token_is_vocabulary_entry_and_special(small: Tokenizer) -> None:
    content = content_of(small)
    special = {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}
    assert (content["model"]["vocab"]["<|im_end|>"], special["<|im_end|>"]) == (2, 2)


def test_train_appended_tokens_are_outside_the_bpe_vocabulary(small: Tokenizer) -> None:
    vocab = content_of(small)["model"]["vocab"]
    assert len(vocab) == 960 and "<|pad|>" not in vocab


def test_train_newline_is_its_byte_token(small: Tokenizer) -> None:
    assert small.encode("a\n\nb")[-3:-1] == [13, 13]


def test_train_unseen_character_is_spelt_in_bytes(small: Tokenizer) -> None:
    assert small.encode("☃") == [small.backend.token_to_id("▁"), *(byte + 3 for byte in "☃".encode())]


def test_train_digits_stand_alone(small: Tokenizer) -> None:
    tokens = [small.backend.id_to_token(number) for number in small.encode("111 22")]
    assert tokens == ["▁", "1", "1", "1", "▁", "2", "2"]


def test_train_indentation_leaves_the_words_own_space(small: Tokenizer) -> None:
    tokens = [small.backend.id_to_token(number) for number in small.encode("x\n        return")]
    assert tokens[-2:] == ["▁▁▁▁▁▁▁", "▁return"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")))
def test_train_decoding_gives_the_text_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(["bake", "mino ", " ", "\n", "12", "(", "é", ".", "  ", "日", "_"])).map("".join))
def test_train_decoding_gives_mixed_text_back(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_train_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(training_text())
    contents = []
    for seed in ("1", "2"):
        tool = [sys.executable, str(ROOT / "tools" / "build_tokenizer.py"), "train"]
        output = tmp_path / seed
        options = ["--input", str(tmp_path / "text.txt"), "--vocab-size", "700", "--output", str(output)]
        subprocess.run([*tool, *options], check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd="/")
        contents.append({path.name: path.read_bytes() for path in output.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def test_train_jsonl_equals_plain_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(training_text())
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": training_text()}) + "\n")
    for name in ("text.txt", "text.jsonl"):
        options = ["--json-key", "body", "--vocab-size", "700", "--output", str(tmp_path / f"{name}.out")]
        assert build_tokenizer.main(["train", "--input", str(tmp_path / name), *options]) == 0
    assert (tmp_path / "text.txt.out" / "tokenizer.json").read_bytes() == (
        tmp_path / "text.jsonl.out" / "tokenizer.json"
    ).read_bytes()


def test_alphabet_rare_characters_are_left_out() -> None:
    assert build_tokenizer.choose_alphabet(iter(["ab" * 5000, "☃"]), 100) == ["a", "b"]


def test_alphabet_limit_keeps_the_most_frequent() -> None:
    assert build_tokenizer.choose_alphabet(iter(["aaa", "bb", "ccc", "d"]), 2) == ["a", "c"]


def test_alphabet_holds_no_control_character() -> None:
    assert build_tokenizer.choose_alphabet(iter(["a\n\t\0"]), 100) == ["a", "▁"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "300"], "--vocab-size 300: must be above 451"),
        (["--vocab-size", "50000"], "the input has only enough text for"),
        (["--vocab-size", "700", "--input", "nowhere.txt"], "--input nowhere.txt: no such file"),
    ],
)
def test_train_wrong_option_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text(training_text())
    files = ["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    limit = ["--limit-alphabet", "3000"] if "50000" in options else []
    assert build_tokenizer.main(["train", *files, *options, *limit]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_train_bad_record_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "a"}\n')
    options = ["--input", str(path), "--vocab-size", "700", "--output", str(tmp_path / "out")]
    assert build_tokenizer.main(["train", *options]) == 2
    said = "has no key 'text'; keys found: 'txt'. Did you mean 'txt'?"
    assert capsys.readouterr().err == f"error: {path}:2: {said}\n"


@pytest.fixture(scope="module")
def built_pints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "pints"
    assert build_tokenizer.main(["pints", "--base", str(MISTRAL), "--output", str(output)]) == 0
    return output


@needs_shared
@pytest.mark.parametrize("part", ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])
def test_pints_parts_equal_the_published_ones(built_pints: Path, part: str) -> None:
    built, published = (json.loads((path / "tokenizer.json").read_text()) for path in (built_pints, PINTS))
    assert built[part] == published[part]


@needs_shared
def test_pints_tokenizer_json_equals_the_published_one(built_pints: Path) -> None:
    assert (built_pints / "tokenizer.json").read_bytes() == (PINTS / "tokenizer.json").read_bytes()


@needs_shared
def test_pints_ids_equal_the_published_tokenizers(built_pints: Path) -> None:
    lines = (SHARED / "megatron_golden" / "input.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines] + [
        build_tokenizer.GOLDEN[0],
        "a</s>b[INST] <|reserved_3|>",
    ]
    published = tokenizers.Tokenizer.from_file(str(PINTS / "tokenizer.json"))
    ids = [encoding.ids for encoding in published.encode_batch(texts, add_special_tokens=False)]
    assert Tokenizer.load(built_pints).encode_batch(texts) == ids


@needs_shared
def test_pints_roles_and_size_are_the_published_ones(built_pints: Path) -> None:
    tokenizer = Tokenizer.load(built_pints)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (32064, 1, 2, 32001)


@needs_shared
def test_pints_from_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-2's tokenizer has the same size and special tokens; only the ids give it away."""
    base = SHARED / "tokenizers" / "llama2" / "tokenizer.json"
    assert build_tokenizer.main(["pints", "--base", str(base), "--output", str(tmp_path / "out")]) == 2
    assert "is not the tokenizer of Mistral-7B-v0.1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a tokenizer.json"),
        ("[]", "must be a tokenizer.json with a BPE model"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": []}', "it has 1 entries"),
    ],
)
def test_pints_damaged_base_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    options = ["--base", str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / "out")]
    assert build_tokenizer.main(["pints", *options]) == 2
    assert message in capsys.readouterr().err
