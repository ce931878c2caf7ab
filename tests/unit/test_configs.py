"""Every bundled configuration: sound, of the published size, and documented."""

import re
import tomllib
from pathlib import Path

import pytest

from megatron_ext.config.checks import check_config
from megatron_ext.config.load import load_config
from megatron_ext.model.flops import flops_per_token, parameter_count
from megatron_ext.model.memory import memory_per_gpu
from megatron_ext.optim.schedule import samples_after

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALL = sorted(CONFIGS.glob("*.toml"))
# What `demo` needs is a laptop; the others are laid out for a node of 8 H100.
ON_A_NODE = [path for path in ALL if path.name != "demo.toml"]
H100_GIB = 80e9 / 2**30
BESIDE_GIB = 6  # CUDA, NCCL, fragmentation

PARAMETERS = {
    # 1.5-Pints lit_gpt/config_base.py
    "pints_1.5b_2k": 1_565_886_464,
    "pints_1.5b_16k": 1_565_886_464,
    "pints_0.12b": 121_228_032,
    "pints_2b": 2_044_069_888,
    # ProX table 8
    "tlm_xs": 354_284_800,
    "tlm_s": 758_982_144,
    "tlm_m": 1_741_785_088,
    # the models' cards on Hugging Face
    "tinyllama_1.1b": 1_100_048_384,
    "cpt_tinyllama_1.1b": 1_100_048_384,
    "cpt_llama2_7b": 6_738_415_616,
    "cpt_codellama_7b": 6_738_546_688,
    "cpt_mistral_7b": 7_241_732_096,
}
# Tokens of the runs: 1.5-Pints pretrain/main.py, TinyLlama's 3 T, ProX table 9 (early stops included).
GIGA_TOKENS = {
    "pints_1.5b_2k": 100.85,
    "pints_1.5b_16k": 100.85,
    "pints_0.12b": 100.91,
    "tinyllama_1.1b": 3000.0,
    "tlm_xs": 26.21,
    "tlm_s": 26.21,
    "tlm_m": 52.43,
    "cpt_tinyllama_1.1b": 15.73,
    "cpt_llama2_7b": 10.49,
    "cpt_codellama_7b": 10.49,
    "cpt_mistral_7b": 10.49,
}


def test_configs_every_run_that_the_tables_name_is_there() -> None:
    assert set(PARAMETERS) <= {path.name.removesuffix(".toml") for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_config_bundled_has_no_problem(path: Path) -> None:
    config = load_config(path)
    replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    world_size = 8 if path in ON_A_NODE else replica
    assert check_config(config, world_size=world_size, files=False) == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_config_bundled_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.name.removesuffix(".toml")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_config_bundled_says_what_it_is_and_where_it_is_from(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    header = []
    for line in rest:
        if not line.startswith("#"):
            break
        header.append(line)
    assert re.match(r"# \S.*[.;]", first)
    assert any("Source:" in line for line in header)


@pytest.mark.parametrize("path", ON_A_NODE, ids=lambda path: path.name)
def test_config_bundled_fits_a_node_of_eight_h100(path: Path) -> None:
    assert memory_per_gpu(load_config(path), world_size=8).total + BESIDE_GIB < H100_GIB


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_config_model_has_the_published_size(name: str, count: int) -> None:
    assert parameter_count(load_config(CONFIGS / f"{name}.toml").model).total == count


@pytest.mark.parametrize(("name", "tokens"), GIGA_TOKENS.items())
def test_config_run_trains_on_the_published_tokens(name: str, tokens: float) -> None:
    train = load_config(CONFIGS / f"{name}.toml").train
    samples = samples_after(train, train.exit_iters or train.train_iters)
    assert samples * train.seq_length / 1e9 == pytest.approx(tokens, abs=0.01)


@pytest.mark.parametrize(("name", "giga"), [("pints_1.5b_2k", 9.605), ("pints_1.5b_16k", 13.833)])
def test_config_pints_costs_what_the_anchors_say(name: str, giga: float) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    flops = flops_per_token(config.model, config.train.seq_length)
    assert flops.total / 1e9 == pytest.approx(giga, abs=5e-4)


def test_config_pints_16k_differs_from_2k_in_length_and_batch_only() -> None:
    short, long = (
        tomllib.loads((CONFIGS / f"pints_1.5b_{length}.toml").read_text(encoding="utf-8")) for length in ("2k", "16k")
    )
    differing = {
        (section, key)
        for section in short
        if isinstance(short[section], dict)
        for key in short[section]
        if short[section][key] != long[section][key]
    }
    assert differing == {
        ("model", "max_position_embeddings"),
        ("train", "seq_length"),
        ("train", "micro_batch_size"),
        ("train", "global_batch_size"),
    }
