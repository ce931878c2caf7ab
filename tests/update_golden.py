#!/usr/bin/env python3
"""Record the golden loss curves, or say how they differ.

    python tests/update_golden.py                     run every case and compare
    python tests/update_golden.py NAME --replace      put the new curve in the place of the recorded one

Each case trains for 20 iterations through the real command, in fp32 on the CPU, one thread to a process. A
curve is equal to the last bit on the same kind of machine with the same torch and megatron-core, and to
`TOLERANCE` elsewhere. Where a curve comes out bit-equal on a new kind of machine, this notes it in the golden
file, so that the test compares exactly there from then on. A curve is replaced only in a commit that says why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

import numpy as np
import tokenizers

from tests.conftest import ROOT, child_environment

GOLDEN = Path(__file__).resolve().parent / "golden"
ITERATIONS = 20
# Another CPU sums in another order. With vector instructions switched off (ATEN_CPU_CAPABILITY=default,
# MKL_CBWR=COMPATIBLE, MKLDNN_MAX_CPU_ISA=SSE41) losses differed by up to 2e-7 and norms by up to 3e-6. With Adam's
# usual epsilon of 1e-8 it was 1e-4: where a gradient is nothing but rounding, the update is still of the size of lr.
TOLERANCE = 1e-5

_TOML = """
name = "golden"
run_dir = "{run_dir}"

[model]
num_layers = 4
hidden_size = 48
ffn_hidden_size = 112
num_attention_heads = 6
num_query_groups = 2
vocab_size = 101
make_vocab_size_divisible_by = 8
max_position_embeddings = 32

[precision]
dtype = "fp32"

[data]
tokenizer = "{data}/tokenizer"
train_data = ["{data}/a"]
split = "90,10"

[train]
seq_length = 24
micro_batch_size = 2
global_batch_size = 8
train_iters = 20
eval_interval = 10
eval_iters = 2
seed = 42

[optimizer]
lr = 4e-3
min_lr = 4e-4
adam_eps = 1e-6
lr_warmup_iters = 4

[checkpoint]
save_interval = "none"

