"""Samples by megatron-core's GPTDataset, with an index cache that notices changed files and is never half-written.

`IndexedDataset` and `GPTDataset` are megatron-core's; ours is what is around them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.config.tree import Config
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.data.split import sequences_of_part
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.windows import Sample
from megatron_ext.durable import flush
from megatron_ext.errors import DataError

_CACHE_FORMAT = 1


class GptSamples:
    """One pass over the documents of one part of a file, shuffled by GPTDataset."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, file: IndexedFile, *, part: int, shares: Sequence[float]
    ) -> None:
        """Look where the index cache is to be. Nothing is read but `file`; `open` does the rest.

        Args:
            config: the run.
            tokenizer: the run's tokenizer.
            file: the opened pair.
            part: index into shares.
            shares: proportions of the parts, dealt by document.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._part = part
        self._prefix = str(file.prefix.resolve())  # the same data by another path is the same data
        self._sequences: npt.NDArray[np.int32] = sequences_of_part(file.document_indices, part, shares)
        self.num_tokens = int(file.sequence_lengths[self._sequences].sum(dtype=np.int64))
        self._fingerprint = {
            "format": _CACHE_FORMAT,
            "files": [_describe_file(Path(f"{self._prefix}{ending}")) for ending in (".bin", ".idx")],
            "part": part,
            "shares": list(shares),
            "tokenizer": tokenizer.sha256,
            "eod_mask_loss": config.data.eod_mask_loss,
            "seed": config.train.seed,
            "seq_length": config.train.seq_length,
        }
        root = Path(config.data.path_to_cache) if config.data.path_to_cache else file.prefix.parent / "cache"
        self.cache = root / hashlib.sha256(json.dumps(self._fingerprint).encode()).hexdigest()[:24]
        self._dataset: Any = None

    def build(self) -> None:
        """Build the index arrays aside and rename: a build that died is never taken for a whole one.

        Raises:
            DataError: the cache cannot be written.
        """
        aside = self.cache.with_name(f"{self.cache.name}.{os.getpid()}.tmp")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            self._make(aside)
            for file in aside.iterdir():
                flush(file)
            aside.rename(self.cache)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if self.cache.exists():
                return  # another run was faster
            raise DataError(
                f"{self.cache.parent}: cannot write the index cache ({error.strerror}); set data.path_to_cache to a "
                "folder that this run may write to."
            ) from None

    def open(self) -> None:
        """Open the cache, which must be there."""
        self._dataset = self._make(self.cache)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample."""
        item = self._dataset[index]
        return Sample(item["tokens"], item["labels"], item["loss_mask"])

    def _make(self, cache: Path) -> Any:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        settings = GPTDatasetConfig(
            random_seed=self._config.train.seed,
            sequence_length=self._config.train.seq_length,
            # The blend is ours; Megatron only wants to know that it is not to invent data.
            blend=([self._prefix], None),
            split="1",
            path_to_cache=str(cache),
            tokenizer=_DatasetTokenizer(self._tokenizer, self._fingerprint),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self._config.data.eod_mask_loss,
            create_attention_mask=False,
        )
        split = (Split.train, Split.valid)[self._part]
        return GPTDataset(IndexedDataset(self._prefix), self._prefix, self._sequences, None, split, settings)


class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer. `unique_identifiers` enters the cache's key, so it carries ours."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: dict[str, Any]) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eod
        # -1 never occurs in data. A real pad id would make GPTDataset mask and zero it inside documents.
        self.pad = -1
        self.unique_identifiers = fingerprint


def _describe_file(path: Path) -> list[int | str]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]
