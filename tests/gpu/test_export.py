"""A checkpoint of Transformer Engine, read by the local modules and by transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, child_environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LOCAL = ("--model.transformer_impl", "local")
SEQUENCES, LENGTH = 8, 256


def run(script: Path, *words: str) -> str:
    """Run a script of the project; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words],
        capture_output=True,
        text=True,
        timeout=280,
        env=child_environment(),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The Hugging Face folder of the trained run, and what the export said."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    script = Path("tools/convert_checkpoint.py")
    return folder, run(script, "to-hf", "--load", str(trained.run_dir), "--save", str(folder), "--verify")


def test_checkpoint_of_transformer_engine_in_local_modules_equals_transformers_in_fp32(exported):
    # --verify runs megatron-core's local modules and transformers, both in fp32 on the GPU, and fails above 1e-4.
    folder, output = exported
    assert "max |logit difference|" in output
    assert (folder / "model.safetensors").exists()


@pytest.fixture(scope="module")
def compare(trained, exported, real_data, tmp_path_factory):
    """Compare bf16 logits on real text with transformers', in a process of its own."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    ids = np.fromfile(real_data / "code.bin", dtype="<u2", count=SEQUENCES * LENGTH)
    np.save(tokens, ids.reshape(SEQUENCES, LENGTH).astype(np.int64))

    def by_fields(*overrides: str) -> dict[str, dict[str, float]]:
        output = run(Path("tests/gpu/logits.py"), str(trained.run_dir), str(exported[0]), str(tokens), *overrides)
        return json.loads(output.splitlines()[-1])

    return by_fields


@pytest.mark.parametrize("overrides", [(), LOCAL], ids=["transformer_engine", "local"])
def test_logits_in_bf16_are_as_near_to_fp32_as_those_of_transformers(overrides, compare):
    # Both round to bf16 after each operation, in different places: their errors are of one size, not equal.
    found = compare(*overrides)
    assert found["ours"]["error"] < 2 * found["theirs"]["error"], found
    assert found["ours"]["top1"] > found["theirs"]["top1"] - 0.02, found


def test_logits_with_another_rotary_base_are_far(compare):
    # Control: a mistake in the positions is beyond that tolerance.
    found = compare(*LOCAL, "--model.rotary_base", "100")
    assert found["ours"]["error"] > 4 * found["theirs"]["error"], found
