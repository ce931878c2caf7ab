"""Preflight on a real Slurm: nodes bear Slurm's names, and their clocks and links are compared."""

from __future__ import annotations

import json
import sys

import pytest

pytestmark = pytest.mark.slurm


def test_srun_over_two_nodes_compares_them_under_their_names(slurm):
    done = slurm.run("srun", "-N2", "-n2", sys.executable, "tools/preflight.py", "--json", "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads(done.stdout)["ranks"]
    assert (first["node"], second["node"]) == slurm.nodes
    # Two nodes of one machine have one clock.
    assert first["clock"] is None and abs(second["clock"]["seconds"]) <= second["clock"]["uncertainty"]
    assert list(first["pairs"]) == list(second["pairs"]) == ["between nodes"]
