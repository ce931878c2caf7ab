"""Small random Hugging Face folders for the tests of conversion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


def save_random_model(
    folder: Path, *, mistral: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """Write config.json and weights, with norm weights that differ from 1 and from each other."""
    torch.manual_seed(5)
    values = {**SHAPE, **changes}
    shard = values.pop("max_shard_size", "5GB")
    model = MistralForCausalLM(MistralConfig(**values)) if mistral else LlamaForCausalLM(LlamaConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)


def save_tokenizer(folder: Path, *, size: int = 90) -> None:
    """Write a tokenizer of single characters and an end token."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {chr(33 + index): index for index in range(size - 1)} | {"</s>": size - 1}
    Tokenizer(models.WordLevel(vocab, unk_token="!")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def hashes(folder: Path) -> dict[str, str]:
    """Read all tensors with the safetensors library: name -> type, shape and SHA-256 of the bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
                found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {digest}"
    return found
