"""A short fault campaign: bench/faults.py as docs/RELIABILITY.md runs it, with fewer kills."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, child_environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "faults.py"), "--kills", "4", "--seed", "298",
         "--folder", str(tmp_path / "campaign"), "--json", str(tmp_path / "result.json")],
        capture_output=True, text=True, timeout=880, env=child_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["kills"]) == 4
    assert result["comparison"]["samples"] == 8 * result["comparison"]["iterations"] > 0
