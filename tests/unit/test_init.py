"""Initial weights: their distributions, and that no layout changes them."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.config.tree import ModelConfig
from megatron_ext.model.gpt import build_model
from megatron_ext.model.init import initialize_weights, standard_deviations

HIDDEN, FFN, LAYERS, VOCAB, QKV = 16, 24, 4, 32, 32
RESIDUAL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def model_config(**changes) -> ModelConfig:
    shape = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32,
    }
    return ModelConfig(**{**shape, **changes})


class Matrix(torch.nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((rows, columns), torch.nan))


class Chunk(torch.nn.Module):
    """Parameters named and shaped as in a GPTModel chunk: these layers (from 0), on one tensor-parallel rank."""

    def __init__(self, layers: range, *, tensor_size: int = 1, first: bool = True, last: bool = True) -> None:
        super().__init__()
        if first:
            self.embedding = torch.nn.Module()
            self.embedding.word_embeddings = Matrix(VOCAB // tensor_size, HIDDEN)
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(self.layer(number, tensor_size) for number in layers)
        if last:
            self.decoder.final_layernorm = torch.nn.RMSNorm(HIDDEN)
            self.output_layer = Matrix(VOCAB // tensor_size, HIDDEN)

    @staticmethod
    def layer(number: int, tensor_size: int) -> torch.nn.Module:
        layer = torch.nn.Module()
        layer.layer_number = number + 1
        layer.input_layernorm = torch.nn.RMSNorm(HIDDEN)
        layer.self_attention, layer.mlp = torch.nn.Module(), torch.nn.Module()
        layer.self_attention.linear_qkv = Matrix(QKV // tensor_size, HIDDEN)
        layer.self_attention.linear_proj = Matrix(HIDDEN, HIDDEN // tensor_size)
        layer.mlp.linear_fc1 = Matrix(2 * FFN // tensor_size, HIDDEN)
        layer.mlp.linear_fc2 = Matrix(HIDDEN, FFN // tensor_size)
        return layer


def weights(
    chunk: Chunk, *, model: ModelConfig | None = None, seed: int = 7, rank: int = 0, size: int = 1
) -> dict[str, torch.Tensor]:
    initialize_weights([chunk], model or model_config(), seed=seed, tensor_rank=rank, tensor_size=size)
    return {name: parameter.detach() for name, parameter in chunk.named_parameters()}


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    return weights(Chunk(range(LAYERS)))


@pytest.fixture(scope="module")
def halves() -> list[dict[str, torch.Tensor]]:
    return [weights(Chunk(range(LAYERS), tensor_size=2), rank=rank, size=2) for rank in (0, 1)]


# --- deviations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "matrix", "residual_output"),
    [
        # 1.5-Pints at its own size: sqrt(2 / (5 x 2048)) and 1 / (sqrt(2048) x 24).
        ({"hidden_size": 2048, "num_layers": 24}, 0.4**0.5 * 2**-5.5, 2**-5.5 / 24),
        # Megatron: 0.02 and 0.02 / sqrt(2 x 8).
        ({"init_method": "megatron", "num_layers": 8}, 0.02, 0.005),
        ({"init_method": "megatron", "num_layers": 8, "init_method_std": 0.04}, 0.04, 0.01),
        ({"init_method_std": 0.5, "output_init_method_std": 0.25}, 0.5, 0.25),
    ],
)
def test_deviations_follow_the_method(changes, matrix, residual_output):
    assert standard_deviations(model_config(**changes)) == pytest.approx((matrix, residual_output), rel=1e-12)


@pytest.fixture(scope="module")
def real_weights(one_process, tiny_data, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of Megatron's own GPTModel: hidden 64, 4 layers."""
    from megatron_ext.config.load import load_config
    from tests.conftest import TINY_TOML

    path = tmp_path_factory.mktemp("init") / "tiny.toml"
    path.write_text(TINY_TOML.format(run_dir="run", data=tiny_data))
    sizes = ("--model.hidden_size", "64", "--model.ffn_hidden_size", "128", "--model.vocab_size", "256")
    (chunk,) = build_model(load_config(path, sizes))
    return {name: parameter.detach().float().cpu() for name, parameter in chunk.named_parameters()}


def test_every_matrix_of_the_real_model_has_its_deviation(real_weights):
    for name, weight in real_weights.items():
        if weight.dim() == 1:
            continue
        # sqrt(2/(5 x 64)), and 1/(sqrt(64) x 4) for what writes to the residual stream.
        expected = 0.03125 if name.endswith(RESIDUAL) else 0.0790569415
        # The deviation of n draws is off by 1/sqrt(2n) of itself; five times that.
        assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * weight.numel())), name


def test_every_matrix_of_the_real_model_has_mean_zero(real_weights):
    for name, weight in real_weights.items():
        if weight.dim() > 1:
            assert abs(weight.mean().item()) < 5 * weight.std().item() / math.sqrt(weight.numel()), name


def test_real_model_draws_two_matrices_per_layer_for_the_residual_stream(real_weights):
    assert sum(name.endswith(RESIDUAL) for name in real_weights) == 2 * 4


def test_norm_weights_of_the_real_model_are_one(real_weights):
    norms = [weight for weight in real_weights.values() if weight.dim() == 1]
    assert len(norms) == 2 * 4 + 1
    assert all(bool((weight == 1).all()) for weight in norms)


