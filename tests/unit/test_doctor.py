"""The report: what counts as missing, as broken, and what ends in which exit status."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import doctor

ROOT = Path(__file__).resolve().parents[2]


def part(probe, *, required=True):
    return doctor.Part(name="thing", required=required, gives="speed", mend="install it", probe=probe)


def absent():
    raise doctor.Absent("not installed")


def broken():
    raise OSError("libthing.so.1: cannot open\nmore")


def test_part_that_answers_is_ok():
    check = doctor.run_check(part(lambda: "1.2"))
    assert (check.status, check.found, check.mend) == ("ok", "1.2", "")


def test_part_that_is_absent_is_missing_with_a_remedy():
    check = doctor.run_check(part(absent))
    assert (check.status, check.found, check.mend) == ("missing", "not installed", "install it")


def test_part_that_fails_to_load_is_broken_with_the_reason():
    check = doctor.run_check(part(broken))
    assert (check.status, check.found) == ("broken", "OSError: libthing.so.1: cannot open")


def test_import_of_an_unknown_module_is_absent():
    with pytest.raises(doctor.Absent):
        doctor._import("no_such_module_of_ours.inner")


def test_import_of_a_module_that_lacks_its_own_dependency_is_broken(tmp_path, monkeypatch):
    (tmp_path / "lame_module_of_ours.py").write_text("import no_such_module_of_ours\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    check = doctor.run_check(part(lambda: doctor._package("lame_module_of_ours")))
    assert (check.status, check.found) == (
        "broken",
        "ModuleNotFoundError: No module named 'no_such_module_of_ours'",
    )


@pytest.mark.parametrize(
    "probe, required, status",
    [(absent, True, 1), (broken, True, 1), (absent, False, 0), (broken, False, 0), (lambda: "1", True, 0)],
    ids=["required-missing", "required-broken", "optional-missing", "optional-broken", "whole"],
)
def test_exit_status_follows_required_parts_only(monkeypatch, capsys, probe, required, status):
    monkeypatch.setattr(doctor, "parts", lambda: [part(probe, required=required)])
    assert doctor.main([]) == status
    assert "thing" in capsys.readouterr().out


def test_table_says_what_a_missing_part_would_give():
    text = doctor.format_table([doctor.run_check(part(absent))])
    assert "MISSING" in text and "would give: speed" in text and "install it" in text


def test_summary_names_what_is_not_ready():
    assert doctor.summary([doctor.run_check(part(absent))]) == "Not ready: thing."


def test_probe_output_stays_out_of_the_report(capsys):
    doctor.run_check(part(lambda: str(print("chatter"))))
    assert capsys.readouterr().out == ""


def test_apex_of_another_kind_is_told_apart(monkeypatch):
    monkeypatch.setattr(doctor, "_import", lambda module: absent() if "fused" in module else None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(doctor.Absent, match="a package `apex` is there"):
        doctor._apex()


def test_untested_megatron_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(doctor, "_import", lambda module: None)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.17.1")
    assert doctor._megatron() == (
        "0.17.1 (not tested here; tested are 0.16.1 on Python 3.11, 0.19.2 on Python 3.12 or later)"
    )


@pytest.fixture(scope="module")
def report() -> dict:
    done = subprocess.run([sys.executable, "tools/doctor.py", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_json_report_of_this_environment_is_ready(report):
    assert report["ok"] is True


def test_json_report_covers_the_stack(report):
    names = {check["name"] for check in report["checks"]}
    assert {
        "torch",
        "megatron-core",
        "dataset helpers",
        "CUDA",
        "Transformer Engine",
        "apex",
        "Slurm",
    } <= names


def test_json_report_finds_the_tested_megatron(report):
    found = {check["name"]: check["found"] for check in report["checks"]}
    assert found["megatron-core"].endswith("(tested)")


def test_bare_interpreter_is_told_what_is_missing():
    # -S hides site-packages: a Python without any of the requirements.
    done = subprocess.run([sys.executable, "-S", "tools/doctor.py", "--json"], cwd=ROOT, capture_output=True, text=True)
    checks = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 1
    assert checks["torch"] == checks["megatron-core"] == "missing" and checks["Python"] == "ok"
