"""megatron_ext/data/manifest.py: written whole, read back equal, damage refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.data.manifest import (
    InputRecord,
    Manifest,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_ext.durable import write_whole
from megatron_ext.errors import DataError

MANIFEST = Manifest(
    tokenizer=TokenizerRecord(sha256="ab" * 32, vocab_size=1024, eod=2, folder="tok"),
    options={"json_key": "text", "append_eod": True, "prepend_bos": False},
    inputs=(InputRecord(path="ä.jsonl", size=10, sha256="cd" * 32),),
    documents=3,
    tokens=20,
    empty_documents=1,
    skipped_documents=0,
    dtype="uint16",
    bin_bytes=40,
    idx_bytes=90,
    encoder="native",
    code="megapints 0.1.0",
)


def test_read_manifest_after_write_gives_the_same(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a_document", MANIFEST)
    assert read_manifest(tmp_path / "a_document") == MANIFEST


def test_read_manifest_of_a_time_before_the_encoder_was_recorded_gives_it_empty(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "a", MANIFEST)
    content = json.loads(path.read_text())
    del content["encoder"], content["code"]
    path.write_text(json.dumps(content))
    manifest = read_manifest(tmp_path / "a")
    assert manifest is not None
    assert (manifest.encoder, manifest.code) == ("", "")


def test_manifest_path_stands_beside_the_pair() -> None:
    assert manifest_path("data/a.b_text_document") == Path("data/a.b_text_document.manifest.json")


def test_read_manifest_missing_file_gives_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path / "a_document") is None


def test_write_manifest_leaves_no_other_file(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["a.manifest.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version is 2, this code reads 1"),
        ({"tokens": "20"}, "'tokens' is '20', must be of type int"),
        ({"documents": True}, "'documents' is True"),
        ({"dtype": None}, "'dtype' is None, must be of type str"),
        ({"options": []}, "'options' is"),
        ({"encoder": 1}, "'encoder' is 1, must be of type str"),
        ({"inputs": {}}, "'inputs' must be a list"),
        ({"inputs": [{"path": "x"}]}, "'size' is None"),
        ({"tokenizer": "tok"}, "TokenizerRecord must be a JSON object"),
    ],
)
def test_read_manifest_wrong_field_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_manifest(tmp_path / "a", MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=r"a\.manifest\.json") as caught:
        read_manifest(tmp_path / "a")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_read_manifest_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    manifest_path(tmp_path / "a").write_text(content)
    with pytest.raises(DataError, match=r"a\.manifest\.json"):
        read_manifest(tmp_path / "a")


def test_write_whole_failing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(self: Path, other: Path) -> Path:
        raise OSError("no rename")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        write_whole(target, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
