"""tools/convert_checkpoint.py from end to end: bits, folders that load, clear refusals, memory."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_ext.checkpoint import hf_llama, layout
from megatron_ext.checkpoint.dcp import TensorInfo, WriteRequest, write_checkpoint
from megatron_ext.config.tree import ModelConfig
from tests.unit.hf_models import hashes, save_random_model, save_tokenizer
from tools import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


def _run(*arguments: str | Path) -> int:
    return convert_checkpoint.main([str(argument) for argument in arguments])


def _make_run(base: Path, **changes: Any) -> Path:
    """Write a Hugging Face folder and import it; returns the run."""
    save_random_model(base / "hf", **changes)
    save_tokenizer(base / "hf")
    assert _run("from-hf", "--load", base / "hf", "--save", base / "run") == 0
    return base / "run"


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that tests may read but not change."""
    return _make_run(tmp_path_factory.mktemp("shared"))


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.bfloat16, "num_key_value_heads": 8},
        {"dtype": torch.float16, "num_key_value_heads": 1},
        {"tie_word_embeddings": True, "vocab_size": 131},
        {"head_dim": 24, "num_attention_heads": 4},
        {"mistral": True, "sliding_window": 64, "num_key_value_heads": 4},
        {"max_shard_size": "100KB"},
    ],
    ids=["gqa", "mha_bf16", "mqa_fp16", "tied", "wide_heads", "mistral", "sharded"],
)
def test_hf_to_megatron_to_hf_is_bit_equal(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = _make_run(tmp_path, **changes)
    assert _run("to-hf", "--load", run, "--save", tmp_path / "again") == 0
    expected = hashes(tmp_path / "hf")
    assert len(expected) == 3 * 9 + (2 if changes.get("tie_word_embeddings") else 3)
    assert hashes(tmp_path / "again") == expected


def test_to_hf_small_max_shard_size_writes_shards_and_an_index(shared_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _run("to-hf", "--load", shared_run, "--save", out, "--max_shard_size", "100KB") == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in _load(out).parameters())
    assert all(file.stat().st_size < 110_000 for file in out.glob("*.safetensors"))
    assert hashes(out) == hashes(shared_run.parent / "hf")


def test_to_hf_narrower_dtype_rounds_to_nearest(shared_run: Path, tmp_path: Path) -> None:
    assert _run("to-hf", "--load", shared_run, "--save", tmp_path / "out", "--dtype", "bf16") == 0
    exact = _load(shared_run.parent / "hf").state_dict()
    for name, tensor in _load(tmp_path / "out", dtype="auto").state_dict().items():
        assert torch.equal(tensor, exact[name].bfloat16())


_TP2_PP2 = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.save_load import Checkpoints, Progress
from megatron_ext.config.tree import *
from megatron_ext.model.gpt import build_model
from megatron_ext.parallel import groups
from megatron_ext.parallel.launch import find_launch

class NoOptimizer:
    def reload_model_params(self):
        pass

    def sharded_state_dict(self, state, **_):
        return {}

def main():
    source = layout.resolve(Path(sys.argv[1]))
    config = Config(
        name="x", precision=PrecisionConfig(dtype="fp32"), optimizer=OptimizerConfig(lr=0.0),
        model=ModelConfig(**layout.read_description(source).model),
        parallel=ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        data=DataConfig(tokenizer="", train_data=()),
        train=TrainConfig(seq_length=8, micro_batch_size=1, global_batch_size=1, train_iters=1),
    )
    place = groups.initialize(config.parallel, find_launch(), seed=1)
    directory = Path(sys.argv[2]) / "checkpoints"
    checkpoints = Checkpoints(
        config, place, directory=directory, bare_chunks=build_model(config), optimizer=NoOptimizer(),
        tokenizer_sha256="",
    )
    checkpoints.load_weights(source)
    checkpoints.save(Progress(7, 70, 700))
    groups.destroy()

if __name__ == "__main__":
    main()
"""


def test_to_hf_of_a_megatron_tp2_pp2_checkpoint_is_bit_equal(tmp_path: Path) -> None:
    # Megatron itself loads the imported weights, cuts them in four, and saves them.
    run = _make_run(tmp_path, num_hidden_layers=4, intermediate_size=144)
    script = tmp_path / "save.py"
    script.write_text(_TP2_PP2)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--rdzv-backend",
        "c10d",
    ]
    command += ["--rdzv-endpoint", "localhost:0", str(script), str(run), str(tmp_path / "cut")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cut = tmp_path / "cut" / "checkpoints" / "iter_0000007"
    assert len(list(cut.glob("*.distcp"))) >= 4
    _set_description(cut, tokenizer_sha256=None)
    arguments = ("--tokenizer", run / "tokenizer")
    assert _run("to-hf", "--load", tmp_path / "cut", "--save", tmp_path / "again", *arguments) == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "hf")


# --- folders ------------------------------------------------------------------------------------------------


def _load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_to_hf_folder_generates_through_transformers(shared_run: Path, tmp_path: Path) -> None:
    assert _run("to-hf", "--load", shared_run, "--save", tmp_path / "out") == 0
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), _load(tmp_path / "out")
    ids = tokenizer("A", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 5)
    assert tokenizer.model_max_length == 256
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id == 89


def test_to_hf_chat_template_is_written(shared_run: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0]['content'] }}!")
    arguments = ("--chat_template", tmp_path / "chat.jinja")
    assert _run("to-hf", "--load", shared_run, "--save", tmp_path / "out", *arguments) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"


def test_from_hf_run_is_whole_and_has_the_tokenizer(shared_run: Path) -> None:
    checkpoint = layout.resolve(shared_run)
    assert checkpoint.name == "iter_0000000"
    assert (shared_run / "checkpoints" / "latest").read_text().strip() == "iter_0000000"
    assert layout.read_description(checkpoint).tokenizer_sha256 is not None
    assert (shared_run / "tokenizer" / "tokenizer.json").read_bytes() == (
        shared_run.parent / "hf" / "tokenizer.json"
    ).read_bytes()


def test_from_hf_without_tokenizer_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_model(tmp_path / "hf")
    assert _run("from-hf", "--load", tmp_path / "hf", "--save", tmp_path / "run") == 0
    assert "no tokenizer.json" in capsys.readouterr().err


def test_from_hf_mistral_notes_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _make_run(tmp_path, mistral=True, sliding_window=64)
    assert "sliding_window 64" in capsys.readouterr().err
    assert layout.read_description(layout.resolve(run)).model["max_position_embeddings"] == 64


def test_to_hf_iteration_zero_is_stated_and_warned_of(
    shared_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("to-hf", "--load", shared_run, "--save", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "iteration 0," in printed.out
    assert "warning: iteration 0" in printed.err


def test_to_hf_trained_iteration_is_stated_without_warning(
    shared_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shared_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "iter_0000000").rename(checkpoints / "iter_0000120")
    _set_description(checkpoints / "iter_0000120", iteration=120, consumed_tokens=4800)
    assert _run("to-hf", "--load", checkpoints / "iter_0000120", "--save", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "iteration 120, 4,800 tokens" in printed.out
    assert "warning" not in printed.err


def test_to_hf_newer_directory_that_is_not_whole_is_named_and_passed_over(
    shared_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shared_run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "iter_0000009.tmp").mkdir()
    assert _run("to-hf", "--load", tmp_path / "run", "--save", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "iter_0000000: iteration 0," in printed.out
    assert "warning: ignored" in printed.err and "iter_0000009.tmp" in printed.err


# --- verification: Megatron in a process of its own ---------------------------------------------------------


def _verify(run: Path, out: Path, before: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"from megatron_ext.checkpoint import hf_llama\n{before}\n"
        "from tools import convert_checkpoint\nsys.exit(convert_checkpoint.main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "to-hf",
        "--load",
        str(run),
        "--save",
        str(out),
        "--verify",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_verify_of_a_right_export_prints_agreement_and_publishes(shared_run: Path, tmp_path: Path) -> None:
    done = _verify(shared_run, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    match = re.search(r"max \|logit difference\| (\S+) \(at most 0.0001\), top-1 agreement 100.00 %", done.stdout)
    assert match is not None and float(match[1]) < 1e-5
    assert (tmp_path / "out" / "config.json").exists()


def test_verify_of_rounded_weights_states_its_looser_bound(shared_run: Path, tmp_path: Path) -> None:
    done = _verify(shared_run, tmp_path / "out", "", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "looser because the export rounds fp32 weights" in done.stdout


def test_verify_of_a_wrong_export_exits_1_and_publishes_nothing(shared_run: Path, tmp_path: Path) -> None:
    swap = (
        "right = hf_llama.to_hf\n"
        "def wrong(piece, tensor, model):\n"
        "    found = right(piece, tensor, model)\n"
        "    return dict(zip(found, reversed(found.values()))) if piece.key == hf_llama.FC1 else found\n"
        "hf_llama.to_hf = wrong"
    )
    done = _verify(shared_run, tmp_path / "out", swap)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "the logits differ" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejected"]


# --- refusals -----------------------------------------------------------------------------------------------


def _set_description(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "megapints.json"
    body = {**json.loads(file.read_text()), **changes}
    del body["own_digest"]
    if "files" in changes:
        del body["digests"]  # of the files as they were
    else:
        body["own_digest"] = layout._own_digest(body)
    file.write_text(json.dumps(body))


def _set_model(run: Path, **changes: Any) -> None:
    checkpoint = run / "checkpoints" / "iter_0000000"
    model = json.loads((checkpoint / "megapints.json").read_text())["model"]
    _set_description(checkpoint, model={**model, **changes})


def _poison(run: Path) -> None:
    file = run / "checkpoints" / "iter_0000000" / ".metadata"
    file.write_bytes(pickle.dumps(print))
    _set_description(file.parent, files={".metadata": file.stat().st_size})


def _forget_tokenizer(run: Path) -> None:
    shutil.rmtree(run / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "holds no whole checkpoint"),
        (lambda run: (run / "checkpoints/iter_0000000/common.pt").unlink(), "common.pt is missing"),
        (lambda run: _set_model(run, hidden_size=32), "linear_qkv.weight has shape [3, 96, 64]"),
        (
            lambda run: _set_model(run, share_embeddings_and_output_weights=True, num_layers=9),
            "it is [9, 96, 64]",
        ),
        (lambda run: _set_model(run, unheard_of=1), "its model is of another version"),
        (_poison, "foreign object (builtins.print)"),
        (_forget_tokenizer, "the run has no tokenizer; name its folder with --tokenizer"),
        (
            lambda run: save_tokenizer(run / "tokenizer", size=40),
            "is not the one that the model was trained with",
        ),
        (lambda run: (run / "tokenizer" / "tokenizer.json").write_text("{"), "is not a tokenizer"),
    ],
)
def test_to_hf_of_a_bad_run_tells_one_clear_error(
    shared_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    shutil.copytree(shared_run, tmp_path / "run")
    damage(tmp_path / "run")
    assert _run("to-hf", "--load", tmp_path / "run", "--save", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in "\n".join(errors)
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


def test_to_hf_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_model(tmp_path / "hf", vocab_size=64)
    assert _run("from-hf", "--load", tmp_path / "hf", "--save", tmp_path / "run") == 0
    save_tokenizer(tmp_path / "tokenizer")
    arguments = ("--tokenizer", tmp_path / "tokenizer")
    assert _run("to-hf", "--load", tmp_path / "run", "--save", tmp_path / "out", *arguments) == 2
    assert "ids up to 89, but the model's vocabulary has 64 entries" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["to-hf", "from-hf"])
def test_existing_target_is_refused_and_kept(
    shared_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    source = shared_run if command == "to-hf" else shared_run.parent / "hf"
    assert _run(command, "--load", source, "--save", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _rename_tensor(file: Path, old: str, new: str) -> None:
    assert len(old) == len(new)
    file.write_bytes(file.read_bytes().replace(old.encode(), new.encode(), 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "not a folder"),
        (lambda hf: (hf / "config.json").unlink(), "no config.json"),
        (lambda hf: (hf / "config.json").write_text("[]"), "config.json: must hold a table"),
        (lambda hf: _edit_config(hf, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel is not supported"),
        (lambda hf: _edit_config(hf, attention_bias=True), "attention_bias is true"),
        (lambda hf: _edit_config(hf, vocab_size=98), "has shape [97, 64]; by config.json it is [98, 64]"),
        (
            lambda hf: _edit_config(hf, num_hidden_layers=4),
            "tensor model.layers.3.input_layernorm.weight is missing",
        ),
        (
            lambda hf: _edit_config(hf, num_hidden_layers=2),
            "tensor model.layers.2.input_layernorm.weight is not known",
        ),
        (lambda hf: _cut(hf / "model.safetensors"), "model.safetensors: cut short"),
        (lambda hf: (hf / "model.safetensors").write_bytes(b"GGUF" * 9), "not a safetensors file"),
        (lambda hf: (hf / "model.safetensors").write_bytes(b""), "not a safetensors file"),
        (lambda hf: (hf / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (
            lambda hf: (hf / "model.safetensors").rename(hf / "model.bin"),
            "save the weights as safetensors first",
        ),
        (
            lambda hf: _rename_tensor(hf / "model.safetensors", "model.norm.weight", "model.gorm.weight"),
            "tensor model.norm.weight is missing",
        ),
        (lambda hf: _rename_tensor(hf / "model.safetensors", '"F32"', '"I32"'), "has type I32"),
    ],
)
def test_from_hf_of_a_bad_folder_tells_one_clear_error(
    shared_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    shutil.copytree(shared_run.parent / "hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    assert _run("from-hf", "--load", tmp_path / "hf", "--save", tmp_path / "run") == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in "\n".join(errors)
    assert all(line.startswith("error: ") for line in errors)
    assert {path.name for path in tmp_path.iterdir()} <= {"hf"}


def test_convert_checkpoint_conversion_does_not_import_megatron(shared_run: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print([name for name in ('megatron', 'transformers', 'tyro') if name in sys.modules])"
    )
    start = f"import sys; sys.argv = [{str(TOOL)!r}] + sys.argv[1:]\n{code}"
    command = [
        sys.executable,
        "-c",
        start,
        "to-hf",
        "--load",
        str(shared_run),
        "--save",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-3000:]


# --- memory -------------------------------------------------------------------------------------------------

PINTS = ModelConfig(
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=4,
    vocab_size=32064,
    max_position_embeddings=2048,
)
_MEASURED = """
import sys
from tools import convert_checkpoint
assert convert_checkpoint.main(sys.argv[1:]) == 0
# Not getrusage: its maximum is inherited from the process that started this one.
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _write_random_run(run: Path, model: ModelConfig, dtype: torch.dtype) -> None:
    infos = {key: TensorInfo(shape, dtype) for key, shape in hf_llama.megatron_shapes(model).items()}
    generator = torch.Generator().manual_seed(0)

    def produce(request: WriteRequest) -> torch.Tensor:
        shape = infos[request.key].shape
        shape = shape if request.layer is None else shape[1:]
        return torch.empty(shape, dtype=dtype).uniform_(-0.1, 0.1, generator=generator)

    temporary = layout.prepare_temporary(run / layout.CHECKPOINTS, 0)
    requests = [WriteRequest(piece.key, piece.layer) for piece in hf_llama.pieces(model)]
    write_checkpoint(temporary, infos, requests, produce, common={})
    layout.publish(
        temporary,
        layout.CheckpointDescription(
            iteration=0,
            consumed_samples=0,
            consumed_tokens=0,
            model=asdict(model),
            config={},
            optimizer_format=None,
            tokenizer_sha256=None,
            topology={},
        ),
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc for the peak of resident memory")
@pytest.mark.parametrize(
    ("stored", "exported"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")], ids=["bf16", "fp32"]
)
def test_export_of_a_1_57b_checkpoint_stays_below_1_5_gb(tmp_path: Path, stored: torch.dtype, exported: str) -> None:
    _write_random_run(tmp_path / "run", PINTS, stored)
    save_tokenizer(tmp_path / "run" / "tokenizer")
    command = [
        sys.executable,
        "-c",
        _MEASURED,
        "to-hf",
        "--load",
        str(tmp_path / "run"),
        "--save",
        str(tmp_path / "hf"),
    ]
    try:
        done = subprocess.run([*command, "--dtype", exported], cwd=ROOT, capture_output=True, text=True)
        size = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    finally:
        shutil.rmtree(tmp_path)  # up to 12.5 GB, which pytest would keep for three sessions
    assert done.returncode == 0, done.stderr[-3000:]
    match = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert match is not None
    assert size > 1_565_886_464 * stored.itemsize  # parameters by the paper; nothing was left out
    assert int(match[1]) * 1024 < 1.5e9
