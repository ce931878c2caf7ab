"""tools/merge_datasets.py against megatron-core's own merging, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedFile, IndexedTotals, IndexedWriter, token_dtype
from megatron_ext.data.manifest import (
    InputRecord,
    Manifest,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from tools import merge_datasets

TOOL = Path(merge_datasets.__file__)
TOKENIZER = TokenizerRecord(sha256="ab" * 32, vocab_size=1000, eod=2, folder="tokenizers/t")

Document = Sequence[Sequence[int]]
"""Sequences of ids; none for an empty document."""


def write_pair(prefix: Path, documents: Sequence[Document], *, vocab_size: int = 1000) -> Path:
    """Write a pair with megatron-core's builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        ids = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def add_manifest(prefix: Path, *, options: dict[str, object] | None = None, source: str = "a.jsonl") -> Manifest:
    """Give a pair a manifest that fits it."""
    file = IndexedFile.open(prefix)
    manifest = Manifest(
        tokenizer=TOKENIZER,
        options={"json_key": "text", "append_eod": True} if options is None else options,
        inputs=(InputRecord(path=source, size=10, sha256="cd" * 32),),
        documents=file.num_documents,
        tokens=file.tokens.size,
        empty_documents=int((file.document_lengths() == 0).sum()),
        skipped_documents=1,
        dtype=file.dtype.name,
        bin_bytes=file.bin_bytes,
        idx_bytes=file.idx_bytes,
    )
    write_manifest(prefix, manifest)
    return manifest


FIRST: list[Document] = [[[5, 6, 7]], [], [[8], [9, 10]], []]
SECOND: list[Document] = [[], [[11]], [[12, 13], [14], [15]]]
THIRD: list[Document] = [[[16, 17]]]


@pytest.fixture
def pairs(tmp_path: Path) -> list[Path]:
    names = ("c", "a", "b")
    return [write_pair(tmp_path / "in" / name, made) for name, made in zip(names, (FIRST, SECOND, THIRD), strict=True)]


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Merge into `out`: (exit status, what was printed)."""

    def merge(*inputs: Path, output: Path = tmp_path / "out") -> tuple[int, str]:
        capsys.readouterr()
        status = merge_datasets.main(["--input", *map(str, inputs), "--output-prefix", str(output)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return merge


def pair_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def megatrons_merge(prefixes: Sequence[Path], target: Path) -> tuple[bytes, bytes]:
    """Merge as Megatron-LM's tools/merge_datasets.py does: a builder, add_index for each, finalize."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    code = Path(f"{prefixes[0]}.idx").read_bytes()[17]
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=DType.dtype_from_code(code))
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{target}.idx")
    return pair_bytes(target)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1]])
def test_merge_bytes_equal_megatrons(pairs: list[Path], tmp_path: Path, run: Run, order: list[int]) -> None:
    chosen = [pairs[number] for number in order]
    assert run(*chosen)[0] == 0
    assert pair_bytes(tmp_path / "out") == megatrons_merge(chosen, tmp_path / "theirs")


@pytest.mark.parametrize("block", [1, 2, 3])
def test_merge_small_blocks_give_the_same_bytes(
    pairs: list[Path], tmp_path: Path, run: Run, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_datasets, "BLOCK", block)
    run(*pairs)
    assert pair_bytes(tmp_path / "out") == megatrons_merge(pairs, tmp_path / "theirs")


def test_merge_int32_bytes_equal_megatrons(tmp_path: Path, run: Run) -> None:
    chosen = [write_pair(tmp_path / name, FIRST, vocab_size=70000) for name in "xy"]
    assert run(*chosen)[0] == 0
    assert pair_bytes(tmp_path / "out") == megatrons_merge(chosen, tmp_path / "theirs")


