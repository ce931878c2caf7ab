"""Windows of a file: every token once a pass, in an order that (seed, k) alone decides.

Each token of the data here is its own position in the file. So what a sample holds says where it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.config.tree import Config
from megatron_ext.data.blend import DataSplits, Samples, build_samples
from megatron_ext.data.indexed import IndexedFile, IndexedWriter
from megatron_ext.data.split import sequences_of_part
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.windows import Windows
from megatron_ext.errors import DataError

pytestmark = pytest.mark.usefixtures("one_process")
SEQ_LENGTH = 16
LENGTHS = np.random.default_rng(1).integers(1, 50, 200).tolist()
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
WHOLE = ("--data.split", "100,0", "--train.eval_interval", "None")


def write_positions(prefix: Path, lengths: Sequence[int], *, first: int = 0) -> None:
    position = first
    with IndexedWriter(prefix, dtype=np.dtype("<i4")) as writer:
        for length in lengths:
            writer.add_document(np.arange(position, position + length))
            position += length
        writer.publish()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Prefix of a file of 200 documents."""
    prefix = tmp_path / "data" / "source"
    prefix.parent.mkdir()
    write_positions(prefix, LENGTHS)
    return prefix


@pytest.fixture
def opened(tiny_config: Callable[..., Config], source: Path) -> Callable[..., DataSplits]:
    """Open `source`, or other prefixes, as a lazy run does."""

    def build(*overrides: str, prefixes: Sequence[Path] = (source,), sample_index: str = "lazy") -> DataSplits:
        words = ("--data.sample_index", sample_index, "--data.train_data", *map(str, prefixes))
        config = tiny_config(*words, *overrides)
        return build_samples(config, Tokenizer.load(config.data.tokenizer))

    return build


def windows(
    prefix: Path, *, part: int = 0, shares: Sequence[float] = (1.0,), masked_input: int | None = None
) -> Windows:
    file = IndexedFile.open(prefix)
    return Windows(file, part=part, shares=shares, seq_length=SEQ_LENGTH, masked_input=masked_input)


def labels(samples: Samples, number: int | None = None, *, first: int = 0) -> list[list[int]]:
    """Labels of some samples (default: of one pass)."""
    count = samples.size if number is None else number
    return [samples[first + k].labels.tolist() for k in range(count)]


def flat(rows: Sequence[Sequence[int]]) -> list[int]:
    return [token for row in rows for token in row]


def positions_of_part(part: int, shares: Sequence[float]) -> list[int]:
    """Positions of a part's tokens in file order, by the split of single documents (200 are too few for blocks)."""
    documents = sequences_of_part(np.arange(201), part, shares)
    return [position for d in documents for position in range(int(STARTS[d]), int(STARTS[d + 1]))]


# --- what a pass holds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 1])
def test_pass_has_each_position_of_the_part_once_as_label_but_the_remainder(opened, part):
    samples = opened("--data.split", "70,30")[part]
    positions = positions_of_part(part, (70.0, 30.0))
    count = (len(positions) - 1) // SEQ_LENGTH * SEQ_LENGTH
    assert sorted(flat(labels(samples))) == positions[1 : count + 1]


def test_pass_leaves_out_less_than_one_sample(opened):
    assert sum(LENGTHS) - 1 - len(flat(labels(opened(*WHOLE).train))) < SEQ_LENGTH


