"""Sources of samples: the split by document, the index cache, and what is refused.

Most data here gives every token of a file its own id, its position. So what a sample holds says where it was
read, without asking the code under test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config.tree import Config
from megatron_ext.data.blend import DataSplits, Samples, build_samples
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.manifest import Manifest, TokenizerRecord, write_manifest
from megatron_ext.data.split import sequences_of_part
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError

pytestmark = pytest.mark.usefixtures("one_process")
SEQ_LENGTH = 16


def write_positions(prefix: Path, lengths: Sequence[int], *, first: int = 0) -> None:
    """Write documents of these lengths, whose tokens are numbered through from `first`."""
    position = first
    with IndexedWriter(prefix, dtype=np.dtype("<i4")) as writer:
        for length in lengths:
            writer.add_document(np.arange(position, position + length))
            position += length
        writer.publish()


def document_lengths(seed: int, documents: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(1, 50, documents).tolist()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Prefix of a file of 200 documents."""
    prefix = tmp_path / "data" / "source"
    prefix.parent.mkdir()
    write_positions(prefix, document_lengths(1))
    return prefix


@pytest.fixture
def opened(tiny_config: Callable[..., Config], source: Path) -> Callable[..., DataSplits]:
    """Open `source`, or other prefixes, with the tiny run's settings."""

    def build(*overrides: str, prefixes: Sequence[Path] = (source,)) -> DataSplits:
        config = tiny_config("--data.train_data", *map(str, prefixes), *overrides)
        return build_samples(config, Tokenizer.load(config.data.tokenizer))

    return build


def contents(samples: Samples, number: int | None = None) -> list[list[int]]:
    """Tokens of the first samples (default: of one pass)."""
    return [samples[k].tokens.tolist() for k in range(samples.size if number is None else number)]


def positions(samples: Samples) -> list[int]:
    return sorted(token for row in contents(samples) for token in row)


# --- the split ------------------------------------------------------------------------------------------------


def single_sequences(documents: int) -> np.ndarray:
    """Document index of a file whose documents are one sequence each."""
    return np.arange(documents + 1)


def test_split_with_validation_files_of_their_own_trains_on_every_document(opened, source):
    valid = source.with_name("valid")
    write_positions(valid, document_lengths(2))
    splits = opened("--data.valid_data", str(valid), "--data.split", "99,1")
    tokens = sum(document_lengths(1))
    assert splits.train.size == (tokens - 1) // SEQ_LENGTH


# --- samples --------------------------------------------------------------------------------------------------


def test_training_and_validation_share_no_token(opened):
    splits = opened()
    assert set(positions(splits.train)).isdisjoint(positions(splits.valid))


def test_pass_reads_no_position_twice(opened):
    found = positions(opened("--data.split", "100,0", "--train.eval_interval", "None").train)
    assert len(found) == len(set(found))


def test_pass_leaves_out_less_than_one_sample(opened):
    found = positions(opened("--data.split", "100,0", "--train.eval_interval", "None").train)
    assert sum(document_lengths(1)) - len(found) <= SEQ_LENGTH


def test_pass_over_documents_of_several_sequences_reads_no_position_twice(opened, tmp_path):
    # Megatron's own builder can end a document after several sequences (one for each sentence, say).
    prefix = tmp_path / "several"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    position = 0
    for document in range(100):
        lengths = [3, 8, 5][: document % 3 + 1]
        builder.add_document(np.arange(position, position + sum(lengths)), lengths)
        position += sum(lengths)
    builder.finalize(f"{prefix}.idx")
    splits = opened(prefixes=[prefix])
    found = positions(splits.train) + positions(splits.valid)
    assert len(found) == len(set(found))
    assert position - len(found) <= 2 * SEQ_LENGTH


def test_labels_are_the_next_tokens(opened):
    samples = opened().train
    for k in range(samples.size):
        assert samples[k].labels[:-1].tolist() == samples[k].tokens[1:].tolist()


def test_documents_are_read_in_an_order_of_the_seeds_own(opened):
    first, second = (contents(opened("--train.seed", seed).train) for seed in ("1", "2"))
    assert first != second