def test_merge_pair_without_documents_adds_none(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    with IndexedWriter(tmp_path / "none", dtype=token_dtype(1000)) as writer:
        writer.publish()
    chosen = [tmp_path / "none", pairs[0], tmp_path / "none2"]
    write_pair(chosen[2], [[], []])
    assert run(*chosen)[0] == 0
    assert pair_bytes(tmp_path / "out") == megatrons_merge(chosen, tmp_path / "theirs")


def test_merge_folder_takes_its_pairs_sorted_by_name(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    assert run(tmp_path / "in")[0] == 0
    assert pair_bytes(tmp_path / "out") == megatrons_merge(sorted(pairs), tmp_path / "theirs")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_merge_takes_a_pair_with_its_ending(pairs: list[Path], tmp_path: Path, run: Run, ending: str) -> None:
    assert run(Path(f"{pairs[0]}{ending}"), pairs[1])[0] == 0
    assert pair_bytes(tmp_path / "out") == megatrons_merge(pairs[:2], tmp_path / "theirs")


def test_merge_prefix_with_a_dot_is_not_cut(tmp_path: Path, run: Run) -> None:
    prefix = write_pair(tmp_path / "v1.5_text", FIRST)
    assert run(prefix)[0] == 0
    assert pair_bytes(tmp_path / "out") == pair_bytes(prefix)


def test_merge_manifest_adds_up(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    made = [add_manifest(prefix, source=f"{prefix.name}.jsonl") for prefix in pairs]
    status, text = run(*pairs)
    found = read_manifest(tmp_path / "out")
    assert (status, "note:" in text) == (0, False)
    file = IndexedFile.open(tmp_path / "out")
    totals = IndexedTotals(
        documents=8, tokens=13, empty_documents=3, bin_bytes=file.bin_bytes, idx_bytes=file.idx_bytes
    )
    inputs = tuple(manifest.inputs[0] for manifest in made)
    assert found == replace(made[0], inputs=inputs, skipped_documents=3, **totals._asdict())


def test_merge_manifest_names_an_input_once(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    made = [add_manifest(prefix) for prefix in pairs]
    run(*pairs)
    found = read_manifest(tmp_path / "out")
    assert found and found.inputs == made[0].inputs


def test_merge_different_options_are_said_and_kept(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    add_manifest(pairs[0], options={"json_key": "text", "append_eod": True})
    add_manifest(pairs[1], options={"json_key": "title", "append_eod": True})
    status, text = run(*pairs[:2])
    found = read_manifest(tmp_path / "out")
    assert (status, "note: the inputs differ in json_key: text, title." in text) == (0, True)
    assert found and found.options == {"json_key": ["text", "title"], "append_eod": True}


def test_merge_absent_manifest_is_said_and_none_is_written(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    add_manifest(pairs[0])
    status, text = run(*pairs[:2])
    assert (status, f"note: {pairs[1]} has no manifest" in text) == (0, True)
    assert "the output gets no manifest" in text and not manifest_path(tmp_path / "out").exists()


def refused(run: Run, *inputs: Path, message: str, output: Path) -> None:
    """Expect one line of error, perhaps after notes, and no output."""
    before = set(output.parent.iterdir())
    status, text = run(*inputs, output=output)
    *notes, error = text.splitlines()
    assert (status, error.startswith("error: "), all(note.startswith("note: ") for note in notes)) == (2, True, True)
    assert message in error
    assert set(output.parent.iterdir()) == before


def test_merge_different_types_are_refused(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    wide = write_pair(tmp_path / "wide", FIRST, vocab_size=70000)
    refused(run, pairs[0], wide, message=f"{wide}: ids are int32, those of", output=tmp_path / "out")


@pytest.mark.parametrize("change", [{"sha256": "ef" * 32}, {"eod": 0}])
def test_merge_different_tokenizers_are_refused(
    pairs: list[Path], tmp_path: Path, run: Run, change: dict[str, object]
) -> None:
    for prefix in pairs:
        manifest = add_manifest(prefix)
    write_manifest(pairs[2], replace(manifest, tokenizer=replace(TOKENIZER, **change)))
    refused(run, *pairs, message=f"{pairs[2]}: was made with another tokenizer", output=tmp_path / "out")


def test_merge_manifest_of_other_data_is_refused(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    write_manifest(pairs[0], replace(add_manifest(pairs[0]), documents=5))
    message = f"{pairs[0]}: holds documents 4, its manifest says 5"
    refused(run, *pairs, message=message, output=tmp_path / "out")


def test_merge_damaged_index_is_refused(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    index = Path(f"{pairs[1]}.idx")
    content = bytearray(index.read_bytes())
    content[-16] ^= 7  # the last but one document's end
    index.write_bytes(content)
    refused(
        run, *pairs, message=f"{index}: document 2: ends at sequence 4, before it begins (6)", output=tmp_path / "out"
    )


def test_merge_missing_file_is_refused(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    Path(f"{pairs[1]}.bin").unlink()
    refused(run, *pairs, message=f"{pairs[1]}.bin: no such file", output=tmp_path / "out")


def test_merge_output_among_the_inputs_is_refused(pairs: list[Path], run: Run) -> None:
    refused(run, pairs[0].parent, message="is one of the inputs", output=pairs[0])


def test_merge_pair_named_twice_is_refused(pairs: list[Path], tmp_path: Path, run: Run) -> None:
    refused(run, pairs[0].parent, pairs[0], message="is named twice", output=tmp_path / "out")


def test_merge_folder_without_pairs_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    refused(run, tmp_path / "empty", message="the folder holds no .idx file", output=tmp_path / "out")


def test_merge_disk_error_while_writing_leaves_the_earlier_output(
    pairs: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pairs[2])
    before = pair_bytes(tmp_path / "out")
    files = set(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_datasets, "sequences_per_document", full)
    status, text = run(*pairs)
    assert (status, "No space left on device" in text) == (2, True)
    assert (pair_bytes(tmp_path / "out"), set(tmp_path.iterdir())) == (before, files)


def test_merge_many_sequences_survive_a_round_through_megatrons_reader(tmp_path: Path, run: Run) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    generator = np.random.default_rng(0)
    made = [
        [[generator.integers(0, 999, generator.integers(1, 9)).tolist() for _ in range(generator.integers(0, 4))]
         for _ in range(200)]
        for _ in range(3)
    ]  # fmt: skip
    prefixes = [write_pair(tmp_path / f"p{number}", documents) for number, documents in enumerate(made)]
    assert run(*prefixes)[0] == 0
    dataset = IndexedDataset(str(tmp_path / "out"))
    sequences = [sequence for documents in made for document in documents for sequence in document]
    assert [dataset[number].tolist() for number in range(len(dataset))] == sequences
    assert len(dataset.document_indices) == 601


def test_merge_help_runs_as_a_script() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--help"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
