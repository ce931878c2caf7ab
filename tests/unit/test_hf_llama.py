"""The maps between Hugging Face's Llama and Megatron's: configuration, layouts, and equal logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_ext.checkpoint import hf_convert, hf_llama
from megatron_ext.checkpoint.hf_folder import HfReader
from megatron_ext.config.tree import ModelConfig
from megatron_ext.errors import CheckpointError
from tests.unit.hf_models import save_random_model

ROOT = Path(__file__).resolve().parents[2]

# As published with the weights.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
CODE_LLAMA_7B = {
    **LLAMA_2_7B,
    "max_position_embeddings": 16384,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "vocab_size": 32016,
}
TINY_LLAMA = {
    **LLAMA_2_7B,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "torch_dtype": "float32",
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _read(config: dict[str, Any]) -> ModelConfig:
    return hf_llama.model_from_hf(config, where="config.json").model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # (layers, hidden, ffn, heads, groups, vocabulary, positions, rotary base), from the models' papers.
        (LLAMA_2_7B, (32, 4096, 11008, 32, 32, 32000, 4096, 1e4)),
        (CODE_LLAMA_7B, (32, 4096, 11008, 32, 32, 32016, 16384, 1e6)),
        (TINY_LLAMA, (22, 2048, 5632, 32, 4, 32000, 2048, 1e4)),
        (MISTRAL_7B, (32, 4096, 14336, 32, 8, 32000, 4096, 1e4)),
    ],
    ids=["llama2", "codellama", "tinyllama", "mistral"],
)
def test_model_from_hf_published_config_gives_its_shape(config: dict[str, Any], expected: tuple[float, ...]) -> None:
    model = _read(config)
    assert (
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.vocab_size,
        model.max_position_embeddings,
        model.rotary_base,
    ) == expected
    assert model.layernorm_epsilon == 1e-5
    assert model.kv_channels is None
    assert not model.share_embeddings_and_output_weights


def test_model_from_hf_sliding_window_shorter_than_positions_is_noted() -> None:
    (note,) = hf_llama.model_from_hf(MISTRAL_7B, where="config.json").notes
    assert "4096" in note and "32768" in note


def test_model_from_hf_without_sliding_window_keeps_positions() -> None:
    read = hf_llama.model_from_hf({**MISTRAL_7B, "sliding_window": None}, where="config.json")
    assert (read.model.max_position_embeddings, read.notes) == (32768, ())


def test_model_from_hf_rope_of_both_transformers_versions_reads_alike() -> None:
    old = {**LLAMA_2_7B, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    new = {k: v for k, v in LLAMA_2_7B.items() if k != "rope_scaling"}
    new["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 5e5}
    assert _read(old) == _read(new)
    assert (_read(new).rotary_base, _read(new).rotary_scaling_factor) == (5e5, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2 is not supported"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act ('gelu') must be silu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' is not supported"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 2.0}},
            "high_freq_factor of llama3 scaling (2.0) must be 4",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "differ"),
        ({"hidden_size": None}, "hidden_size (None) must be a positive whole number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads (5) must divide num_attention_heads (32)"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_model_from_hf_unsupported_config_is_refused_clearly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        _read({**LLAMA_2_7B, **change})
    assert message in str(raised.value)
    assert str(raised.value).startswith("config.json: ")


def test_model_from_hf_several_problems_are_told_together() -> None:
    with pytest.raises(CheckpointError) as raised:
        _read({**LLAMA_2_7B, "mlp_bias": True, "hidden_act": "relu", "vocab_size": 0})
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_channels": 24},
        {"share_embeddings_and_output_weights": True},
        {"rotary_scaling_factor": 8.0, "rotary_base": 5e5},
    ],
)
def test_model_to_hf_read_by_transformers_means_the_same(change: dict[str, Any]) -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=131,
        max_position_embeddings=512,
        **change,
    )
    written = hf_llama.model_to_hf(model, dtype="bfloat16", special=hf_llama.SpecialTokens(1, 2, None))
    theirs = LlamaConfig.from_dict(written)
    assert theirs.dtype == torch.bfloat16
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, None)
    assert theirs.head_dim == (model.kv_channels or 16)
    assert theirs.tie_word_embeddings == model.share_embeddings_and_output_weights
    assert theirs.rope_parameters["rope_theta"] == model.rotary_base
    assert theirs.rope_parameters.get("factor") == model.rotary_scaling_factor
    initialisation = {"init_method": "megatron", "init_method_std": 0.02}
    again = hf_llama.model_from_hf(theirs.to_dict(), where="x").model
    assert {f: getattr(again, f) for f in model.__slots__} == {
        **{f: getattr(model, f) for f in model.__slots__},
        **initialisation,
    }


def _model(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 6,
        "ffn_hidden_size": 10,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "kv_channels": 4,
        "vocab_size": 11,
        "make_vocab_size_divisible_by": 8,
        "max_position_embeddings": 16,
    }
    return ModelConfig(**{**shape, **changes})


def test_merge_qkv_places_each_groups_queries_then_key_then_value() -> None:
    model = _model()
    query, key, value = (torch.randn(rows, 6) for rows in (24, 12, 12))
    expected = []
    for group in range(3):
        for head in (2 * group, 2 * group + 1):
            expected += [query[4 * head + i] for i in range(4)]
        expected += [key[4 * group + i] for i in range(4)]
        expected += [value[4 * group + i] for i in range(4)]
    assert torch.equal(hf_llama.merge_qkv(query, key, value, model), torch.stack(expected))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_from_hf_after_to_hf_is_the_identity(groups: int, tied: bool) -> None:
    model = _model(num_query_groups=groups, share_embeddings_and_output_weights=tied)
    shapes = hf_llama.hf_shapes(model)
    seen: set[str] = set()
    for piece in hf_llama.pieces(model):
        tensors = [torch.randn(shapes[name]) for name in piece.hf_names]
        stored = hf_llama.from_hf(piece, tensors, model)
        expected = hf_llama.megatron_shapes(model)[piece.key]
        assert tuple(stored.shape) == (expected if piece.layer is None else expected[1:])
        for name, tensor, back in zip(
            piece.hf_names, tensors, hf_llama.to_hf(piece, stored, model).values(), strict=True
        ):
            assert torch.equal(tensor, back)
            seen.add(name)
    assert seen == set(shapes)


def test_from_hf_vocabulary_padding_is_zero() -> None:
    model = _model()
    stored = hf_llama.from_hf(hf_llama.pieces(model)[0], [torch.ones(11, 6)], model)
    assert stored.shape == (16, 6)
    assert stored[11:].eq(0).all() and stored[:11].eq(1).all()


# --- equal logits -------------------------------------------------------------------------------------------

PARITY: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8, "vocab_size": 128},
    "mqa": {"num_key_value_heads": 1, "vocab_size": 131},
    "tied": {"tie_word_embeddings": True, "vocab_size": 101},
    "wide_heads": {"head_dim": 24, "num_attention_heads": 4, "rms_norm_eps": 1e-3},
    "narrow_heads": {"head_dim": 4, "num_key_value_heads": 4, "vocab_size": 257},
    "rope_base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope_llama3": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 1e4}},
    "bf16": {"dtype": torch.bfloat16},
    "mistral": {"mistral": True, "sliding_window": 200, "num_key_value_heads": 4},
}
CONTROLS = ("no_interleave", "swapped_gate_up", "swapped_norms")
# Positions enough for a rotary mistake to show; below Mistral's window.
TOKENS = torch.randint(97, (2, 192), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-4  # the project's bound, for logits of standard deviation about 1; observed: 4e-6 at most

_FORWARD = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from megatron_ext.checkpoint import layout
from megatron_ext.training.inference import forward_logits
tokens, root = torch.load(sys.argv[1]), Path(sys.argv[2])
logits = {run.name: forward_logits(layout.resolve(run), tokens) for run in sorted(root.iterdir())}
torch.save(logits, sys.argv[3])
"""


