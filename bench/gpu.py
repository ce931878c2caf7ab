#!/usr/bin/env python3
"""Measure training on one GPU: tokens/s, model TFLOP/s, MFU, ratio to a plain matrix product, peak memory.

Each configuration (implementation, precision, micro-batch size) runs in a process of its own, so that one
that runs out of memory or fails does not end the sweep; larger micro batches of a series that ran out of
memory are left out. What is timed is the training step itself on random tokens: model, optimizer and
schedules as pretrain_pints.py builds them. docs/BENCHMARKS.md says what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from bench.gpu_report import Report
from megatron_ext.config.checks import check_config
from megatron_ext.config.load import find_config, load_config
from megatron_ext.config.tree import Config
from megatron_ext.errors import EXIT_CODE, ConfigError, MegapintsError

EPILOG = """\
examples:
  the default: pints_1.5b_2k, Transformer Engine, bf16, micro batches of 8, 16 and 32
    python bench/gpu.py --output build/gpu.json
  FP8 against bf16, each twice, in the order A B B A
    python bench/gpu.py --dtypes bf16 fp8 --micro_batch_sizes 16 --rounds 2
  torch's own modules against Transformer Engine; another context length
    python bench/gpu.py pints_1.5b_16k --impl local transformer_engine --micro_batch_sizes 1 2
  where the time goes: a trace per configuration, the slowest kernels, the share of the step without a kernel
    python bench/gpu.py --micro_batch_sizes 16 --profile build/traces
  try it without a GPU
    python bench/gpu.py --device cpu --tiny
