"""docs/DATA.md: every command on it runs as it stands, in order, and its table names the options that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data.indexed import IndexedFile
from tests.conftest import ROOT, child_environment

PAGE = ROOT / "docs" / "DATA.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_environment() -> dict[str, str]:
    """Environment of a person in the project's virtual environment, on a machine of few cores."""
    environment = child_environment()
    return environment | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        # In a container everybody is root, and two ranks may find one core.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }


def test_data_page_commands_run_in_order(tmp_path: Path) -> None:
    for name in ("tools", "megatron_ext", "pretrain_pints.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 10
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=page_environment(),
            capture_output=True,
            text=True,
            timeout=240,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{block}\n{said[-6000:]}"
    assert "stopped after iteration 10: finished" in said
    joined = IndexedFile.open(tmp_path / "data" / "joined")
    apart = [IndexedFile.open(tmp_path / "data" / f"{name}_text_document") for name in ("prose", "code")]
    assert joined.tokens.size == sum(file.tokens.size for file in apart) > 100_000


@pytest.mark.parametrize(
    ("table", "tool"),
    [("## What a run of `preprocess_data.py` takes and gives", "preprocess_data.py")],
)
def test_data_page_table_names_the_options_that_there_are(table: str, tool: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(table) :].partition("###")[0]
    named = set(re.findall(r"^\| `(--[a-z-]+)", rows, re.MULTILINE))
    done = subprocess.run([sys.executable, str(ROOT / "tools" / tool), "--help"], capture_output=True, text=True)
    usage = done.stdout[: done.stdout.index("\n\n")]
    assert named == set(re.findall(r"--[a-z-]+", usage))
