"""The report of --dry_run: it says what the issue asks for, in numbers that are known."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config.load import load_config
from megatron_ext.config.tree import Config
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.training.describe import describe

ROOT = Path(__file__).resolve().parents[2]
PINTS = ROOT / "configs" / "pints_1.5b_2k.toml"


@pytest.fixture(scope="module")
def pints() -> Config:
    return load_config(PINTS)


def lines(report: str) -> list[str]:
    """Return the report's lines with single spaces."""
    return [" ".join(line.split()) for line in report.splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "parameters 1,565,886,464",
        "output 65,667,072",
        "training FLOPs per token at 2,048 tokens: 9.605 GF = 9.001 linear + 0.604 causal attention",
        "tokens per iteration 1,048,576",
        "micro-batches per iteration and rank 8",
        "total samples 49,244,160",
        "total tokens 100,852,039,680",
        "stage weights gradients optimizer activations total",
        "48,090 50,424,971,264 2.2600e-04",
        "96,180 100,850,991,104 4.0000e-05",
        "tensor 1 x context 1 x data 8 x pipeline 1; the first varies fastest",
        "0 0-7 0-23",
        "7 0 0 7 0",
        "seed = 3407",
    ],
)
def test_describe_pints_tells_the_known_numbers(pints: Config, line: str) -> None:
    assert line in lines(describe(pints, world_size=8))


def test_describe_memory_line_adds_up(pints: Config) -> None:
    report = describe(pints, world_size=8)
    row = re.search(r"activations +total\n +0 +([\d. ]+)\n", report)
    assert row is not None
    *parts, total = map(float, row[1].split())
    assert sum(parts) == pytest.approx(total, abs=0.03)  # each is rounded to two digits


def test_describe_layout_of_two_stages_places_ranks_and_layers() -> None:
    config = load_config(
        PINTS,
        ["--parallel.tensor_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"],
    )
    report = lines(describe(config, world_size=8))
    assert "0 0-3 0-11" in report and "1 4-7 12-23" in report
    assert "5 1 0 0 1" in report  # rank 5: tp 1, cp 0, dp 0, pp 1


def test_describe_interleaved_stages_list_their_runs_of_layers() -> None:
    config = load_config(
        PINTS,
        ["--parallel.pipeline_model_parallel_size=2", "--parallel.virtual_pipeline_model_parallel_size=2"],
    )
    assert "0 0-3 0-5, 12-17" in lines(describe(config, world_size=8))


def test_describe_many_ranks_are_told_by_stage_and_not_one_by_one(pints: Config) -> None:
    report = describe(pints, world_size=512)
    assert "0-511" in report
    assert "rank  tp" not in report
    assert len(report.splitlines()) < 160


def test_describe_early_stop_tells_the_tokens_at_it() -> None:
    config = load_config(ROOT / "configs" / "cpt_llama2_7b.toml")
    report = lines(describe(config, world_size=8))
    assert "tokens when it stops, after 10,000 iterations 10,485,760,000" in report


def test_describe_ramp_up_tells_the_first_batch() -> None:
    config = load_config(PINTS, ["--train.rampup_batch_size", "64", "64", "100000"])
    assert "at the start of the ramp-up 131,072" in lines(describe(config, world_size=8))


def test_describe_data_that_is_not_there_shows_what_its_weights_say(pints: Config) -> None:
    config = load_config(PINTS, ["--data.train_data", "no/a", "no/b", "--data.train_weights", "3", "1"])
    report = lines(describe(config, world_size=8))
    assert "no/a ? ? 75,639,029,760 75.00% ?" in report and "no/b ? ? 25,213,009,920 25.00% ?" in report


def test_describe_data_that_is_there_shows_its_passes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.zeros(2049 * 100, dtype=np.uint16))
        writer.publish()
    config = load_config(PINTS, ["--data.train_data", str(tmp_path / "a"), "--data.split", "100,0"])
    report = describe(config, world_size=8)
    row = next(line.split() for line in report.splitlines() if line.split()[:1] == [f"{tmp_path}/a"])
    assert row[1:] == ["204,800", "100", "100,852,039,680", "100.00%", "492441.60"]
    assert f"{tmp_path}/a is read 492441.6 times: beyond about 4 passes" in report


def test_describe_unknown_world_size_takes_one_replica_and_says_so() -> None:
    config = load_config(PINTS, ["--parallel.tensor_model_parallel_size", "2"])
    report = describe(config, world_size=None, notes=["a.bin is missing"])
    assert "tensor 2 x context 1 x data 1 x pipeline 1" in report
    assert report.endswith(
        "notes\n  a.bin is missing\n  described for one replica of the model (2); --world_size N describes more"
    )


def test_describe_notes_come_last(pints: Config) -> None:
    assert describe(pints, world_size=8, notes=["a.bin is missing"]).endswith("\n\nnotes\n  a.bin is missing")


def test_describe_does_not_import_torch_numpy_or_megatron() -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from megatron_ext.config.load import load_config;"
        "from megatron_ext.training.describe import describe;"
        f"describe(load_config(Path({str(PINTS)!r})), world_size=8);"
        "print([name for name in ('torch', 'numpy', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
