"""Open Megatron datasets and blend them into one endless, addressable stream of samples.

`IndexedDataset` and `GPTDataset` are megatron-core's. Ours are the checks before them, the split by
document, an index cache that notices changed files and is never half-written, and the order (sampler.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_ext.config.tree import Config
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.data.manifest import read_manifest
from megatron_ext.data.sampler import Blend
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.durable import flush
from megatron_ext.errors import DataError
from megatron_ext.parallel import groups

_CACHE_FORMAT = 1
_GOLDEN_RATIO = 0.6180339887498949


class Sample(NamedTuple):
    """One training sequence."""

    tokens: torch.Tensor
    """[s] int64."""
    labels: torch.Tensor
    """[s] int64, the tokens one place on."""
    loss_mask: torch.Tensor
    """[s] float32, 0 where a label does not count."""


class Samples:
    """The blended samples of one part (training or validation) of the data."""

    def __init__(self, prefixes: Sequence[str], datasets: Sequence[Any], blend: Blend) -> None:
        self.prefixes = tuple(prefixes)
        self.blend = blend
        self._datasets = tuple(datasets)

    @property
    def size(self) -> int:
        """Samples in one pass over all sources."""
        return sum(self.blend.sizes)

    def __getitem__(self, k: int) -> Sample:
        """Read the k-th sample."""
        draw = self.blend[k]
        item = self._datasets[draw.source][draw.sample]
        return Sample(item["tokens"], item["labels"], item["loss_mask"])

    def locate(self, k: int) -> str:
        """Say where the k-th sample comes from, for a message."""
        draw = self.blend[k]
        return f"sample {k}: {self.prefixes[draw.source]} #{draw.sample} (epoch {draw.epoch})"


class DataSplits(NamedTuple):
    """What a run reads."""

    train: Samples
    valid: Samples | None


def build_samples(config: Config, tokenizer: Tokenizer) -> DataSplits:
    """Open all data of a run. Every rank calls it; rank 0 builds missing index caches while the others wait.

    Raises:
        DataError: a file is missing, truncated, too small, or made with another tokenizer.
    """
    first = groups.where_am_i().rank == 0
    with groups.together():
        check_sources(config, tokenizer)
        if first:
            splits = _build(config, tokenizer)
    with groups.together():
        if not first:
            splits = _build(config, tokenizer)
    return splits


def check_sources(config: Config, tokenizer: Tokenizer) -> None:
    """Compare the data's manifests with the run's tokenizer and model, and the files with each other."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"model.vocab_size ({config.model.vocab_size}) must cover the tokenizer's ids: "
            f"{config.data.tokenizer} has {tokenizer.vocab_size}."
        )
    for prefix in (*config.data.train_data, *(config.data.valid_data or ())):
        manifest = read_manifest(prefix)
        if manifest is not None and manifest.tokenizer.sha256 != tokenizer.sha256:
            raise DataError(
                f"{prefix}: made with another tokenizer (tokenizer.json sha256 "
                f"{manifest.tokenizer.sha256[:12]}…) than data.tokenizer ({config.data.tokenizer}, "
                f"{tokenizer.sha256[:12]}…); preprocess it again, or name the tokenizer that made it."
            )


def _build(config: Config, tokenizer: Tokenizer) -> DataSplits:
    data = config.data
    shares = [float(share) for share in data.split.split(",")]
    own_validation = data.valid_data is not None
    train = _open_all(
        config, tokenizer, data.train_data, data.train_weights, part=0, shares=[1.0] if own_validation else shares
    )
    if own_validation:
        valid = _open_all(config, tokenizer, data.valid_data or (), None, part=0, shares=[1.0])
    elif len(shares) > 1 and shares[1] > 0:
        valid = _open_all(config, tokenizer, data.train_data, data.train_weights, part=1, shares=shares)
    else:
        return DataSplits(train, None)
    return DataSplits(train, valid)


def _open_all(
    config: Config,
    tokenizer: Tokenizer,
    prefixes: Sequence[str],
    weights: Sequence[float] | None,
    *,
    part: int,
    shares: Sequence[float],
) -> Samples:
    datasets = [_open(config, tokenizer, prefix, part=part, shares=shares) for prefix in prefixes]
    blend = Blend([len(dataset) for dataset in datasets], weights, seed=config.train.seed)
    return Samples(prefixes, datasets, blend)


