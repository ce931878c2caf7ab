"""Open Megatron datasets and blend them into one endless, addressable stream of samples.

A source's samples come from megatron-core's GPTDataset (gpt_samples.py) or are computed (windows.py), as
data.sample_index says; their order over the run is sampler.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_ext.config.tree import Config
from megatron_ext.data import usage
from megatron_ext.data.gpt_samples import GptSamples
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.data.manifest import read_manifest
from megatron_ext.data.sampler import Blend
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.windows import Sample, Windows
from megatron_ext.errors import DataError
from megatron_ext.parallel import groups


class Source(Protocol):
    """The samples of one source, each once."""

    def __len__(self) -> int:
        """Count them."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Read one."""
        ...


class Samples:
    """The blended samples of one part (training or validation) of the data."""

    def __init__(self, prefixes: Sequence[str], sources: Sequence[Source], blend: Blend) -> None:
        self.prefixes = tuple(prefixes)
        self.blend = blend
        self._sources = tuple(sources)

    @property
    def size(self) -> int:
        """Samples in one pass over all sources."""
        return sum(self.blend.sizes)

    def __getitem__(self, k: int) -> Sample:
        """Read the k-th sample."""
        draw = self.blend[k]
        return self._sources[draw.source][draw.sample]

    def locate(self, k: int) -> str:
        """Say where the k-th sample comes from, for a message."""
        draw = self.blend[k]
        return f"sample {k}: {self.prefixes[draw.source]} #{draw.sample} (epoch {draw.epoch})"


class DataSplits(NamedTuple):
    """What a run reads."""

    train: Samples
    valid: Samples | None


class Part(NamedTuple):
    """Training or validation."""

    name: str
    prefixes: tuple[str, ...]
    number: int
    """Which of the shares it is."""
    shares: tuple[float, ...]
    """Proportions in which the documents of each file are dealt."""


def parts_of(config: Config) -> tuple[Part, Part | None]:
    """Say what is read for training and, if anything is, for validation."""
    data = config.data
    if data.valid_data is not None:
        return Part("training", data.train_data, 0, (1.0,)), Part("validation", data.valid_data, 0, (1.0,))
    shares = tuple(float(share) for share in data.split.split(","))
    train = Part("training", data.train_data, 0, shares)
    return train, train._replace(name="validation", number=1) if len(shares) > 1 and shares[1] > 0 else None


class Opened(NamedTuple):
    """A part of a source that was just opened."""

    prefix: str
    part: str
    """training or validation."""
    cache: Path | None
    """Folder of its index arrays; None where there are none."""
    built: bool
    """Whether they were built now."""


def build_samples(config: Config, tokenizer: Tokenizer) -> DataSplits:
    """Open all data of a run. Every rank calls it; rank 0 builds missing index caches while the others wait.

    Raises:
        DataError: a file is missing, truncated, too small, or made with another tokenizer.
    """
    first = groups.where_am_i().rank == 0
    with groups.together():
        check_sources(config, tokenizer)
        if first:
            splits = open_samples(config, tokenizer, builds=True)
    with groups.together():
        if not first:
            splits = open_samples(config, tokenizer, builds=False)
    return splits


def check_sources(config: Config, tokenizer: Tokenizer) -> None:
    """Compare the data's manifests with the run's tokenizer and model, and the files with each other.

    Raises:
        DataError: they do not fit.
    """
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


def open_samples(
    config: Config, tokenizer: Tokenizer, *, builds: bool, on_open: Callable[[Opened], None] | None = None
) -> DataSplits:
    """Open all data of a run, on this process alone.

    Args:
        config: a sound configuration.
        tokenizer: the run's tokenizer.
        builds: build index caches that are missing; else they must be there.
        on_open: told of each part of a source when it is open.

    Raises:
        DataError: a file is missing, truncated or too small, or a cache cannot be written.
    """
    train, valid = parts_of(config)

    def open_part(part: Part) -> Samples:
        sources = [_open(config, tokenizer, prefix, part, builds=builds, on_open=on_open) for prefix in part.prefixes]
        sizes = [len(source) for source in sources]
        amounts = usage.amounts(config.data, sizes) if part.prefixes == config.data.train_data else None
        # GPTDataset has shuffled the first pass.
        first_computed_pass = 1 if config.data.sample_index == "gpt_dataset" else 0
        blend = Blend(sizes, amounts, seed=config.train.seed, first_computed_pass=first_computed_pass)
        return Samples(part.prefixes, sources, blend)

    return DataSplits(open_part(train), open_part(valid) if valid is not None else None)


def _open(
    config: Config,
    tokenizer: Tokenizer,
    prefix: str,
    part: Part,
    *,
    builds: bool,
    on_open: Callable[[Opened], None] | None,
) -> Source:
    """Open one part of one source."""
    file = IndexedFile.open(prefix)
    if file.tokens.size == 0:
        raise DataError(f"{prefix}: holds no tokens; preprocess other data, or leave it out.")
    source: Windows | GptSamples
    seq_length, built = config.train.seq_length, False
    if config.data.sample_index == "lazy":
        masked = tokenizer.eod if config.data.eod_mask_loss else None
        source = Windows(file, part=part.number, shares=part.shares, seq_length=seq_length, masked_input=masked)
    else:
        source = GptSamples(config, tokenizer, file, part=part.number, shares=part.shares)
    if source.num_tokens < seq_length + 1:
        raise DataError(
            f"{prefix}: the {part.name} share ({source.num_tokens} tokens) is shorter than one sample of "
            f"train.seq_length + 1 = {seq_length + 1} tokens; use more data, another data.split, or shorter samples."
        )
    if isinstance(source, GptSamples):
        built = builds and not source.cache.exists()
        if built:
            source.build()
        source.open()
    if on_open is not None:
        on_open(Opened(prefix, part.name, source.cache if isinstance(source, GptSamples) else None, built))
    return source
