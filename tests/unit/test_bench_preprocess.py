"""bench/preprocess.py and its parts: real text is collected alike each time, and the peers write what they should."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from bench import preprocess, real_text
from bench.preprocess_stages import seconds_by_stage
from megatron_ext.data.indexed import IndexedFile
from megatron_ext.errors import DataError
from tests.unit.small_tokenizer import WORDS, build_small_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with text, copies of text, and what is no text."""
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    for number in range(20):
        (root / f"m{number}.py").write_text(f"# module {number}\n" + "x = 'a line of code'\n" * 40)
        (root / "docs" / f"p{number}.rst").write_text(f"Page {number}: " + "naïve words of prose. " * 30)
    (root / "copy.py").write_bytes((root / "m3.py").read_bytes())
    (root / "link.py").symlink_to(root / "m4.py")
    (root / "short.py").write_text("pass\n")
    (root / "binary.h").write_bytes(b"\0" * 500)
    (root / "latin.txt").write_bytes("é".encode("latin-1") * 500)
    (root / "picture.png").write_bytes(b"text " * 100)
    (root / "docs" / "page.1.gz").write_bytes(gzip.compress(b"A page of the manual. " * 30))
    return root


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_collect_takes_every_text_once(machine: Path, tmp_path: Path) -> None:
    found = real_text.collect(tmp_path / "out.jsonl", max_bytes=10**6, roots=[machine])
    records = read(tmp_path / "out.jsonl")
    names = {Path(record["id"]).name for record in records}
    expected = {f"m{number}.py" for number in range(20)} | {f"p{number}.rst" for number in range(20)} | {"page.1.gz"}
    assert names - {"copy.py"} | {"m3.py"} == expected  # of two copies either may be taken
    assert (found.documents, len(records)) == (41, 41)
    assert {record["source"] for record in records if record["id"].endswith(".py")} == {"code"}
    assert found.text_bytes == sum(len(record["text"].encode()) for record in records)


def test_collect_same_folder_gives_the_same_bytes(machine: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        real_text.collect(tmp_path / name, max_bytes=20_000, roots=[machine])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_collect_beginning_holds_as_much_prose_as_code(machine: Path, tmp_path: Path) -> None:
    found = real_text.collect(tmp_path / "out", max_bytes=20_000, roots=[machine])
    assert 0.45 < found.code_bytes / found.text_bytes < 0.55


def test_collect_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(DataError, match="hold no text; name other folders with --root"):
        real_text.collect(tmp_path / "out", max_bytes=100, roots=[tmp_path / "root"])
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TEXTS = ["The bake and the mino.", "naïve 日本 </s> spelt out\n\tand more", *(" ".join(WORDS[n:]) for n in range(70))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("method", ["megatron", "datatrove"])
def test_peer_documents_are_those_of_the_library(tokenizer: Path, corpus: Path, tmp_path: Path, method: str) -> None:
    if method == "datatrove":
        pytest.importorskip("datatrove", reason="datatrove, a peer of the bench alone, is not installed")
    preprocess.measure(preprocess.command(method, corpus, tokenizer, tmp_path / "out"))
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    file = IndexedFile.open(tmp_path / "out")
    documents = [file.document(number).tolist() for number in range(file.num_documents)]
    assert documents == [[*library.encode(text, add_special_tokens=False).ids, 2] for text in TEXTS]


def test_megatron_method_keeps_an_empty_document_without_a_sequence(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": "The"}\n')
    preprocess.measure(preprocess.command("megatron", tmp_path / "c.jsonl", tokenizer, tmp_path / "out"))
    assert IndexedFile.open(tmp_path / "out").document_indices.tolist() == [0, 0, 1]


def test_measure_counts_the_time_of_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    cost = preprocess.measure([sys.executable, "-c", parent])
    assert cost.cpu_seconds >= 0.3


def test_measure_binds_the_command_and_its_children_to_the_cores() -> None:
    core = min(os.sched_getaffinity(0))
    ask = f"import os; assert os.sched_getaffinity(0) == { {core} }"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    preprocess.measure([sys.executable, "-c", child, ask], cores=[core])


def test_scaling_report_gives_the_ratios_of_times_and_judges_those_by_the_clock(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One core 20 s; half a second to start and twice 9.75 s on two cores, which wait 0.75 s."""
    turn = {
        preprocess.BOUND: [preprocess.Cost(20.0, 20.5, 1), preprocess.Cost(20.0, 19.5, 1)],
        preprocess.FREE: [preprocess.Cost(20.0, 18.0, 1)] * 2,
        preprocess.TWO: [preprocess.Cost(20.0, 11.0, 1)] * 2,
    }
    preprocess.report_scaling([turn], size_mb=2000, start_seconds=0.5)
    *_, bound, free, ideal = capsys.readouterr().out.splitlines()
    assert "1 worker, 1 core, by the clock" in bound and " 1.82 (" in bound and bound.endswith("bar 1.8: reached")
    assert "1 worker, 2 cores, by the clock" in free and " 1.64 (" in free and free.endswith("bar 1.8: MISSED")
    assert "if nothing waited" in ideal and " 1.95 (" in ideal and "bar" not in ideal


def test_measure_failing_command_is_an_error_with_its_words() -> None:
    with pytest.raises(DataError, match="exit code 3:\nmine"):
        preprocess.measure([sys.executable, "-c", "print('mine'); raise SystemExit(3)"])


def test_write_large_ends_soon_after_its_size_with_new_words_in_each_round(corpus: Path, tmp_path: Path) -> None:
    once = corpus.stat().st_size
    size = preprocess.write_large(corpus, tmp_path / "large", 2 * once)
    texts = [record["text"] for record in read(tmp_path / "large")]
    assert 2 * once <= size == (tmp_path / "large").stat().st_size
    assert (texts[0], texts[len(TEXTS)]) == ("The bake and the mino.", "The bake and the mino.".replace("o", "u"))


def test_seconds_by_stage_library_time_goes_to_the_stage_that_called() -> None:
    main, read_unit = ("main.py", 1, "main"), ("/x/preprocessing/readers.py", 2, "read_unit")
    encode = ("/x/preprocessing/encode.py", 3, "encode")
    library, builtin = ("lib.py", 4, "call"), ("~", 0, "<built-in write>")
    functions = {
        main: (1, 1, 1.0, 20.0, {}),
        read_unit: (1, 1, 2.0, 5.0, {main: (1, 1, 2.0, 5.0)}),
        encode: (1, 1, 3.0, 12.0, {main: (1, 1, 3.0, 12.0)}),
        library: (4, 4, 8.0, 12.0, {read_unit: (1, 1, 2.0, 3.0), encode: (3, 3, 6.0, 9.0)}),
        builtin: (4, 4, 4.0, 4.0, {library: (4, 4, 4.0, 4.0)}),
    }
    # A quarter of the library's time, and so of what it calls, is the reader's.
    expected = {"start-up, rest": 1.0, "read, JSON": 2.0 + 3.0, "encode": 3.0 + 9.0}
    assert seconds_by_stage(functions) == pytest.approx(expected)


@pytest.mark.parametrize("script", ["preprocess.py", "preprocess_peers.py", "preprocess_stages.py", "real_text.py"])
def test_bench_help_runs_as_a_script(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), "--help"], capture_output=True, text=True, cwd="/"
    )
    assert (done.returncode, done.stderr) == (0, "")