def _concatenated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    return torch.cat([query, key, value])


def _swapping(key: str, right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def from_hf(piece: hf_llama.Piece, tensors: list[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        return right(piece, tensors[::-1] if piece.key == key else tensors, model)

    return from_hf


def _swapped_norms(model: ModelConfig) -> list[hf_llama.Piece]:
    other = {hf_llama.QKV_NORM: hf_llama.FC1_NORM, hf_llama.FC1_NORM: hf_llama.QKV_NORM}
    return [piece._replace(key=other.get(piece.key, piece.key)) for piece in _right_pieces(model)]


_right_pieces = hf_llama.pieces


@pytest.fixture(scope="module")
def logits(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(transformers' logits, Megatron's logits) of every case; Megatron has a process of its own, once."""
    base = tmp_path_factory.mktemp("parity")
    theirs = {}
    for name, changes in PARITY.items():
        save_random_model(base / "hf" / name, **changes)
        model = AutoModelForCausalLM.from_pretrained(base / "hf" / name, dtype=torch.float32).eval()
        with torch.no_grad():
            theirs[name] = model(TOKENS).logits
        _import(base / "hf" / name, base / "runs" / name)
    for control in CONTROLS:
        with pytest.MonkeyPatch.context() as patch:
            if control == "no_interleave":
                patch.setattr(hf_llama, "merge_qkv", _concatenated)
            elif control == "swapped_gate_up":
                patch.setattr(hf_llama, "from_hf", _swapping(hf_llama.FC1, hf_llama.from_hf))
            else:
                patch.setattr(hf_llama, "pieces", _swapped_norms)
            _import(base / "hf" / "gqa", base / "runs" / control)
    torch.save(TOKENS, base / "tokens.pt")
    command = [
        sys.executable,
        "-c",
        _FORWARD,
        str(base / "tokens.pt"),
        str(base / "runs"),
        str(base / "ours.pt"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return theirs, torch.load(base / "ours.pt")


def _import(folder: Path, run: Path) -> None:
    reader = HfReader(folder)
    model = hf_llama.model_from_hf(reader.config, where=str(folder)).model
    hf_convert.import_folder(reader, model, run, tokenizer_sha256=None, on_bytes=lambda count: None)


@pytest.mark.parametrize("name", PARITY)
def test_megatron_logits_of_imported_weights_equal_transformers(
    name: str, logits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    theirs, ours = logits[0][name], logits[1][name]
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3  # else the tolerance would say nothing
    assert (ours - theirs).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("control", CONTROLS)
def test_megatron_logits_of_wrongly_mapped_weights_differ(
    control: str, logits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    # A thousand times the tolerance: the parity above cannot pass by chance.
    assert (logits[1][control] - logits[0]["gqa"]).abs().max().item() > 1000 * TOLERANCE