def _open(config: Config, tokenizer: Tokenizer, prefix: str, *, part: int, shares: Sequence[float]) -> Any:
    """Open one source as a GPTDataset of exactly one pass over its documents of one part."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    whole = IndexedFile.open(prefix)
    if whole.sequence_lengths.size == 0:
        raise DataError(f"{prefix}: holds no tokens; preprocess other data, or leave it out.")
    indexed = IndexedDataset(prefix)
    sequences = sequences_of_part(whole.document_indices, part, shares)
    num_tokens = int(whole.sequence_lengths[sequences].sum(dtype=np.int64)) if len(sequences) else 0
    needed = config.train.seq_length + 1
    if num_tokens < needed:
        name = ("training", "validation")[part]
        raise DataError(
            f"{prefix}: the {name} share ({num_tokens} tokens of {len(sequences)} documents) is shorter than one "
            f"sample of train.seq_length + 1 = {needed} tokens; use more data, another data.split, or shorter samples."
        )
    source = str(Path(prefix).resolve())  # the same data by another path is the same data
    fingerprint = {
        "format": _CACHE_FORMAT,
        "files": [_fingerprint(Path(f"{source}{ending}")) for ending in (".bin", ".idx")],
        "part": part,
        "shares": list(shares),
        "tokenizer": tokenizer.sha256,
        "eod_mask_loss": config.data.eod_mask_loss,
        "seed": config.train.seed,
        "seq_length": config.train.seq_length,
    }

    def dataset(cache: Path) -> Any:
        settings = _gpt_dataset_config(config, tokenizer, cache, fingerprint)
        return GPTDataset(indexed, source, sequences, None, (Split.train, Split.valid)[part], settings)

    cache = _cache_root(config, prefix) / hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:24]
    if groups.where_am_i().rank == 0 and not cache.exists():
        _build_cache(cache, dataset)
    return dataset(cache)


def sequences_of_part(document_indices: np.ndarray, part: int, shares: Sequence[float]) -> np.ndarray:
    """Pick the sequences whose documents belong to one part of a split.

    Documents are dealt evenly over the file (every 100th for 99,1), so that a file ordered by source gives an
    unbiased validation share; Megatron cuts contiguous ranges.

    Args:
        document_indices: [documents + 1] int64, first sequence of each document.
        part: index into shares.
        shares: proportions of the parts.

    Returns:
        int32 sequence indices, ascending.
    """
    documents = np.arange(len(document_indices) - 1, dtype=np.float64)
    total, before = sum(shares), sum(shares[:part])
    low, high = before / total, (before + shares[part]) / total
    # Multiples of the golden ratio, modulo one, fill the unit interval evenly in every stretch and keep no step
    # with a file that alternates its sources (Kronecker sequence; Niederreiter 1992, chapter 3).
    place = (documents * _GOLDEN_RATIO) % 1.0
    mine = (place >= low) & (place < high)
    return np.flatnonzero(np.repeat(mine, np.diff(document_indices))).astype(np.int32)


def _gpt_dataset_config(config: Config, tokenizer: Tokenizer, cache: Path, fingerprint: dict[str, Any]) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=config.train.seed,
        sequence_length=config.train.seq_length,
        # The blend is ours; Megatron only wants to know that it is not to invent data.
        blend=([config.data.train_data[0]], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=_DatasetTokenizer(tokenizer, fingerprint),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,
    )


class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer. `unique_identifiers` enters the cache's key, so it carries ours."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: dict[str, Any]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        # -1 never occurs in data. A real pad id would make GPTDataset mask and zero it inside documents.
        self.pad = -1
        self.unique_identifiers = fingerprint


def _fingerprint(path: Path) -> list[int | str]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _cache_root(config: Config, prefix: str) -> Path:
    return Path(config.data.path_to_cache) if config.data.path_to_cache else Path(prefix).parent / "cache"


def _build_cache(cache: Path, dataset: Any) -> None:
    """Build the index arrays aside and rename: a build that died is never taken for a whole one."""
    aside = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        dataset(aside)
        for file in aside.iterdir():
            flush(file)
        aside.rename(cache)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if cache.exists():
            return  # another run was faster
        raise DataError(
            f"{cache.parent}: cannot write the index cache ({error.strerror}); set data.path_to_cache to a folder "
            "that this run may write to."
        ) from None