def test_two_sources_are_read_once_each_in_a_pass(opened, source):
    other = source.with_name("other")
    write_positions(other, document_lengths(3), first=1_000_000)
    found = positions(opened(prefixes=[source, other]).train)
    assert len(found) == len(set(found))
    assert found[0] < 1_000_000 <= found[-1]


def test_weights_set_the_share_of_each_source(opened, source):
    other = source.with_name("other")
    write_positions(other, document_lengths(3), first=1_000_000)
    samples = opened("--data.train_weights", "0.8", "0.2", prefixes=[source, other]).train
    from_other = sum(row[0] >= 1_000_000 for row in contents(samples, 100))
    assert from_other == 20


def test_order_of_samples_does_not_depend_on_the_length_of_the_run(opened):
    short, long = (opened("--train.train_iters", number).train for number in ("5", "5000"))
    assert contents(short, 300) == contents(long, 300)


def test_order_of_samples_does_not_depend_on_the_caches_folder(opened, tmp_path):
    here, there = opened().train, opened("--data.path_to_cache", str(tmp_path / "elsewhere")).train
    assert contents(here, 300) == contents(there, 300)


def test_order_of_samples_does_not_depend_on_where_the_data_lies(opened, source, tmp_path):
    moved = tmp_path / "moved" / "renamed"
    moved.parent.mkdir()
    for ending in (".bin", ".idx"):
        moved.with_suffix(ending).write_bytes(source.with_suffix(ending).read_bytes())
    assert contents(opened(prefixes=[moved]).train, 300) == contents(opened().train, 300)


@pytest.mark.parametrize(("option", "counts"), [("False", True), ("True", False)])
def test_end_of_document_as_input_counts_unless_it_is_masked(option, counts, opened, source):
    samples = opened("--data.eod_mask_loss", option).train
    (eod,) = {2}  # </s> of the tiny tokenizer; position 2 of the file
    (row,) = (samples[k] for k in range(samples.size) if eod in samples[k].tokens.tolist())
    assert row.loss_mask[row.tokens == eod].tolist() == [float(counts)]


def test_every_other_position_counts(opened):
    samples = opened("--data.eod_mask_loss", "True").train
    masks = [samples[k].loss_mask[samples[k].tokens != 2] for k in range(samples.size)]
    assert all(bool((mask == 1).all()) for mask in masks)


def test_message_on_a_sample_names_its_source_and_pass(opened, source):
    samples = opened().train
    assert samples.locate(0).startswith(f"sample 0: {source} #")
    assert samples.locate(samples.size).endswith("(epoch 1)")


# --- the cache ------------------------------------------------------------------------------------------------


def test_cache_is_kept_beside_the_data(opened, source):
    opened()
    assert any((source.parent / "cache").iterdir())


def test_cache_is_used_again(opened, source):
    opened()
    before = {p: p.stat().st_mtime_ns for p in (source.parent / "cache").rglob("*")}
    opened()
    assert {p: p.stat().st_mtime_ns for p in (source.parent / "cache").rglob("*")} == before


def test_cache_of_longer_data_is_built_anew(opened, source):
    opened()
    write_positions(source, document_lengths(4, documents=500))
    found = positions(opened("--data.split", "100,0", "--train.eval_interval", "None").train)
    assert sum(document_lengths(4, documents=500)) - len(found) <= SEQ_LENGTH


def test_cache_of_data_of_the_same_size_is_built_anew(opened, source):
    # The same documents in another order: sizes of .bin and .idx stay, only their times tell.
    opened("--data.split", "1,1")
    write_positions(source, document_lengths(1)[::-1])
    splits = opened("--data.split", "1,1")
    found = positions(splits.train) + positions(splits.valid)
    assert len(found) == len(set(found))
    tokens = np.cumsum([0, *document_lengths(1)[::-1]])
    valid = set(sequences_of_part(single_sequences(200), 1, (1.0, 1.0)).tolist())
    owners = {int(np.searchsorted(tokens, position, side="right")) - 1 for position in positions(splits.valid)}
    assert owners <= valid


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_cache_notices_that_one_of_the_files_changed(ending, opened, source):
    opened()
    before = set((source.parent / "cache").iterdir())
    path = source.with_suffix(ending)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    opened()
    assert set((source.parent / "cache").iterdir()) > before


