"""megatron_ext/data/tokenizer.py: ids, special roles, and folders that AutoTokenizer reads as they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_ext.data.tokenizer import CHAT_TEMPLATE, Tokenizer, export_tokenizer
from megatron_ext.errors import DataError
from tests.unit.small_tokenizer import SHARED, build_small_tokenizer

PINTS = SHARED / "tokenizers" / "pints"
PUBLISHED = [
    pytest.param(
        SHARED / "tokenizers" / name,
        id=name,
        marks=pytest.mark.skipif(
            not (SHARED / "tokenizers" / name).is_dir(),
            reason=f"../shared/data/tokenizers/{name} is not there",
        ),
    )
    for name in ("pints", "mistral_v1", "llama2")
]
needs_pints = pytest.mark.skipif(not PINTS.is_dir(), reason="../shared/data/tokenizers/pints is not there")

CHAT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
CHAT_IDS = [32002, 2188, 13, 16230, 2, 28705, 13, 32002, 13892, 13]  # specs of 1.5-Pints, 2.2

TEXTS = [
    "",
    " ",
    "Hello",
    "  two spaces before, two after  ",
    "\n\n\n",
    "tab\tsep\r\n",
    "def f(x):\n        return x[10] != 'é'",
    "naïve 日本語 ☃ 🚨 \x00 nul",
    CHAT,
    "Hello</s> world <|im_end|>",
    "<s>user<s> user",
    "a<|im_end|>b <|im_end|> c\n<|im_end|>\n",
    "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\n hi [/INST] yes </s>",
    "<|pad|><|reserved_7|> <|user|>",
    "<0x0A> ▁literal",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_tokenizer(tmp_path_factory.mktemp("small"))


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(small, tmp_path / "tokenizer"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def library_ids(folder: Path, text: str) -> list[int]:
    """Ids by the tokenizers library, straight from the file."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return backend.encode(text, add_special_tokens=False).ids


def auto_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_load_small_folder_gives_ids_of_roles(small: Path) -> None:
    tokenizer = Tokenizer.load(small)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad) == (1, 2, 1024 - 64 + 1)


def test_load_vocab_size_counts_added_tokens(small: Path) -> None:
    assert Tokenizer.load(small).vocab_size == 1024


def test_load_sha256_is_of_tokenizer_json(small: Path) -> None:
    assert Tokenizer.load(small).sha256 == hashlib.sha256((small / "tokenizer.json").read_bytes()).hexdigest()


def test_load_role_as_object_takes_its_content(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token={"content": "</s>", "lstrip": False})
    assert Tokenizer.load(folder).eod == 1024 - 64 + 3


def test_load_role_missing_in_config_comes_from_special_tokens_map(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    edit_json(folder / "special_tokens_map.json", eos_token={"content": "<|eot_id|>"})
    assert Tokenizer.load(folder).eod == 1024 - 64 + 14


def test_load_no_pad_token_gives_none(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    edit_json(folder / "special_tokens_map.json", pad_token=None)
    assert Tokenizer.load(folder).pad is None


def test_load_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        Tokenizer.load(tmp_path / "nowhere")


def test_load_folder_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no json", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_load_damaged_tokenizer_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.load(folder)


def test_load_without_eos_token_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(DataError, match="names no eos_token"):
        Tokenizer.load(folder)


def test_load_eos_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|nothing|>")
    with pytest.raises(DataError, match=r"eos_token is '<\|nothing\|>'"):
        Tokenizer.load(folder)


def test_load_damaged_config_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: must be a JSON object"):
        Tokenizer.load(folder)


def test_encode_truncation_and_padding_in_the_file_are_ignored(folder: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    edit_json(folder / "tokenizer.json", truncation=cut, padding=pad | {"pad_type_id": 0, "pad_token": "<unk>"})
    assert len(Tokenizer.load(folder).encode("1 2 3 4")) == 8


@pytest.mark.parametrize("text", TEXTS)
def test_encode_batch_equals_encode(small: Path, text: str) -> None:
    tokenizer = Tokenizer.load(small)
    assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_decode_spells_special_tokens(small: Path) -> None:
    tokenizer = Tokenizer.load(small)
    assert tokenizer.decode([1, *tokenizer.encode("The bake"), 2]) == "<s> The bake<|im_end|>"


@needs_pints
def test_encode_pints_chat_gives_golden_ids() -> None:
    assert Tokenizer.load(PINTS).encode(CHAT) == CHAT_IDS


@needs_pints
def test_load_pints_gives_published_roles() -> None:
    tokenizer = Tokenizer.load(PINTS)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod, tokenizer.pad) == (32064, 1, 2, 32001)


def test_export_small_gives_auto_tokenizer_the_ids_of_training(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    assert auto_ids(tmp_path / "hf", TEXTS) == [library_ids(small, text) for text in TEXTS]


@pytest.mark.parametrize("source", PUBLISHED)
def test_export_published_gives_auto_tokenizer_the_ids_of_training(source: Path, tmp_path: Path) -> None:
    export_tokenizer(source, tmp_path / "hf", model_max_length=64)
    assert auto_ids(tmp_path / "hf", TEXTS) == [library_ids(source, text) for text in TEXTS]


@needs_pints
def test_auto_tokenizer_of_published_pints_changes_ids() -> None:
    """The control: without the export the ids differ, so the tests above can fail."""
    assert auto_ids(PINTS, [CHAT])[0][1] == 1838


def test_export_keeps_tokenizer_json_byte_for_byte(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()


def test_export_config_declares_the_class_that_keeps_ids(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["model_max_length"]) == ("PreTrainedTokenizerFast", 64)


def test_export_keeps_special_roles(small: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<s>", "<|im_end|>", "<|pad|>", "<unk>")


def test_export_loads_again_with_the_same_roles(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    before, after = Tokenizer.load(small), Tokenizer.load(tmp_path / "hf")
    assert (after.eod, after.bos, after.pad, after.sha256) == (
        before.eod,
        before.bos,
        before.pad,
        before.sha256,
    )


def test_export_gives_no_token_type_ids(small: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_tokenizer(small, tmp_path / "hf", model_max_length=64)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "hf")("x")) == {"input_ids", "attention_mask"}


def test_export_incomplete_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        export_tokenizer(tmp_path, tmp_path / "hf", model_max_length=64)


def test_export_jinja_file_of_the_source_wins(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text("from the file: {{ messages[0]['content'] }}")
    export_tokenizer(folder, tmp_path / "hf", model_max_length=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "from the file: hi"


def test_export_given_template_wins_over_the_source(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path / "hf", model_max_length=64, chat_template="given")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "given"


def render(folder: Path, messages: list[dict[str, str]], *, prompt: bool) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text


TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def test_chat_template_ending_with_assistant_adds_no_second_end(small: Path) -> None:
    expected = "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    assert render(small, TURNS, prompt=False) == expected


def test_chat_template_with_generation_prompt_opens_assistant(small: Path) -> None:
    assert render(small, TURNS[:1], prompt=True) == "<s>" + CHAT


@needs_pints
def test_chat_template_equals_the_published_one_but_for_the_second_end(small: Path) -> None:
    assert render(small, TURNS, prompt=False) + "<|im_end|>" == render(PINTS, TURNS, prompt=False)


@needs_pints
def test_chat_template_ids_equal_those_of_the_rendered_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_tokenizer(PINTS, tmp_path / "hf", model_max_length=64, chat_template=CHAT_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert ids == [1, *CHAT_IDS]
