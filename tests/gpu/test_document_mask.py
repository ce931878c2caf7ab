"""Documents kept apart on one GPU: packed samples against documents alone, by Transformer Engine and by SDPA."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_ext.data.tokenizer import Tokenizer
from tests.conftest import ROOT, child_environment

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

SEQUENCES, LENGTH = 8, 256
IMPLEMENTATIONS = ("transformer_engine", "local")


@pytest.fixture(scope="module")
def errors(trained, real_data, tmp_path_factory):
    """Relative errors in bf16 by implementation, on real text cut at random into documents of some 40 tokens."""
    eod = Tokenizer.load(real_data / "tokenizer").eod
    ids = np.fromfile(real_data / "code.bin", dtype="<u2", count=SEQUENCES * LENGTH).astype(np.int64)
    ids[np.random.default_rng(7).random(ids.size) < 1 / 40] = eod
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, ids.reshape(SEQUENCES, LENGTH))

    def measured(implementation: str) -> dict[str, dict[str, float]]:
        words = [str(trained.run_dir), str(file), str(eod), "--model.transformer_impl", implementation]
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/gpu/documents.py"), *words],
            capture_output=True,
            text=True,
            timeout=280,
            env=child_environment(),
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
        return json.loads(done.stdout.splitlines()[-1])

    return {implementation: measured(implementation) for implementation in IMPLEMENTATIONS}


@pytest.mark.parametrize("part", ["logits", "gradient"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_documents_are_as_near_to_fp32_as_documents_alone(implementation, part, errors):
    # The same sums in bf16 by other kernels: errors of one size, not equal.
    found = errors[implementation]
    assert found["packed"][part] < 2 * found["alone"][part], found


@pytest.mark.parametrize("part", ["logits", "gradient"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_whole_samples_are_far_from_documents_alone(implementation, part, errors):
    # Control: to see the documents before is beyond that tolerance.
    found = errors[implementation]
    assert found["whole"][part] > 4 * found["alone"][part], found


def test_implementations_train_on_documents_apart_with_the_same_loss(small, trained):
    start = (
        "--checkpoint.init_from", str(trained.run_dir), "--data.document_mask", "reset", "--data.eod_mask_loss", "True",
        "--optimizer.lr", "1e-12", "--optimizer.min_lr", "0", "--optimizer.lr_decay_style", "constant",
        "--optimizer.lr_warmup_iters", "0", "--train.train_iters", "3",
    )  # fmt: skip
    runs = [
        small.train(f"apart_{implementation}", *start, "--model.transformer_impl", implementation)
        for implementation in IMPLEMENTATIONS
    ]
    engine, local = ([row["loss"] for row in run.rows()] for run in runs)
    assert local == pytest.approx(engine, rel=1e-3)  # as in test_training.py: errors of tokens average out
