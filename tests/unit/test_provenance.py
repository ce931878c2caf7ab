"""Revision and environment as a run directory records them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.training.provenance import code_revision, environment_report, package_versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_revision_of_a_clean_checkout_is_its_commit(checkout):
    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD")


def test_revision_of_a_changed_checkout_is_dirty(checkout):
    (checkout / "a.py").write_text("a = 2\n")
    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD") + "-dirty"


def test_revision_with_untracked_files_is_clean(checkout):
    (checkout / "notes.txt").write_text("mine\n")
    assert code_revision(checkout) == git(checkout, "rev-parse", "HEAD")


def test_revision_outside_a_checkout_is_unknown(tmp_path):
    assert code_revision(tmp_path) == "unknown"


def test_revision_of_a_folder_within_another_checkout_is_unknown(checkout):
    (checkout / "vendored").mkdir()
    assert code_revision(checkout / "vendored") == "unknown"


def test_revision_before_the_first_commit_is_unknown(tmp_path):
    git(tmp_path, "init", "-q")
    assert code_revision(tmp_path) == "unknown"


def test_revision_without_git_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert code_revision(checkout) == "unknown"


def test_report_is_plain_json():
    report = environment_report()
    assert json.loads(json.dumps(report)) == report


def test_report_names_this_interpreter():
    report = environment_report()
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["python_executable"] == sys.executable


def test_report_holds_the_launch_and_no_secret(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    report = environment_report()
    assert report["environment"]["NCCL_DEBUG"] == "WARN"
    assert "0123456789" not in json.dumps(report)


def test_versions_of_absent_packages_are_none():
    versions = package_versions(("torch", "no-such-package-of-ours"))
    assert versions["torch"] is not None
    assert versions["no-such-package-of-ours"] is None
