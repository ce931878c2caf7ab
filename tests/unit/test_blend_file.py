"""Sources from a TOML file of their own: rows become train_data and train_weights, or every reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.config.load import load_config, parse_command_line, to_toml
from megatron_ext.config.tree import Config
from megatron_ext.errors import ConfigError

ROWS = """
[[source]]
prefix = "data/prose"
tokens = 25e9

[[source]]
prefix = "data/code"
tokens = 5_000_000_000
"""
RUN = """
name = "run"
[model]
num_layers = 2
hidden_size = 64
ffn_hidden_size = 128
num_attention_heads = 4
num_query_groups = 2
vocab_size = 97
max_position_embeddings = 32
[data]
tokenizer = "tok"
SOURCES
[train]
seq_length = 16
micro_batch_size = 1
global_batch_size = 8
train_iters = 5
[optimizer]
lr = 1e-3
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Write the rows and a configuration with these sources, and load it with command-line words."""

    def loaded(rows: str = ROWS, sources: str = 'blend_file = "BLEND"', *words: str) -> Config:
        (tmp_path / "blend.toml").write_text(rows)
        text = RUN.replace("SOURCES", sources).replace("BLEND", str(tmp_path / "blend.toml"))
        (tmp_path / "run.toml").write_text(text)
        return load_config(tmp_path / "run.toml", [word.replace("BLEND", f"{tmp_path}/blend.toml") for word in words])

    return loaded


def refusal(load: Callable[..., Config], *arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value)


def test_rows_become_prefixes_and_weights_with_their_unit(load):
    data = load().data
    assert data.train_data == ("data/prose", "data/code")
    assert data.train_weights == (25e9, 5e9)
    assert data.train_weights_unit == "tokens"


@pytest.mark.parametrize(("key", "unit"), [("weight", "proportion"), ("tokens", "tokens"), ("epochs", "epochs")])
def test_key_of_the_rows_is_the_unit(key, unit, load):
    assert load(ROWS.replace("tokens", key)).data.train_weights_unit == unit


def test_resolved_configuration_is_complete_without_the_file(load, tmp_path):
    config = load()
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    (tmp_path / "blend.toml").unlink()
    assert load_config(tmp_path / "resolved.toml") == config


def test_file_on_the_command_line_replaces_the_sources_of_the_configuration(load):
    own = 'train_data = ["a", "b", "c"]\ntrain_weights = [1, 2, 3]'
    assert load(ROWS, own, "--data.blend_file", "BLEND").data == load().data


def test_file_is_read_by_the_entry_point_too(load, tmp_path):
    expected = load()
    command = parse_command_line([str(tmp_path / "run.toml")], prog="prog", description="")
    assert command.config == expected
    own = RUN.replace("SOURCES", 'train_data = ["a"]')
    (tmp_path / "own.toml").write_text(own)
    words = [str(tmp_path / "own.toml"), "--data.blend_file", str(tmp_path / "blend.toml")]
    assert parse_command_line(words, prog="prog", description="").config == expected


def test_sources_on_the_command_line_beside_the_file_are_refused(load):
    message = refusal(load, ROWS, 'train_data = ["a"]', "--data.blend_file", "BLEND", "--data.train_data", "x")
    assert "is given beside data.train_data, which it stands for; give one or the other." in message


def test_sources_in_the_configuration_beside_the_file_are_refused(load):
    message = refusal(load, ROWS, 'blend_file = "BLEND"\ntrain_data = ["a"]\ntrain_weights = [1]')
    assert "is given beside data.train_data and data.train_weights" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens = 25e9", "", "source 1 (data/prose): has no amount; give one of weight, tokens, epochs."),
        ("tokens = 25e9", "tokens = 1\nweight = 1", "source 1 (data/prose): has weight and tokens; give one of"),
        ("tokens = 25e9", "weight = 1", "some sources give weight and some tokens; count all in the same."),
        ("tokens = 25e9", 'tokens = "25e9"', "source 1 (data/prose): tokens ('25e9') must be a number."),
        ("tokens = 25e9", "tokens = true", "source 1 (data/prose): tokens (True) must be a number."),
        ("tokens = 25e9", "token = 25e9", "source 1 (data/prose): unknown key token; did you mean tokens?"),
        ("tokens = 25e9", "tokens = 1\nxyz = 1", "unknown key xyz; known are prefix, weight, tokens, epochs."),
        ('prefix = "data/prose"', "", "source 1 (without a prefix): prefix must be a string"),
        ('prefix = "data/prose"', "prefix = 3", "source 1 (3): prefix must be a string"),
        ("[[source]]", "[[sources]]", "holds sources; it must hold a table [[source]] for each prefix"),
        ("tokens = 25e9", "tokens = ", "not valid TOML"),
    ],
)
def test_bad_row_gives_its_message(old, new, message, load, tmp_path):
    found = refusal(load, ROWS.replace(old, new, 1 if "source" not in old else 2))
    assert message in found and f"{tmp_path}/blend.toml: " in found


def test_all_bad_rows_are_listed_at_once(load):
    found = refusal(load, ROWS.replace("tokens", "toknes"))
    assert [line.partition(": ")[2].split(":")[0] for line in found.splitlines()] == [
        "source 1 (data/prose)", "source 1 (data/prose)", "source 2 (data/code)", "source 2 (data/code)",
    ]  # fmt: skip


def test_empty_file_is_refused(load):
    assert "holds no [[source]]" in refusal(load, "")


def test_missing_file_is_refused(load):
    assert "data.blend_file (nowhere.toml) cannot be read: No such file" in refusal(
        load, ROWS, 'blend_file = "nowhere.toml"'
    )
