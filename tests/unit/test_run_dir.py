"""What a run leaves of itself: configuration, environment, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.config.load import load_config
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.training.run_dir import prepare, run_directory


@pytest.fixture
def prepared(tiny_config, tmp_path) -> Path:
    prepare(tiny_config(), world_size=4)
    return tmp_path / "run"


def test_run_directory_is_the_one_configured(tiny_config, tmp_path):
    assert run_directory(tiny_config()) == tmp_path / "run"


def test_run_directory_by_default_is_runs_and_the_name(tiny_config):
    assert run_directory(tiny_config("--run_dir", "none")) == Path("runs/tiny")


def test_configuration_left_behind_is_the_runs(tiny_config, prepared):
    assert load_config(prepared / "config.toml") == tiny_config()


def test_configuration_left_behind_has_overrides_in_it(tiny_config, tmp_path):
    prepare(tiny_config("--optimizer.lr", "0.125"), world_size=1)
    assert load_config(tmp_path / "run" / "config.toml").optimizer.lr == 0.125


def test_tokenizer_left_behind_is_the_datas(prepared, tiny_data):
    assert Tokenizer.load(prepared / "tokenizer").sha256 == Tokenizer.load(tiny_data / "tokenizer").sha256


def test_tokenizer_left_behind_knows_its_special_tokens(prepared, tiny_data):
    assert Tokenizer.load(prepared / "tokenizer").eod == Tokenizer.load(tiny_data / "tokenizer").eod


@pytest.mark.parametrize("key", ["code_revision", "host", "python", "packages", "command", "environment"])
def test_environment_left_behind_has(key, prepared):
    assert json.loads((prepared / "environment.json").read_text())[key]


def test_environment_left_behind_has_the_number_of_processes(prepared):
    assert json.loads((prepared / "environment.json").read_text())["world_size"] == 4


def test_preparing_again_keeps_what_else_is_there(tiny_config, prepared):
    (prepared / "metrics.jsonl").write_text("row\n")
    prepare(tiny_config(), world_size=4)
    assert (prepared / "metrics.jsonl").read_text() == "row\n"


def test_preparing_leaves_nothing_aside(prepared):
    names = {path.relative_to(prepared).as_posix() for path in prepared.rglob("*") if path.is_file()}
    assert names == {"config.toml", "environment.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}


def test_run_that_reads_its_own_tokenizer_keeps_it(tiny_config, prepared):
    before = (prepared / "tokenizer" / "tokenizer.json").read_bytes()
    prepare(tiny_config("--data.tokenizer", str(prepared / "tokenizer")), world_size=4)
    assert (prepared / "tokenizer" / "tokenizer.json").read_bytes() == before


def test_run_directory_below_a_file_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file/run.*cannot be written .Not a directory.; name another"):
        prepare(tiny_config("--run_dir", str(tmp_path / "file" / "run")), world_size=1)
