"""tools/sample_corpus.py: what becomes a document, what is held out, and that it is the same each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import sample_corpus

PROSE = "This module explains at some length what it is for, so that a reader may learn from it. " * 4
CODE = "def function(argument):\n    return argument + 1\n\n\n" * 10


def python_file(path: Path, docstring: str = PROSE, code: str = CODE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{docstring}"""\n{code}# {path.parent.name} {path.name}\n')


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """Forty modules with their tests."""
    root = tmp_path / "lib"
    for number in range(40):
        python_file(root / f"package{number}" / f"module{number}.py", f"{PROSE} {number}")
    python_file(root / "test" / "data.py", f"{PROSE} of a test")
    return root


def sample(root: Path, output: Path, *options: str) -> int:
    return sample_corpus.main(["--root", str(root), "--output-dir", str(output), *options])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_all(output: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: read(path) for path in output.iterdir()}


def test_sample_writes_four_files(installation: Path, tmp_path: Path) -> None:
    assert sample(installation, tmp_path / "out") == 0
    names = {"prose.train.jsonl", "prose.valid.jsonl", "code.train.jsonl", "code.valid.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_sample_record_has_id_text_and_source(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0")
    records = {record["id"]: record for record in read(tmp_path / "out" / "code.train.jsonl")}
    name = "lib/package7/module7.py"
    text = (installation / "package7" / "module7.py").read_text()
    assert records[name] == {"id": name, "text": text, "source": "code"}


def test_sample_twice_gives_the_same_bytes(installation: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        sample(installation, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_sample_ids_are_unique(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out")
    ids = [record["id"] for records in read_all(tmp_path / "out").values() for record in records]
    assert len(ids) == len(set(ids)) == 82


def test_sample_equal_texts_appear_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = tmp_path / "lib" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(CODE)
    sample(tmp_path / "lib", tmp_path / "out", "--valid-fraction", "0")
    assert len(read(tmp_path / "out" / "code.train.jsonl")) == 1


def test_sample_valid_fraction_holds_out_about_that_much(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0.5")
    assert 10 <= len(read(tmp_path / "out" / "code.valid.jsonl")) <= 30


def test_sample_valid_fraction_zero_holds_out_nothing(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0")
    assert read(tmp_path / "out" / "code.valid.jsonl") == []


def test_sample_code_and_prose_of_a_file_are_held_out_together(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0.5")
    held_out = read_all(tmp_path / "out")
    code = {record["id"] for record in held_out["code.valid.jsonl"]}
    prose = {record["id"].removesuffix("#prose") for record in held_out["prose.valid.jsonl"]}
    assert code == prose


def test_family_copy_in_another_package_is_the_same() -> None:
    assert sample_corpus.family("packages/pip/_vendor/rich/text.py") == sample_corpus.family("packages/rich/text.py")


def test_sample_max_mb_limits_each_source(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--max-mb", "0.005", "--valid-fraction", "0")
    for name in ("code.train.jsonl", "prose.train.jsonl"):
        size = sum(len(record["text"].encode()) for record in read(tmp_path / "out" / name))
        assert 4000 < size <= 5000


def test_sample_tests_come_last(installation: Path, tmp_path: Path) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0")
    assert read(tmp_path / "out" / "code.train.jsonl")[-1]["id"] == "lib/test/data.py"


def test_sample_counts_are_printed(installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample(installation, tmp_path / "out", "--valid-fraction", "0")
    size = sum(len(record["text"].encode()) for record in read(tmp_path / "out" / "code.train.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'out' / 'code.train.jsonl'}: 41 documents, {size:,} bytes of text" in lines


def test_sample_docs_and_descriptions_are_prose(tmp_path: Path) -> None:
    info = tmp_path / "lib" / "package-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: package\nVersion: 1.0\n\n{PROSE}description\n")
    (info / "LICENSE.txt").write_text(f"{PROSE}licence")
    (tmp_path / "lib" / "guide.rst").write_text(f"{PROSE}guide")
    (tmp_path / "lib" / "table.txt").write_text("12, 13, 14\n" * 100)
    sample(tmp_path / "lib", tmp_path / "out", "--valid-fraction", "0")
    records = read(tmp_path / "out" / "prose.train.jsonl")
    assert {record["id"].rpartition("/")[2] for record in records} == {"METADATA", "guide.rst"}
    assert not any("Version" in record["text"] for record in records)


def test_sample_language_reference_is_prose_by_topic(tmp_path: Path) -> None:
    folder = tmp_path / "lib" / "pydoc_data"
    folder.mkdir(parents=True)
    (folder / "topics.py").write_text(f"topics = {{'assert': {PROSE + 'one'!r}, 'while': {PROSE + 'two'!r}}}\n")
    sample(tmp_path / "lib", tmp_path / "out", "--valid-fraction", "0")
    ids = [record["id"] for record in read(tmp_path / "out" / "prose.train.jsonl")]
    assert ids == ["lib/pydoc_data/topics.py#assert", "lib/pydoc_data/topics.py#while"]
    assert read(tmp_path / "out" / "code.train.jsonl") == []


def test_prose_in_code_takes_docstrings_and_long_comments_in_order() -> None:
    text = (
        '"""Module text."""\n'
        "if True:\n"
        "    class A:\n"
        '        """Class text."""\n'
        "        # First line of a comment\n"
        "        # that goes on for\n"
        "        # three lines.\n"
        "        def f(self):\n"
        "            # one line\n"
        '            """Function text."""\n'
        "# x = 1\n# y[2] = 3\n# z += 4\n"
    )
    comment = "First line of a comment\nthat goes on for\nthree lines."
    expected = ["Module text.", "Class text.", comment, "Function text."]
    assert sample_corpus.prose_in_code(text).split("\n\n") == expected


@pytest.mark.parametrize("text", ["def f(:\n", "\0", "(" * 10_000])
def test_prose_in_code_invalid_source_gives_none(text: str) -> None:
    assert sample_corpus.prose_in_code(text) == ""


@pytest.mark.parametrize("content", [b"\xff\xfe latin", b"a\0b", b"x" * 1001, b"x\n" * 200_001])
def test_read_text_what_is_no_text_is_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert sample_corpus.read_text(tmp_path / "file") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--valid-fraction", "1"], "--valid-fraction: is 1.0, must be at least 0 and below 1"),
        (["--max-mb", "0"], "--max-mb: is 0.0, must be above 0"),
        (["--root", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_sample_wrong_option_is_refused(
    installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert sample(installation, tmp_path / "out", *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_sample_folder_without_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert sample(tmp_path / "empty", tmp_path / "out") == 2
    assert "hold no text" in capsys.readouterr().err


def test_sample_of_this_installation_has_enough_of_both_sources(tmp_path: Path) -> None:
    """Ten megabytes together, as the first run needs; the standard library and our requirements have them."""
    assert sample_corpus.main(["--output-dir", str(tmp_path), "--max-mb", "5.2"]) == 0
    sizes = {source: 0 for source in ("prose", "code")}
    for records in read_all(tmp_path).values():
        for record in records:
            sizes[record["source"]] += len(record["text"].encode())
    assert min(sizes.values()) > 5_000_000
