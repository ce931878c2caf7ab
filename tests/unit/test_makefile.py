"""What `make` promises, as far as it costs nothing: its list, and the environment's stamp."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINNED = re.compile(r'[a-z0-9._-]+(\[[a-z0-9_,-]+\])?==[0-9][0-9a-z.+]*( ; python_version (<|>=) "3\.12")?')


def venv_script(venv: Path, python: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Call .ci/venv.sh with the requirement files of a test."""
    command = [str(ROOT / ".ci" / "venv.sh"), str(venv), python, *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "requirements.txt"
    path.write_text("# nothing\n")
    return path


def test_make_alone_lists_the_targets():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make (\S+)", done.stdout, re.MULTILINE)) >= {"demo", "test", "check", "clean"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"])
def test_requirements_are_pinned_exactly(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(PINNED.fullmatch(line) for line in lines), lines


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"])
def test_each_requirement_has_a_reason_above_it(name):
    lines = (ROOT / name).read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if line and not line.startswith("#"):
            assert before.startswith("#") or before.split("==")[0] == line.split("==")[0], line


def test_apex_is_never_a_requirement():
    for path in ROOT.glob("requirements*.txt"):
        assert not re.search(r"^apex", path.read_text(), re.MULTILINE)


def test_environment_is_built_once_and_added_to(tmp_path, empty):
    venv = tmp_path / "venv"
    more = tmp_path / "more.txt"
    more.write_text("# more\n")
    first = venv_script(venv, sys.executable, empty)
    assert first.returncode == 0 and "new, with Python" in first.stdout, first.stderr
    assert venv_script(venv, sys.executable, empty).stdout == ""
    # Without a PYTHON the environment keeps the interpreter that it has.
    added = venv_script(venv, "", empty, more).stdout
    assert f"installing {more}" in added and "new" not in added
    assert venv_script(venv, "", empty).stdout == venv_script(venv, "", empty, more).stdout == ""


def test_interrupted_installation_leaves_no_stamp(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text(f"{tmp_path}/no-such-file.whl\n")
    assert venv_script(tmp_path / "venv", sys.executable, bad).returncode != 0
    assert (tmp_path / "venv" / "pyvenv.cfg").exists() and not (tmp_path / "venv" / ".installed").exists()


def test_changed_requirements_rebuild_the_environment(tmp_path, empty):
    venv = tmp_path / "venv"
    # As one built before has it: whole, by this interpreter, from another version of the file.
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("")
    (venv / "left-over").write_text("")
    interpreter = f"python {platform.python_version()} {sys.base_prefix} {venv}"
    (venv / ".installed").write_text(f"{interpreter}\n{empty} {'0' * 64}\n")
    assert "new, with Python" in venv_script(venv, sys.executable, empty).stdout
    assert not (venv / "left-over").exists()
    assert (venv / ".installed").read_text().splitlines()[0] == interpreter


def test_folder_that_is_no_environment_is_left_alone(tmp_path, empty):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = venv_script(tmp_path / "mine", sys.executable, empty)
    assert done.returncode == 2 and "is not a virtual environment" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_python_that_does_not_run_is_named(tmp_path, empty):
    done = venv_script(tmp_path / "venv", "/no/such/python", empty)
    assert done.returncode == 2
    assert done.stderr.startswith("error: PYTHON (/no/such/python) does not run")


def test_python_that_is_too_old_is_named(tmp_path, empty):
    old = tmp_path / "python3.9"
    # Fails the version question, as an old interpreter would, and answers the one for its name.
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; *platform*) echo 3.9.18;; esac\nexit 0\n')
    old.chmod(0o755)
    done = venv_script(tmp_path / "venv", str(old), empty)
    assert done.returncode == 2 and "is 3.9.18, and 3.11 is the least" in done.stderr


def skips(tmp_path: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    """Give .ci/skips.py a report with these test cases."""
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    command = [sys.executable, str(ROOT / ".ci" / "skips.py"), str(report)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


PASSED = '<testcase classname="a" name="test_b"/>'


def skipped(reason: str) -> str:
    return f'<testcase classname="a" name="test_c"><skipped type="pytest.skip" message="{reason}"/></testcase>'


def test_skip_for_no_good_reason_fails_ci(tmp_path):
    done = skips(tmp_path, PASSED, skipped("did not feel like it"))
    assert done.returncode == 1 and "a::test_c: did not feel like it" in done.stdout


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a GPU is there, so this skip would be refused")
def test_skip_for_want_of_a_gpu_passes_ci(tmp_path):
    assert skips(tmp_path, PASSED, skipped("needs a GPU")).returncode == 0


def test_run_without_any_test_fails_ci(tmp_path):
    assert skips(tmp_path, skipped("needs a GPU")).returncode == 1