def test_later_pass_has_the_same_positions_in_another_order(opened):
    samples = opened(*WHOLE).train
    first, second = (labels(samples, first=n * samples.size) for n in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_training_and_validation_share_no_document(opened):
    splits = opened("--data.split", "70,30")
    train, valid = (
        {int(np.searchsorted(STARTS, p, side="right")) for p in flat(labels(samples))} for samples in splits
    )
    assert train.isdisjoint(valid)


def test_sample_of_a_whole_file_is_consecutive(opened):
    samples = opened(*WHOLE).train
    for k in range(samples.size):
        start = int(samples[k].tokens[0])
        assert samples[k].tokens.tolist() == list(range(start, start + SEQ_LENGTH))
        assert start % SEQ_LENGTH == 0


def test_labels_are_the_next_tokens(opened):
    samples = opened("--data.split", "70,30").train
    for k in range(samples.size):
        assert samples[k].labels[:-1].tolist() == samples[k].tokens[1:].tolist()


def test_first_pass_is_shuffled(opened):
    starts = [row[0] for row in labels(opened(*WHOLE).train)]
    assert sum(later - earlier == SEQ_LENGTH for earlier, later in pairwise(starts)) < 10


def test_documents_of_several_sequences_stay_together_and_whole(opened, tmp_path):
    prefix = tmp_path / "several"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    position, owners = 0, []
    for document in range(100):
        lengths = [3, 8, 5][: document % 3 + 1]
        builder.add_document(np.arange(position, position + sum(lengths)), lengths)
        position += sum(lengths)
        owners += [document] * sum(lengths)
    builder.finalize(f"{prefix}.idx")
    found = [flat(labels(samples)) for samples in opened("--data.split", "1,1", prefixes=[prefix])]
    train, valid = ({owners[p] for p in part} for part in found)
    assert train.isdisjoint(valid)
    assert position - sum(map(len, found)) <= 2 * SEQ_LENGTH


def test_file_of_16_bit_ids_gives_64_bit_tokens(tmp_path):
    with IndexedWriter(tmp_path / "a", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.arange(65_000, 65_000 + SEQ_LENGTH + 1))
        writer.publish()
    sample = windows(tmp_path / "a")[0]
    assert sample.tokens.tolist() == list(range(65_000, 65_000 + SEQ_LENGTH))
    assert str(sample.tokens.dtype) == str(sample.labels.dtype) == "torch.int64"


def test_window_may_join_more_than_two_stretches(tmp_path):
    # Documents of two tokens, every other one of this part: a window of 17 tokens takes from nine of them.
    write_positions(tmp_path / "a", [2] * 100)
    part = windows(tmp_path / "a", shares=(1.0, 1.0))
    documents = sequences_of_part(np.arange(101), 0, (1.0, 1.0))
    expected = [position for d in documents for position in (2 * d, 2 * d + 1)]
    assert flat([part[k].tokens.tolist() for k in range(len(part))]) == expected[: len(part) * SEQ_LENGTH]


@pytest.mark.parametrize(("tokens", "count"), [(16, 0), (17, 1), (32, 1), (33, 2)])
def test_number_of_windows_counts_their_shared_ends_once(tmp_path, tokens, count):
    write_positions(tmp_path / "a", [tokens])
    assert len(windows(tmp_path / "a")) == count


# --- what decides the order -----------------------------------------------------------------------------------


def test_order_does_not_depend_on_the_length_of_the_run(opened):
    short, long = (opened("--train.train_iters", number).train for number in ("5", "5000"))
    assert labels(short, 300) == labels(long, 300)


def test_order_does_not_depend_on_what_was_read_before(opened):
    samples = opened().train
    backwards = [samples[k].labels.tolist() for k in reversed(range(300))]
    assert backwards[::-1] == labels(opened().train, 300)


def test_order_does_not_depend_on_where_the_data_lies(opened, source, tmp_path):
    moved = tmp_path / "moved"
    for ending in (".bin", ".idx"):
        moved.with_suffix(ending).write_bytes(source.with_suffix(ending).read_bytes())
    assert labels(opened(prefixes=[moved]).train, 300) == labels(opened().train, 300)


def test_order_of_another_seed_is_another(opened):
    first, second = (labels(opened("--train.seed", seed).train) for seed in ("1", "2"))
    assert first != second


def test_two_sources_are_read_once_each_in_a_pass(opened, source):
    other = source.with_name("other")
    write_positions(other, LENGTHS[:90], first=1_000_000)
    found = flat(labels(opened(*WHOLE, prefixes=[source, other]).train))
    assert len(found) == len(set(found))
    assert (
        len(found) == (sum(LENGTHS) - 1) // SEQ_LENGTH * SEQ_LENGTH + (sum(LENGTHS[:90]) - 1) // SEQ_LENGTH * SEQ_LENGTH
    )


# --- masks, files, refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "counts"), [("False", True), ("True", False)])
def test_end_of_document_as_input_counts_unless_it_is_masked(option, counts, opened):
    samples = opened("--data.eod_mask_loss", option, *WHOLE).train
    (row,) = (samples[k] for k in range(samples.size) if 2 in samples[k].tokens.tolist())  # 2 is the tiny </s>
    assert row.loss_mask[row.tokens == 2].tolist() == [float(counts)]
    assert row.loss_mask.sum() == SEQ_LENGTH - (not counts)


@pytest.mark.parametrize("option", ["False", "True"])
def test_masks_are_those_of_gpt_dataset_for_the_same_tokens(option, opened):
    settings = (*WHOLE, "--data.eod_mask_loss", option)
    for samples in (opened(*settings).train, opened(*settings, sample_index="gpt_dataset").train):
        for k in range(samples.size):
            expected = [0.0 if option == "True" and token == 2 else 1.0 for token in samples[k].tokens.tolist()]
            assert samples[k].loss_mask.tolist() == expected


def test_nothing_is_written_beside_the_data(opened, source):
    opened()
    assert sorted(path.name for path in source.parent.iterdir()) == ["source.bin", "source.idx"]


def test_data_shorter_than_a_sample_is_refused(opened, source):
    write_positions(source, [5, 11])
    with pytest.raises(DataError, match=r"the training share .16 tokens. is shorter than one sample .* = 17 tokens"):
        opened(*WHOLE)


def test_validation_share_shorter_than_a_sample_is_refused(opened, source):
    write_positions(source, [40, 40, 2])
    with pytest.raises(DataError, match=r"the validation share"):
        opened("--data.split", "99,1")


def test_data_cut_short_is_refused(opened, source):
    path = source.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=rf"{path}: holds .* bytes, the index promises"):
        opened()


def test_empty_documents_are_passed_over(opened, source):
    write_positions(source, [0, 40, 0, 0, 30, 0])
    assert sorted(flat(labels(opened(*WHOLE).train))) == list(range(1, 65))
    train, valid = (flat(labels(samples)) for samples in opened("--data.split", "1,1"))
    assert {token < 40 for token in train} | {token < 40 for token in valid} == {True, False}
    assert len({token < 40 for token in train}) == len({token < 40 for token in valid}) == 1


def test_index_whose_pointers_do_not_rise_is_refused(opened, source):
    index = source.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    pointers = np.frombuffer(content, dtype="<i8", count=200, offset=34 + 4 * 200)
    pointers[1:-1] = 4 * sum(LENGTHS) + 4
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"source\.idx: documents do not lie in \.bin one after another"):
        opened("--data.split", "1,1")