def test_cache_that_was_left_half_written_is_not_used(opened, source, monkeypatch):
    class Killed(BaseException):
        pass

    def dies_before_the_rename(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies_before_the_rename)
        with pytest.raises(Killed):
            opened()
    for left in (source.parent / "cache").rglob("*.npy"):
        left.write_bytes(left.read_bytes()[:100])
    found = positions(opened("--data.split", "100,0", "--train.eval_interval", "None").train)
    assert sum(document_lengths(1)) - len(found) <= SEQ_LENGTH


def test_cache_that_could_not_be_written_leaves_nothing(opened, source, monkeypatch):
    def full_disk(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPTDataset, "_build_document_sample_shuffle_indices", full_disk)
    with pytest.raises(DataError, match="cannot write the index cache .No space left on device."):
        opened()
    assert list((source.parent / "cache").iterdir()) == []


def test_cache_in_an_impossible_folder_is_refused(opened, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the index cache .*set data\.path_to_cache"):
        opened("--data.path_to_cache", str(tmp_path / "file" / "cache"))


# --- what is refused ------------------------------------------------------------------------------------------


def describe(source: Path, tokenizer: Tokenizer, sha256: str) -> None:
    """Put a manifest beside the data."""
    record = TokenizerRecord(sha256=sha256, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, folder="elsewhere")
    sizes = {f"{end}_bytes": source.with_suffix(f".{end}").stat().st_size for end in ("bin", "idx")}
    write_manifest(
        source,
        Manifest(
            tokenizer=record,
            options={},
            inputs=(),
            documents=200,
            tokens=sum(document_lengths(1)),
            empty_documents=0,
            skipped_documents=0,
            dtype="int32",
            **sizes,
        ),
    )


def test_data_of_another_tokenizer_is_refused(opened, source, tiny_config):
    tokenizer = Tokenizer.load(tiny_config().data.tokenizer)
    describe(source, tokenizer, "ab" * 32)
    with pytest.raises(DataError) as caught:
        opened()
    message = str(caught.value)
    assert message.startswith(f"{source}: made with another tokenizer")
    assert "sha256 abababababab…" in message and tokenizer.sha256[:12] in message


def test_data_of_the_runs_tokenizer_is_taken(opened, source, tiny_config):
    tokenizer = Tokenizer.load(tiny_config().data.tokenizer)
    describe(source, tokenizer, tokenizer.sha256)
    assert opened().train.size > 0


def test_tokenizer_larger_than_the_model_is_refused(opened):
    with pytest.raises(DataError, match=r"model\.vocab_size \(96\) must cover .* has 97"):
        opened("--model.vocab_size", "96")


def test_data_shorter_than_a_sample_is_refused(opened, source):
    write_positions(source, [5, 6])
    with pytest.raises(DataError, match=r"the training share .* is shorter than one sample .* = 17 tokens"):
        opened("--data.split", "100,0", "--train.eval_interval", "None")


def test_data_of_exactly_one_sample_is_taken(opened, source):
    write_positions(source, [SEQ_LENGTH + 1])
    samples = opened("--data.split", "100,0", "--train.eval_interval", "None").train
    assert contents(samples) == [list(range(SEQ_LENGTH))]


def test_validation_share_shorter_than_a_sample_is_refused(opened, source):
    write_positions(source, [40, 40, 2])
    with pytest.raises(DataError, match=r"the validation share"):
        opened("--data.split", "99,1")


def test_data_without_tokens_is_refused(opened, source):
    write_positions(source, [0, 0])
    with pytest.raises(DataError, match="holds no tokens"):
        opened()


def test_data_cut_short_is_refused(opened, source):
    path = source.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=rf"{path}: holds .* bytes, the index promises"):
        opened()