[log]
interval = 1
tensorboard = false
"""


class Case(NamedTuple):
    """One configuration: the one above, with these settings."""

    ranks: int
    overrides: tuple[str, ...]


CASES = {
    "gqa_untied_cosine": Case(1, ("--data.eod_mask_loss", "true")),
    "mha_tied_wsd_rampup": Case(
        1,
        (
            *("--model.num_query_groups", "6", "--model.kv_channels", "12"),
            *("--model.share_embeddings_and_output_weights", "true", "--model.init_method", "megatron"),
            *("--optimizer.lr_decay_style", "wsd", "--optimizer.lr_wsd_decay_iters", "6"),
            *("--train.rampup_batch_size", "4", "2", "40", "--optimizer.clip_grad", "0.5"),
            *("--optimizer.lr_warmup_iters", "2"),
        ),
    ),
    "tp2_pp2_blend_linear": Case(
        4,
        (
            *("--parallel.tensor_model_parallel_size", "2", "--parallel.pipeline_model_parallel_size", "2"),
            *("--parallel.sequence_parallel", "true", "--optimizer.lr_decay_style", "linear"),
            *("--data.train_data", "{data}/a", "{data}/b", "--data.train_weights", "0.7", "0.3"),
        ),
    ),
}


@dataclass(frozen=True)
class Machine:
    """All that may change the last bits of a curve."""

    cpu_model: str
    cpu_capability: str
    """Widest vector instructions that torch uses."""
    torch: str
    megatron_core: str


@dataclass(frozen=True)
class Golden:
    """A recorded curve."""

    data_sha256: str
    """Of the token files, so that other data is not taken for other arithmetic."""
    exact_on: tuple[Machine, ...]
    metrics: dict[str, list[float]]


class Comparison(NamedTuple):
    """How a curve stands to the recorded one."""

    exact: bool
    """Whether bits were compared, or values within TOLERANCE."""
    differences: list[str]


def build_data(folder: Path) -> str:
    """Write tokenizer/, a and b, from a seed alone; returns the SHA-256 of the token files.

    Nothing here depends on the Python version, and numpy keeps RandomState's streams for ever (NEP 19).
    """
    from megatron_ext.data.indexed import IndexedWriter

    vocabulary = {"</s>": 0} | {f"t{number}": number for number in range(1, 101)}
    (folder / "tokenizer").mkdir(parents=True)
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t1")).save(
        str(folder / "tokenizer" / "tokenizer.json")
    )
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    stream = np.random.RandomState(20)
    digest = hashlib.sha256()
    for name, documents, longest in (("a", 240, 80), ("b", 160, 40)):
        with IndexedWriter(folder / name, dtype=np.dtype("<u2")) as writer:
            for _ in range(documents):
                # A short pattern of few of the ids, again and again: something that 20 iterations can learn.
                pattern = stream.randint(1, 16, stream.randint(2, 9))
                writer.add_document([*np.resize(pattern, stream.randint(5, longest)), 0])
            writer.publish()
        for ending in ("bin", "idx"):
            digest.update((folder / f"{name}.{ending}").read_bytes())
    return digest.hexdigest()


def train(case: Case, folder: Path) -> dict[str, list[float]]:
    """Train a case with the data in `folder`/data; returns its curve.

    Keys: loss, grad_norm, lr, global_batch_size (one value per iteration), valid_loss (one per validation).
    """
    config, run_dir = folder / "golden.toml", folder / "run"
    config.write_text(_TOML.format(run_dir=run_dir, data=folder / "data"))
    words = [word.format(data=folder / "data") for word in case.overrides]
    launcher = (
        [] if case.ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "pretrain_pints.py"), str(config), *words],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env={**child_environment(), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "lr", "global_batch_size")
    curve = {name: [float(row[name]) for row in rows if row["kind"] == "train"] for name in names}
    return curve | {"valid_loss": [float(row["loss"]) for row in rows if row["kind"] == "valid"]}


def this_machine() -> Machine:
    """Describe the machine that this runs on."""
    import torch

    from megatron_ext.training.provenance import environment_report

    report = environment_report()
    return Machine(
        cpu_model=str(report["cpu_model"]),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        torch=str(torch.__version__),
        megatron_core=str(report["packages"]["megatron-core"]),
    )


def compare(golden: Golden, curve: Mapping[str, Sequence[float]], machine: Machine) -> Comparison:
    """Compare a curve with the recorded one: bits where it was recorded on such a machine, values elsewhere."""
    exact = machine in golden.exact_on
    differences = []
    for name, expected in golden.metrics.items():
        found = curve.get(name, ())
        if len(found) != len(expected):
            differences.append(f"{name}: {len(found)} values, must be {len(expected)}")
            continue
        for number, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
            same = a == b if exact else abs(a - b) <= TOLERANCE * abs(b)
            if not same:
                differences.append(f"{name} {number}: {a!r}, must be {b!r}")
    return Comparison(exact, differences)


def read_golden(name: str) -> Golden:
    """Read a recorded curve."""
    content = json.loads((GOLDEN / f"{name}.json").read_text())
    machines = tuple(Machine(**machine) for machine in content.pop("exact_on"))
    return Golden(exact_on=machines, **content)


def write_golden(name: str, golden: Golden) -> None:
    """Write a recorded curve, a value to a line, so that a change can be read."""
    (GOLDEN / f"{name}.json").write_text(json.dumps(asdict(golden), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases, and record what may be recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases (default all): {', '.join(CASES)}")
    parser.add_argument("--replace", action="store_true", help="record the new curves, whatever the old ones are")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in CASES:
            parser.error(f"no case {name}; there are {', '.join(CASES)}")
    outcomes = [_update(name, replace=arguments.replace) for name in arguments.names or CASES]
    return 0 if all(outcomes) else 1


def _update(name: str, *, replace: bool) -> bool:
    """Run one case; says whether the golden file now agrees with it."""
    with tempfile.TemporaryDirectory() as scratch:
        sha256 = build_data(Path(scratch) / "data")
        curve = train(CASES[name], Path(scratch))
    machine = this_machine()
    if replace or not (GOLDEN / f"{name}.json").exists():
        write_golden(name, Golden(data_sha256=sha256, exact_on=(machine,), metrics=curve))
        print(f"{name}: recorded")
        return True
    golden = read_golden(name)
    bits = compare(Golden(golden.data_sha256, (machine,), golden.metrics), curve, machine).differences
    comparison = compare(golden, curve, machine)
    if golden.data_sha256 != sha256:
        comparison.differences.insert(0, f"data: sha256 {sha256}, must be {golden.data_sha256}")
    for difference in comparison.differences:
        print(f"{name}: {difference}")
    if not bits and not comparison.exact:
        write_golden(name, Golden(golden.data_sha256, (*golden.exact_on, machine), golden.metrics))
        print(f"{name}: bit-equal here too; noted")
    elif not comparison.differences:
        print(f"{name}: {'bit-equal' if not bits else f'equal to {TOLERANCE:g}, {len(bits)} values differ in bits'}")
    return not comparison.differences


if __name__ == "__main__":
    sys.exit(main())
