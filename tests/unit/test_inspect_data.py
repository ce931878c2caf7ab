"""tools/inspect_data.py: what it shows, and that --verify finds every kind of damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedFile, IndexedWriter, token_dtype
from megatron_ext.data.manifest import manifest_path
from tests.unit.small_tokenizer import build_small_tokenizer
from tools import inspect_data, preprocess_data

TEXTS = ["The bake.", "", "mino said ü", "one two three four", "x"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prefix(tokenizer: Path, tmp_path: Path) -> Path:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["--input", str(corpus), "--output-prefix", str(tmp_path / "c"), "--append-eod"]
    assert preprocess_data.main([*arguments, "--tokenizer", str(tokenizer)]) == 0
    return tmp_path / "c_text_document"


Show = Callable[..., tuple[int, str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Run the tool: (exit status, what it printed)."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = inspect_data.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_inspect_shows_header_and_counts(prefix: Path, show: Show) -> None:
    file = IndexedFile.open(prefix)
    status, text = show(prefix)
    assert status == 0
    assert f"uint16, {file.tokens.size:,} tokens, {file.bin_bytes:,} bytes (.bin)" in text
    assert f"4 sequences, {file.idx_bytes:,} bytes (.idx)" in text
    assert "documents   5, of them 1 empty" in text


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_inspect_takes_the_prefix_with_or_without_ending(prefix: Path, show: Show, ending: str) -> None:
    assert show(f"{prefix}{ending}")[0] == 0


def test_inspect_sample_decodes_the_text(tokenizer: Path, prefix: Path, show: Show) -> None:
    _, text = show(prefix, "--tokenizer", tokenizer, "--seq-length", 1000)
    assert "| The bake.<|im_end|> mino said ü<|im_end|> one two three four<|im_end|> x" in text


def test_inspect_masked_positions_are_those_whose_input_ends_a_document(
    tokenizer: Path,
    prefix: Path,
    show: Show,
) -> None:
    tokens = IndexedFile.open(prefix).tokens.tolist()
    _, text = show(prefix, "--tokenizer", tokenizer, "--seq-length", 1000, "--eod-mask-loss")
    masked = [line for line in text.splitlines() if "masked:" in line]
    # The last token is a label only.
    expected = [position for position, token in enumerate(tokens[:-1]) if token == 2]
    assert [int(line.split("position ")[1].split(",")[0]) for line in masked] == expected
    assert all("2 '<|im_end|>' -> " in line for line in masked)
    assert f"{len(tokens) - 1 - 3} of {len(tokens) - 1} positions count in the loss" in text


def test_inspect_without_the_option_masks_nothing(tokenizer: Path, prefix: Path, show: Show) -> None:
    assert "masked" not in show(prefix, "--tokenizer", tokenizer, "--seq-length", 1000)[1]


def test_inspect_eod_mask_without_tokenizer_uses_the_manifest(prefix: Path, show: Show) -> None:
    assert "masked: position" in show(prefix, "--seq-length", 1000, "--eod-mask-loss")[1]


def test_inspect_eod_mask_without_tokenizer_and_manifest_is_refused(prefix: Path, show: Show) -> None:
    manifest_path(prefix).unlink()
    status, text = show(prefix, "--eod-mask-loss")
    assert (status, "give --tokenizer" in text) == (2, True)


def test_inspect_other_tokenizer_is_refused(prefix: Path, tokenizer: Path, tmp_path: Path, show: Show) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in tokenizer.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes() + b"\n")
    status, text = show(prefix, "--tokenizer", other)
    assert (status, "is not the one that the data was made with" in text) == (2, True)


def test_take_samples_spreads_windows_with_labels_one_further(prefix: Path) -> None:
    file = IndexedFile.open(prefix)
    samples = list(inspect_data.take_samples(file, seq_length=4, samples=3, masked_input=None))
    tokens = file.tokens.tolist()
    whole = (len(tokens) - 1) // 4
    assert [sample.start for sample in samples] == [number * whole // 3 * 4 for number in range(3)]
    for sample in samples:
        assert sample.inputs.tolist() == tokens[sample.start : sample.start + 4]
        assert sample.labels.tolist() == tokens[sample.start + 1 : sample.start + 5]


def test_take_samples_short_file_gives_one_short_sample(prefix: Path) -> None:
    file = IndexedFile.open(prefix)
    samples = list(inspect_data.take_samples(file, seq_length=1000, samples=3, masked_input=None))
    assert [sample.inputs.size for sample in samples] == [file.tokens.size - 1]


def write_documents(prefix: Path, lengths: Sequence[int]) -> IndexedFile:
    with IndexedWriter(prefix, dtype=token_dtype(1000)) as writer:
        for length in lengths:
            writer.add_document([7] * length)
        writer.publish()
    return IndexedFile.open(prefix)


def test_measure_lengths_puts_them_into_powers_of_two(tmp_path: Path) -> None:
    found = inspect_data.measure_lengths(write_documents(tmp_path / "a", [0, 1, 2, 3, 4, 7, 8, 8]))
    assert found == (1, 8, [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 2)])


def test_measure_lengths_keeps_gaps_but_not_what_is_before_and_after(tmp_path: Path) -> None:
    found = inspect_data.measure_lengths(write_documents(tmp_path / "a", [2, 8, 9]))
    assert found == (0, 9, [(2, 3, 1), (4, 7, 0), (8, 15, 2)])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_measure_lengths_small_blocks_give_the_same(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_documents(tmp_path / "a", [0, 1, 2, 3, 4, 7, 8])
    whole = inspect_data.measure_lengths(file)
    monkeypatch.setattr(inspect_data, "BLOCK", block)
    assert inspect_data.measure_lengths(file) == whole


def test_measure_lengths_adds_up_the_sequences_of_a_document(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4]), [1, 3])
    builder.add_document(torch.tensor([5, 6]), [2])
    builder.finalize(str(tmp_path / "a.idx"))
    found = inspect_data.measure_lengths(IndexedFile.open(tmp_path / "a"))
    assert found == (0, 4, [(2, 3, 1), (4, 7, 1)])


def test_histogram_bars_are_as_long_as_their_share(tmp_path: Path) -> None:
    buckets = [inspect_data.Bucket(1, 1, 5), inspect_data.Bucket(2, 3, 0), inspect_data.Bucket(4, 7, 10)]
    lines = list(inspect_data.histogram(buckets))
    assert [line.count("#") for line in lines[1:]] == [20, 0, 40]


def test_histogram_no_documents_is_empty() -> None:
    assert len(list(inspect_data.histogram([]))) == 1


def test_inspect_empty_data_shows_no_sample(tmp_path: Path, show: Show) -> None:
    write_documents(tmp_path / "a", [])
    assert show(tmp_path / "a", "--verify")[0] == 0
    status, text = show(tmp_path / "a")
    assert (status, "sample 0" in text) == (0, False)


def test_verify_sound_pair_exits_with_zero(prefix: Path, show: Show) -> None:
    status, text = show(prefix, "--verify")
    assert (status, "no fault" in text) == (0, True)


@pytest.mark.parametrize("field", ["documents", "tokens", "empty_documents", "bin_bytes", "idx_bytes"])
def test_verify_manifest_with_another_count_is_a_fault(prefix: Path, show: Show, field: str) -> None:
    content = json.loads(manifest_path(prefix).read_text())
    content[field] += 1
    manifest_path(prefix).write_text(json.dumps(content))
    status, text = show(prefix, "--verify")
    assert (status, f"fault: {field}: is {content[field] - 1}, the manifest says" in text) == (2, True)


def change(path: Path, offset: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:offset] + content + old[offset + len(content) :])


def test_verify_id_outside_the_vocabulary_names_the_first_place(prefix: Path, show: Show) -> None:
    """The third document (number 2, the second sequence) gets two ids too large; the second of them is not named."""
    first = len(IndexedFile.open(prefix).document(0))
    change(Path(f"{prefix}.bin"), 2 * (first + 1), struct.pack("<HH", 1024, 1025))
    status, text = show(prefix, "--verify")
    place = f"token {first + 1} (byte {2 * first + 2}, sequence 1, document 2)"
    assert (status, f"{place}: id is 1024, must be from 0 to 1023 (and 1 more)." in text) == (2, True)


def test_verify_without_manifest_and_tokenizer_says_that_ids_are_not_checked(prefix: Path, show: Show) -> None:
    change(Path(f"{prefix}.bin"), 0, struct.pack("<H", 1024))
    manifest_path(prefix).unlink()
    status, text = show(prefix, "--verify")
    assert (status, "ids are not checked against it; give --tokenizer" in text) == (0, True)


# Offsets for four sequences and five documents: lengths from 34, pointers from 50, document index from 82.
@pytest.mark.parametrize(
    ("offset", "content", "fault"),
    [
        (38, struct.pack("<i", -1), "sequence 1: its length is -1, must be at least 1."),
        (38, struct.pack("<ii", 0, 0), "sequence 1: its length is 0, must be at least 1 (and 1 more)."),
        (50, struct.pack("<q", 2), "sequence 0: its pointer is 2, must be 0, where"),
        (58, struct.pack("<q", 3), "sequence 1: its pointer is 3, must be"),
        (82, struct.pack("<q", 1), "document 0: begins at sequence 1, must begin at 0."),
        (98, struct.pack("<q", 4), "document 2: ends at sequence 2, before it begins (4)."),
        (98, struct.pack("<q", 0), "document 1: ends at sequence 0, before it begins (1)."),
        (122, struct.pack("<q", 5), "document index: ends at sequence 5, must end at 4, the number of sequences."),
    ],
)
def test_verify_damaged_index_names_the_first_bad_place(
    prefix: Path, show: Show, offset: int, content: bytes, fault: str
) -> None:
    change(Path(f"{prefix}.idx"), offset, content)
    status, text = show(prefix, "--verify")
    assert (status, f"fault: {prefix}.idx: {fault}" in text) == (2, True), text


def test_inspect_damaged_index_is_refused(prefix: Path, show: Show) -> None:
    change(Path(f"{prefix}.idx"), 98, struct.pack("<q", 0))
    status, text = show(prefix)
    assert (status, text.startswith(f"error: {prefix}.idx: document 1"), text.count("\n")) == (2, True, 1)


def test_inspect_json_holds_what_the_files_hold(prefix: Path, show: Show) -> None:
    file = IndexedFile.open(prefix)
    status, text = show(prefix, "--json", "--samples", "1", "--seq-length", "4")
    record = json.loads(text)
    assert (status, record["documents"], record["sequences"], record["empty_documents"]) == (0, 5, 4, 1)
    assert (record["dtype"], record["tokens"], record["bin_bytes"]) == ("uint16", file.tokens.size, file.bin_bytes)
    assert sum(bucket[2] for bucket in record["lengths"]) == 5
    assert record["manifest"]["documents"] == 5
    assert record["samples"] == [{"start": 0, "ids": file.tokens[:4].tolist(), "text": None, "masked": []}]


def test_verify_json_lists_faults(prefix: Path, show: Show) -> None:
    change(Path(f"{prefix}.idx"), 98, struct.pack("<q", 0))
    status, text = show(prefix, "--verify", "--json")
    record = json.loads(text)
    assert (status, len(record["faults"]), record["lengths"]) == (2, 1, None)


def test_verify_json_sound_pair_has_no_fault(prefix: Path, show: Show) -> None:
    status, text = show(prefix, "--verify", "--json")
    assert (status, json.loads(text)["faults"]) == (0, [])


def test_verify_truncated_bin_is_refused(prefix: Path, show: Show) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    status, text = show(prefix, "--verify")
    assert (status, text.startswith(f"error: {path}: holds"), text.count("\n")) == (2, True, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-length", "0"], "--seq-length: is 0, must be greater"),
        (["--samples", "-1"], "--samples: is -1, must be greater"),
    ],
)
def test_inspect_wrong_option_is_refused(prefix: Path, show: Show, options: list[str], message: str) -> None:
    status, text = show(prefix, *options)
    assert (status, text.startswith(f"error: {message}")) == (2, True)


def test_inspect_missing_pair_is_refused(tmp_path: Path, show: Show) -> None:
    status, text = show(tmp_path / "nowhere")
    assert (status, "nowhere.bin: no such file" in text) == (2, True)
