"""The tool that builds index caches before a run: the run finds them, and what the run refuses it refuses too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.tree import Config
from megatron_ext.data.blend import build_samples
from megatron_ext.data.gpt_samples import GptSamples
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.tokenizer import Tokenizer
from tests.conftest import TINY_TOML
from tools import prepare_data_cache

pytestmark = pytest.mark.usefixtures("one_process")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config_path(tiny_data: Path, tmp_path: Path) -> Path:
    """A configuration whose caches are this test's own."""
    path = tmp_path / "tiny.toml"
    text = TINY_TOML.format(run_dir=tmp_path / "run", data=tiny_data)
    path.write_text(text.replace("[data]\n", f'[data]\npath_to_cache = "{tmp_path}/cache"\n'))
    return path


@pytest.fixture
def run_finds_all(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Open the data as a run does; say whether it had nothing to build."""

    class Missing(Exception):
        pass

    def refuse(self: GptSamples) -> None:
        raise Missing

    def opens(*overrides: str) -> bool:
        config: Config = load_config(config_path, overrides)
        with monkeypatch.context() as patched:
            patched.setattr(GptSamples, "build", refuse)
            try:
                build_samples(config, Tokenizer.load(config.data.tokenizer))
            except Missing:
                return False
            return True

    return opens


def test_run_after_the_tool_builds_nothing(config_path, run_finds_all):
    assert not run_finds_all()
    assert prepare_data_cache.main([str(config_path)]) == 0
    assert run_finds_all()


def test_run_of_another_length_still_builds_nothing(config_path, run_finds_all):
    prepare_data_cache.main([str(config_path)])
    assert run_finds_all("--train.train_iters", "7", "--data.train_weights", "1", "3")


def test_run_of_another_seed_needs_other_caches(config_path, run_finds_all):
    prepare_data_cache.main([str(config_path)])
    assert not run_finds_all("--train.seed", "5")


def test_overrides_are_those_of_the_run(config_path, run_finds_all):
    assert prepare_data_cache.main([str(config_path), "--train.seed", "5"]) == 0
    assert run_finds_all("--train.seed", "5")


def test_caches_of_separate_validation_files_are_built_too(config_path, run_finds_all, tmp_path):
    with IndexedWriter(tmp_path / "valid", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.resize(np.arange(3, 90), 400))
        writer.publish()
    words = ("--data.valid_data", str(tmp_path / "valid"), "--data.split", "99,1")
    assert prepare_data_cache.main([str(config_path), *words]) == 0
    assert run_finds_all(*words)


def test_each_part_of_each_source_is_told(config_path, tiny_data, capsys):
    prepare_data_cache.main([str(config_path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(tiny_data))]
    told = [line.partition(": built in")[0] for line in lines]
    assert told == [f"{tiny_data}/{name} ({part})" for part in ("training", "validation") for name in "ab"]


def test_second_time_everything_is_already_there(config_path, capsys):
    prepare_data_cache.main([str(config_path)])
    capsys.readouterr()
    prepare_data_cache.main([str(config_path)])
    captured = capsys.readouterr()
    assert captured.err.count(": already there: ") == 4
    assert "the run will build nothing" in captured.out


def test_table_tells_the_passes_over_each_source(config_path, tiny_data, capsys):
    # 5 iterations of 8 samples, one in four from b.
    prepare_data_cache.main([str(config_path), "--data.train_weights", "3", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(str(tiny_data))]
    assert [row[3:5] for row in rows] == [["480", "75.00%"], ["160", "25.00%"]]
    for row, drawn in zip(rows, (30, 10), strict=True):
        assert float(row[5]) == pytest.approx(drawn / int(row[2]), abs=0.006)


def test_lazy_data_needs_nothing_and_says_so(config_path, tmp_path, capsys):
    words = ("--data.sample_index", "lazy", "--data.path_to_cache", "none")
    assert prepare_data_cache.main([str(config_path), *words]) == 0
    assert "the run builds nothing" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.max_epochs", "0.01"), "data.max_epochs (0.01) would be passed: "),
        (("--data.train_data", "nowhere"), "data.train_data (nowhere): nowhere.bin and nowhere.idx not found"),
        (("--train.seq_length", "0"), "train.seq_length (0) must be at least 1."),
        (("--data.train_dat", "x"), "--data.train_dat: unknown option; did you mean --data.train_data"),
    ],
)
def test_what_the_run_would_refuse_is_refused(words, message, config_path, capsys):
    assert prepare_data_cache.main([str(config_path), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert any(message in line for line in errors)


def test_unknown_config_is_refused(capsys):
    assert prepare_data_cache.main(["no_such_config"]) == 2
    assert capsys.readouterr().err.startswith("error: no_such_config: no such file")


def test_tool_runs_alone(config_path):
    command = [sys.executable, str(ROOT / "tools" / "prepare_data_cache.py"), str(config_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from tools import prepare_data_cache\n"
        "try: prepare_data_cache.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'megatron', 'tyro') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