def test_real_model_has_no_bias(real_weights):
    assert not [name for name in real_weights if name.endswith("bias")]


def test_values_are_normally_distributed(real_weights):
    values = torch.cat([w.flatten() for n, w in real_weights.items() if n.endswith("linear_qkv.weight")]) / 0.0790569
    within = (values.abs() < 1).float().mean().item()
    # erf(1/sqrt(2)); a uniform distribution of the same deviation would give 0.577.
    assert within == pytest.approx(0.6827, abs=5 * 0.4655 / math.sqrt(values.numel()))


# --- draws ----------------------------------------------------------------------------------------------------


def test_weights_of_one_seed_are_the_same_again(whole):
    again = weights(Chunk(range(LAYERS)))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_weights_of_another_seed_are_others(whole):
    other = weights(Chunk(range(LAYERS)), seed=8)
    assert all(not torch.equal(other[n], weight) for n, weight in whole.items() if weight.dim() > 1)


def test_weights_do_not_depend_on_the_global_generator(whole):
    torch.manual_seed(99)
    torch.randn(5)
    again = weights(Chunk(range(LAYERS)))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def test_weights_leave_the_global_generator_alone():
    torch.manual_seed(99)
    before = torch.get_rng_state()
    weights(Chunk(range(LAYERS)))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_two_matrices_are_independent(whole):
    first, second = (whole[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].flatten() for layer in (0, 1))
    correlation = torch.corrcoef(torch.stack((first, second)))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_rows_that_pad_the_vocabulary_are_zero(name):
    found = weights(Chunk(range(LAYERS)), model=model_config(vocab_size=29))[name]
    assert found[:29].ne(0).all() and found[29:].eq(0).all()


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_rows_of_the_vocabulary_do_not_depend_on_its_padding(name):
    # 29 rows padded to 32 are drawn as 29 rows padded to nothing are.
    chunk = Chunk(range(0))
    chunk.embedding.word_embeddings, chunk.output_layer = Matrix(29, HIDDEN), Matrix(29, HIDDEN)
    bare = weights(chunk, model=model_config(vocab_size=29))[name]
    assert torch.equal(weights(Chunk(range(0)), model=model_config(vocab_size=29))[name][:29], bare)


# --- tensor parallel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
    ],
)
def test_shards_split_by_row_reassemble_to_the_whole(name, whole, halves):
    assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])


@pytest.mark.parametrize("name", [f"decoder.layers.2.{name}" for name in RESIDUAL])
def test_shards_split_by_column_reassemble_to_the_whole(name, whole, halves):
    assert torch.equal(torch.cat([half[name] for half in halves], dim=1), whole[name])


def test_shards_of_the_gated_matrix_hold_the_same_rows_of_gate_and_up(whole, halves):
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    gate, up = whole[name][:FFN], whole[name][FFN:]
    middle = FFN // 2
    assert torch.equal(halves[0][name], torch.cat([gate[:middle], up[:middle]]))
    assert torch.equal(halves[1][name], torch.cat([gate[middle:], up[middle:]]))


def test_norms_of_every_tensor_parallel_rank_are_whole(halves):
    assert all(half["decoder.final_layernorm.weight"].tolist() == [1.0] * HIDDEN for half in halves)


# --- pipeline -------------------------------------------------------------------------------------------------


def test_layers_of_a_later_stage_have_the_weights_of_their_global_number(whole):
    stage = weights(Chunk(range(2, 4), first=False))
    for local, number in ((0, 2), (1, 3)):
        for part in ("self_attention.linear_qkv.weight", *RESIDUAL):
            assert torch.equal(stage[f"decoder.layers.{local}.{part}"], whole[f"decoder.layers.{number}.{part}"])


def test_chunks_of_an_interleaved_stage_have_the_weights_of_their_global_numbers(whole):
    chunks = [Chunk(range(0, 1), last=False), Chunk(range(2, 3), first=False, last=False)]
    initialize_weights(chunks, model_config(), seed=7, tensor_rank=0, tensor_size=1)
    found = chunks[1].decoder.layers[0].mlp.linear_fc1.weight
    assert torch.equal(found, whole["decoder.layers.2.mlp.linear_fc1.weight"])


def test_layers_beyond_the_tenth_keep_their_own_names():
    # decoder.layers.1. must not be taken for the beginning of decoder.layers.11.
    model = model_config(num_layers=12)
    twelve = weights(Chunk(range(12)), model=model)
    two = weights(Chunk(range(10, 12), first=False), model=model)
    for local, number in ((0, 10), (1, 11)):
        found, expected = (w[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for w, i in ((two, local), (twelve, number)))
        assert torch.equal(found, expected)


def test_output_layer_of_a_later_stage_is_the_whole_models(whole):
    assert torch.equal(weights(Chunk(range(2, 4), first=False))["output_layer.weight"], whole["output_layer.weight"])


def test_tied_output_layer_of_a_later_stage_equals_the_embedding():
    tied = model_config(share_embeddings_and_output_weights=True)
    last = weights(Chunk(range(2, 4), first=False), model=tied)
    first = weights(Chunk(range(0, 2), last=False), model=tied)
    assert torch.equal(last["output_layer.weight"], first["embedding.word_embeddings.weight"])


def test_untied_output_layer_differs_from_the_embedding(whole):
    assert not torch.equal(whole["output_layer.weight"], whole["embedding.word_embeddings.weight"])