"""
# What one of the eight GPUs of the 1.5-Pints configurations processes per iteration: 512 x 2,048 / 8 tokens.
TOKENS_PER_STEP = 131_072
TINY_SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": None,
    "vocab_size": 512,
    "make_vocab_size_divisible_by": 64,
}
TINY_SEQ_LENGTH = 64
_MEASURE = Path(__file__).with_name("measure.py")
_TAIL_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration to measure."""

    config: str
    """Name or path of a configuration."""
    overrides: tuple[str, ...]
    implementation: Literal["local", "transformer_engine"]
    dtype: Literal["bf16", "fp8", "fp32"]
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] | None
    """None unless dtype is fp8."""
    micro_batch_size: int
    seq_length: int | None
    """None: the configuration's."""
    tokens_per_step: int
    """Tokens of an iteration, rounded to whole micro batches."""
    steps: int
    warmup: int
    device: str
    tiny: bool
    profile: str | None
    """Folder for a trace; None: do not profile."""

    @property
    def precision(self) -> str:
        """Number format with the FP8 recipe, for people."""
        return self.dtype if self.fp8_recipe is None else f"{self.dtype} {self.fp8_recipe}"

    @property
    def series(self) -> tuple[str, str]:
        """What a sweep of micro-batch sizes has in common."""
        return self.implementation, self.precision

    @property
    def name(self) -> str:
        """Short name, fit for a file."""
        return f"{self.implementation}_{self.precision.replace(' ', '_')}_mbs{self.micro_batch_size}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; 0: at least one configuration was measured, 1: none, 2: a mistake in the command."""
    arguments = parse_arguments(argv)
    try:
        cases = make_cases(arguments)
        for case in cases:
            case_config(case)
        report = Report(sys.argv[1:] if argv is None else list(argv), arguments.output)
    except MegapintsError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_CODE
    for case, result in run_sweep(cases, lambda case: run_case(case, arguments.timeout)):
        report.add({"case": asdict(case), "name": case.name, "precision": case.precision, **result})
    print(report.summary())
    return 0 if any(result["status"] == "ok" for result in report.results) else 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, with the defaults of a GPU or of a try-out."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, epilog=EPILOG, formatter_class=form)
    add = parser.add_argument
    name = "configuration by name or path (default %(default)s)"
    add("config", nargs="?", default="pints_1.5b_2k", help=name)
    implementations = ("local", "transformer_engine")
    add("--impl", nargs="+", choices=implementations, help="default: transformer_engine; local on the CPU")
    add("--dtypes", nargs="+", choices=("bf16", "fp8", "fp32"), help="default: bf16; fp32 on the CPU")
    recipes = ("tensorwise", "delayed", "blockwise")
    add("--fp8_recipes", nargs="+", choices=recipes, default=["tensorwise"], help="default: tensorwise")
    count: dict[str, Any] = {"type": _positive, "metavar": "N"}
    add("--micro_batch_sizes", nargs="+", **count, help="default: 8 16 32; 2 with --tiny")
    add("--seq_length", **count, help="tokens per sample; default: the configuration's")
    tokens = f"in whole micro batches (default {TOKENS_PER_STEP:,}; two micro batches with --tiny)"
    add("--tokens_per_step", **count, help=f"tokens per iteration, {tokens}")
    add("--steps", default=10, **count, help="timed iterations (default %(default)s)")
    add("--warmup", default=3, **count, help="iterations before them (default %(default)s)")
    rounds = "times that all is measured; every second round in reverse order (default %(default)s)"
    add("--rounds", default=1, **count, help=rounds)
    override = "set another field of the configuration, as on the training command line; repeatable"
    add("--override", nargs=2, action="append", default=[], metavar=("SECTION.FIELD", "VALUE"), help=override)
    add("--profile", type=Path, metavar="FOLDER", help="write a profiler trace of each configuration there")
    output = "write all figures as JSON, renewed after each configuration"
    add("--output", type=Path, metavar="FILE", help=output)
    limit = "seconds that one configuration may take, start included (default %(default)s)"
    add("--timeout", type=_positive, default=420, metavar="SECONDS", help=limit)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="shrink the model: to try the command, not to measure")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.device == "cpu"
    arguments.impl = arguments.impl or ["local" if on_cpu else "transformer_engine"]
    arguments.dtypes = arguments.dtypes or ["fp32" if on_cpu else "bf16"]
    sizes = arguments.micro_batch_sizes or ([2] if arguments.tiny else [8, 16, 32])
    arguments.micro_batch_sizes = sorted(set(sizes))
    return arguments


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return number


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    """List the configurations in the order of measurement; FP8 with local modules does not exist."""
    one_round = []
    for implementation, dtype in itertools.product(arguments.impl, arguments.dtypes):
        if dtype == "fp8" and implementation == "local":
            print("left out: fp8 with local modules, which have no FP8 kernels", file=sys.stderr)
            continue
        recipes = arguments.fp8_recipes if dtype == "fp8" else [None]
        one_round += [
            _case(arguments, implementation, dtype, recipe, size)
            for recipe, size in itertools.product(recipes, arguments.micro_batch_sizes)
        ]
    if not one_round:
        raise ConfigError("nothing is left to measure; choose --impl transformer_engine for --dtypes fp8.")
    rounds = range(arguments.rounds)
    return [case for number in rounds for case in one_round[:: 1 if number % 2 == 0 else -1]]


def _case(arguments: argparse.Namespace, implementation: Any, dtype: Any, fp8_recipe: Any, size: int) -> Case:
    return Case(
        config=arguments.config,
        overrides=tuple(word for name, value in arguments.override for word in (f"--{name}", value)),
        implementation=implementation,
        dtype=dtype,
        fp8_recipe=fp8_recipe,
        micro_batch_size=size,
        seq_length=arguments.seq_length,
        tokens_per_step=arguments.tokens_per_step or _tokens_per_step(arguments, size),
        steps=arguments.steps,
        warmup=arguments.warmup,
        device=arguments.device,
        tiny=arguments.tiny,
        profile=None if arguments.profile is None else str(arguments.profile),
    )


def _tokens_per_step(arguments: argparse.Namespace, micro_batch_size: int) -> int:
    if arguments.tiny:
        return 2 * micro_batch_size * (arguments.seq_length or TINY_SEQ_LENGTH)
    return TOKENS_PER_STEP


