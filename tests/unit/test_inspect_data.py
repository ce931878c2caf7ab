"""tools/inspect_data.py: what it shows, and that --verify finds every kind of damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedFile
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


def test_histogram_puts_lengths_into_powers_of_two() -> None:
    lines = list(inspect_data.histogram(np.array([0, 1, 2, 3, 4, 7, 8, 8])))
    counts = [tuple(int(word) for word in line.replace("-", " ").split()[:3]) for line in lines[1:]]
    assert counts == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 2), (8, 15, 2)]


def test_histogram_no_documents_is_empty() -> None:
    assert len(list(inspect_data.histogram(np.zeros(0, dtype=np.int64)))) == 1


def test_inspect_empty_data_shows_no_sample(tokenizer: Path, tmp_path: Path, show: Show) -> None:
    (tmp_path / "c.jsonl").touch()
    arguments = ["--input", str(tmp_path / "c.jsonl"), "--output-prefix", str(tmp_path / "c")]
    preprocess_data.main([*arguments, "--tokenizer", str(tokenizer)])
    assert show(tmp_path / "c_text_document", "--verify")[0] == 0
    status, text = show(tmp_path / "c_text_document")
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


def test_verify_id_outside_the_vocabulary_is_a_fault(prefix: Path, show: Show) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(struct.pack("<H", 1024) + path.read_bytes()[2:])
    status, text = show(prefix, "--verify")
    assert (status, "fault: ids: the highest is 1024, the vocabulary ends at 1023." in text) == (2, True)


def test_verify_wrong_pointer_is_a_fault(prefix: Path, show: Show) -> None:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[34 + 4 * 4 + 8] ^= 2  # the second of four sequence pointers
    path.write_bytes(content)
    status, text = show(prefix, "--verify")
    assert (status, "fault: sequence pointers: 1 are not where" in text) == (2, True)


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