def case_config(case: Case) -> Config:
    """Build the training configuration of a case: the named one, on one process, with the case's sizes.

    Raises:
        ConfigError: every problem of the resulting configuration.
    """
    config = load_config(find_config(case.config), case.overrides)
    model, train = config.model, config.train
    seq_length = case.seq_length or train.seq_length
    if case.tiny:
        model = replace(model, **TINY_SHAPE)
        seq_length = case.seq_length or TINY_SEQ_LENGTH
    model = replace(
        model,
        transformer_impl=case.implementation,
        max_position_embeddings=max(model.max_position_embeddings, seq_length),
    )
    precision = replace(config.precision, dtype=case.dtype)
    if case.fp8_recipe is not None:
        precision = replace(precision, fp8_recipe=case.fp8_recipe)
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        sequence_parallel=False,
    )
    micro_batches = max(1, round(case.tokens_per_step / (case.micro_batch_size * seq_length)))
    train = replace(
        train,
        seq_length=seq_length,
        micro_batch_size=case.micro_batch_size,
        global_batch_size=case.micro_batch_size * micro_batches,
        rampup_batch_size=None,
    )
    checkpoint = replace(config.checkpoint, init_from=None)
    config = replace(config, model=model, precision=precision, parallel=parallel, train=train, checkpoint=checkpoint)
    problems = check_config(config, world_size=1, files=False)
    if problems:
        raise ConfigError([f"{case.name}: {problem}" for problem in problems])
    return config


def run_sweep(cases: Sequence[Case], run: Callable[[Case], dict[str, Any]]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Run the cases one after the other; leave out what is larger than what ran out of memory before."""
    smallest_too_large: dict[tuple[str, str], int] = {}
    begin = time.monotonic()
    done = 0
    for number, case in enumerate(cases, start=1):
        limit = smallest_too_large.get(case.series)
        if limit is not None and case.micro_batch_size >= limit:
            yield case, {"status": "not_run", "reason": f"a micro batch of {limit} ran out of memory"}
            continue
        remaining = (len(cases) - number + 1) * (time.monotonic() - begin) / max(1, done)
        where = f"{number}/{len(cases)}" + (f", about {_duration(remaining)} left" if done else "")
        what = f"{case.implementation} {case.precision}, micro batch {case.micro_batch_size}"
        print(f"[{where}] {what} ...", flush=True)
        result = run(case)
        done += 1
        if result["status"] == "out_of_memory":
            smallest_too_large[case.series] = case.micro_batch_size
        yield case, result


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """Measure one case in a process of its own; whatever happens there becomes a result."""
    with tempfile.TemporaryDirectory(prefix="megapints_bench_") as name:
        folder = Path(name)
        case_file, result_file, log_file = (folder / part for part in ("case.json", "result.json", "log.txt"))
        case_file.write_text(json.dumps(asdict(case)))
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(_MEASURE), str(case_file), str(result_file)],
                stdout=log, stderr=subprocess.STDOUT, env=_child_environment(case), process_group=0,
            )  # fmt: skip
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if code is None:
            return {"status": "timed_out", "reason": f"more than {timeout:g} s", "log": _tail(log_file)}
        if not result_file.exists():
            log_tail = _tail(log_file)
            reason = log_tail[-1] if log_tail else f"exit status {code}"
            return {"status": "failed", "reason": reason, "exit_status": code, "log": log_tail}
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result


def _child_environment(case: Case) -> dict[str, str]:
    """What pretrain_pints.py would set for itself before torch starts; no device is visible for the CPU."""
    from megatron_ext.parallel.launch import runtime_defaults

    environment = dict(os.environ)
    if case.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    defaults = runtime_defaults(environment, cuda=case.device == "cuda", cores=os.cpu_count() or 1)
    return {**environment, **defaults}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a measuring process and what it started (compiler workers), if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-_TAIL_LINES:]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
