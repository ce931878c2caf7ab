"""Measure one configuration for bench/gpu.py: `python bench/measure.py CASE.json RESULT.json`.

Shapes: b micro batch, s sequence.
"""

from __future__ import annotations

import gc
import gzip
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

import torch

from bench.gpu import Case, case_config
from megatron_ext.config.tree import Config
from megatron_ext.data.batch import Batch
from megatron_ext.data.loader import Loader
from megatron_ext.durable import write_whole
from megatron_ext.errors import ConfigError, MegapintsError, TrainingError
from megatron_ext.log import setup_logging
from megatron_ext.model.flops import flops_per_token, parameter_count
from megatron_ext.model.gpt import build_model, wrap_for_training
from megatron_ext.model.transformer_config import uses_transformer_engine
from megatron_ext.optim.build import build_optimizer
from megatron_ext.parallel import device, groups
from megatron_ext.parallel.groups import Place
from megatron_ext.parallel.launch import single_process
from megatron_ext.training.provenance import environment_report
from megatron_ext.training.state import TrainState
from megatron_ext.training.step import Machine, connect, train_step

MATMUL_SIZE, MATMUL_REPEATS = 8192, 200
"""The product that every result is compared with, and how often it is timed before and after it."""
_TOP_KERNELS = 25
_SAMPLED = ("sm_mhz", "watts", "celsius")
_NO_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "can't allocate memory",
)
_GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_CPU_CATEGORIES = frozenset({"cpu_op"})
# Kinds of kernels by name; the first that matches counts.
_KINDS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("attention", r"sdpa|fmha|flash|attention"),
        ("optimizer, clipping", r"adam|multi_tensor"),
        ("matrix products", r"gemm|nvjet|cutlass|xmma|splitk|cublas|addmm|::mm\b|matmul"),
        ("cross entropy", r"cross_entropy|softmax|element_mul"),
        ("rotary", r"rope|rotary"),
        ("norms", r"norm"),
        ("casts to FP8", r"quantize|cast|transpose|amax"),
        ("compiled pointwise", r"triton"),
        ("copies, fills", r"memcpy|memset|copy|fill|zero_"),
        ("communication", r"nccl"),
        ("rest", r""),
    )
)


class RandomLoader(Loader):
    """Makes random tokens on the device, in place of reading data."""

    def __init__(self, place: Place, *, vocab_size: int, micro_batch_size: int, seq_length: int) -> None:
        source: Any = _RandomTokens()
        super().__init__(source, place, micro_batch_size=micro_batch_size, seq_length=seq_length)
        self._vocab_size = vocab_size
        self._shape = (micro_batch_size, seq_length)
        self._generator = torch.Generator(device=device.current()).manual_seed(1)
        self._ones = torch.ones(self._shape, device=device.current())
        self._positions = torch.arange(seq_length, device=device.current()).expand(self._shape)

    def iteration(self, first: int, *, global_batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the micro batches of an iteration; neither `first` nor `limit` matters."""
        b, s = self._shape
        for _ in range(global_batch_size // b):
            text = torch.randint(self._vocab_size, (b, s + 1), generator=self._generator, device=device.current())
            tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
            yield Batch(tokens, labels, self._ones, self._positions)


class _RandomTokens:
    """Stands where `train_step` asks where samples come from."""

    def locate(self, k: int) -> str:
        return f"sample {k}: random tokens"


def main(argv: Sequence[str]) -> int:
    """Measure the case of a file into another; 0 unless something broke that is no result."""
    case = Case(**json.loads(Path(argv[0]).read_text()))
    setup_logging(rank=0, world_size=1, path=None)
    try:
        result = measure(case)
    except MegapintsError as error:
        refused = isinstance(error, ConfigError)
        result = {"status": "refused" if refused else "failed", "reason": " ".join(str(error).split())}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"status": "out_of_memory", "reason": str(error).partition("\n")[0][:300]}
    write_whole(Path(argv[1]), json.dumps(result))
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, of torch's allocator or of a library's own, from other failures."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _NO_MEMORY)


class Timing(NamedTuple):
    """What came of the timed iterations."""

    seconds: list[float]
    losses: list[float]
    peak_memory_gib: float | None
    """Highest memory of torch's allocator in use; None on the CPU."""
    peak_reserved_gib: float | None
    """Highest memory that it had taken from the device."""
    clocks: dict[str, float]
    seconds_to_start: float
    """From the first line of `time_training` to the end of the warm-up."""
    profile: dict[str, Any] | None


def measure(case: Case) -> dict[str, Any]:
    """Time a case between two measurements of a plain matrix product, and say how fast it was.

    Raises:
        MegapintsError: this machine cannot run the case, or its loss is not finite.
        RuntimeError: among others, the case does not fit into memory.
    """
    config = case_config(case)
    if device.is_cuda() != (case.device == "cuda"):
        problem = "no CUDA device is visible; use --device cpu" if case.device == "cuda" else "a CUDA device is visible"
        raise ConfigError(f"--device {case.device}: {problem}.")
    before = matmul_tflops(tiny=case.tiny)
    timing = time_training(case, config)
    gc.collect()  # frees the model: without it a large case leaves no room for the product
    after = matmul_tflops(tiny=case.tiny)

    train = config.train
    tokens = train.global_batch_size * train.seq_length
    median = statistics.median(timing.seconds)
    flops = flops_per_token(config.model, train.seq_length)
    tflops = tokens / median * flops.total / 1e12
    peak = config.log.peak_tflops or device.peak_bf16_tflops()
    return {
        "status": "ok",
        "transformer_engine": uses_transformer_engine(config),
        "parameters": parameter_count(config.model).total,
        "flops_per_token": {"linear": flops.linear, "attention": flops.attention},
        "seq_length": train.seq_length,
        "num_microbatches": train.global_batch_size // train.micro_batch_size,
        "tokens_per_step": tokens,
        "step_seconds": {"median": median, "min": min(timing.seconds), "max": max(timing.seconds)},
        "tokens_per_second": tokens / median,
        "tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "peak_tflops": peak,
        "matmul_tflops": {"before": before, "after": after},
        # A product of another size than 8192^3 says nothing about the device.
        "matmul_ratio": None if case.tiny else tflops / statistics.mean((before, after)),
        "machine": describe_machine(),
        **timing._asdict(),
    }


def time_training(case: Case, config: Config) -> Timing:
    """Build the model, warm up, and time iterations. Afterwards the process groups are gone again."""
    begin = time.perf_counter()
    device.reset_peak_memory()
    machine = build_machine(config)
    state = TrainState()
    losses: list[float] = []

    def run_step() -> None:
        result = train_step(machine, state)
        if result.fault is not None:
            raise TrainingError(f"iteration {state.iteration + 1}: {result.fault}")
        state.advance(result)
        losses.append(result.loss)

    gc.collect()
    gc.disable()  # as the training loop does
    for _ in range(case.warmup):
        run_step()
    seconds_to_start = time.perf_counter() - begin
    with sampled_clocks() as clocks:
        seconds = timed(run_step, case.steps)
    peaks = device.peak_memory_gib(), _peak_reserved_gib()
    profile = None if case.profile is None else profile_step(run_step, case, statistics.median(seconds))
    gc.enable()
    groups.destroy()
    timed_losses = losses[case.warmup : case.warmup + case.steps]
    return Timing(seconds, timed_losses, *peaks, clocks, seconds_to_start, profile)


def build_machine(config: Config) -> Machine:
    """Build what `train_step` works with, as pretrain_pints.py does, on this process alone."""
    place = groups.initialize(config.parallel, single_process(), seed=config.train.seed)
    model = wrap_for_training(config, build_model(config))
    optimizer = build_optimizer(config, model.wrapped)
    connect(config, model, optimizer)
    loader = RandomLoader(
        place,
        vocab_size=config.model.vocab_size,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=config.train.seq_length,
    )
    return Machine(config=config, place=place, model=model, optimizer=optimizer, loader=loader)


def timed(run: Callable[[], None], repeats: int) -> list[float]:
    """Run repeatedly and return the seconds of each, by CUDA events or, on the CPU, by the clock.

    Each ends where the next begins, so that no gap between two is left out.
    """
    if not device.is_cuda():
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]
    device.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    device.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:], strict=False)]


def matmul_tflops(*, tiny: bool) -> float:
    """Time a bf16 product of two square random matrices; the median over repetitions, in TFLOP/s.

    Random, because a product of zeros draws less power and ran 13 % faster on an H200.
    """
    size, repeats = (256, 3) if tiny else (MATMUL_SIZE, MATMUL_REPEATS)
    first, second, product = (torch.randn(size, size, device=device.current(), dtype=torch.bfloat16) for _ in range(3))

    def multiply() -> None:
        torch.mm(first, second, out=product)

    timed(multiply, max(1, repeats // 10))
    seconds = timed(multiply, repeats)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def profile_step(run: Callable[[], None], case: Case, step_seconds: float) -> dict[str, Any]:
    """Trace one iteration; `step_seconds` is what one takes without the profiler, which slows the host."""
    from torch.profiler import ProfilerActivity, profile

    assert case.profile is not None
    folder = Path(case.profile)
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{case.name}.json.gz"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda() else [])]
    with profile(activities=activities) as profiler:
        run()
        device.synchronize()
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    summary = kernel_summary(events, step_seconds=step_seconds, on_gpu=device.is_cuda())
    return {"trace": str(trace), **summary}


def kernel_summary(events: Iterable[Mapping[str, Any]], *, step_seconds: float, on_gpu: bool) -> dict[str, Any]:
    """Add up a trace of one iteration by kernel and by kind of kernel.

    Args:
        events: `traceEvents` of a Chrome trace; `ts` and `dur` in microseconds.
        step_seconds: duration of the iteration without a profiler.
        on_gpu: count what ran on the GPU; else torch's operators on the CPU, which contain one another.

    Returns:
        `busy_seconds` in which at least one kernel ran, `host_gap` the share of the iteration in which none
        did (None on the CPU), and `kinds` and `top`: names with milliseconds, share of the sum, and calls.
    """
    wanted = _GPU_CATEGORIES if on_gpu else _CPU_CATEGORIES
    kernels = [event for event in events if event.get("ph") == "X" and event.get("cat") in wanted]
    by_name: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event["name"]].append(event["dur"])
        by_kind[kind_of(event["name"])].append(event["dur"])
    busy = union_length((event["ts"], event["ts"] + event["dur"]) for event in kernels) / 1e6
    return {
        "busy_seconds": busy,
        "host_gap": max(0.0, 1.0 - busy / step_seconds) if on_gpu else None,
        "kinds": _ranked(by_kind),
        "top": _ranked(by_name)[:_TOP_KERNELS],
    }


def kind_of(name: str) -> str:
    """Class a kernel by its name."""
    return next(kind for kind, pattern in _KINDS if pattern.search(name))


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Measure the union of intervals: what several streams do at once counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _ranked(durations: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    total = sum(sum(values) for values in durations.values())
    rows = [
        {"name": name, "milliseconds": sum(values) / 1e3, "share": sum(values) / total, "calls": len(values)}
        for name, values in durations.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


@contextmanager
def sampled_clocks() -> Iterator[dict[str, float]]:
    """Sample the GPU's clock, power and temperature while a block runs; the dict then has the medians."""
    found: dict[str, float] = {}
    program = shutil.which("nvidia-smi")
    if program is None or not device.is_cuda():
        yield found
        return
    gpu = f"GPU-{torch.cuda.get_device_properties(device.current()).uuid}"
    query = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
    with tempfile.TemporaryFile("w+") as output:
        command = [program, query, "--format=csv,noheader,nounits", "-lms", "250", "-i", gpu]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
        output.seek(0)
        found.update(median_samples(output.read().splitlines()))


def median_samples(lines: Iterable[str]) -> dict[str, float]:
    """Take the medians of `MHz, W, degrees` lines; one that was cut short or has no number is left out."""
    samples = []
    for line in lines:
        try:
            mhz, watts, celsius = (float(part) for part in line.split(","))
        except ValueError:
            continue
        samples.append((mhz, watts, celsius))
    if not samples:
        return {}
    columns = zip(*samples, strict=True)
    return {name: statistics.median(column) for name, column in zip(_SAMPLED, columns, strict=True)}


def _peak_reserved_gib() -> float | None:
    return torch.cuda.max_memory_reserved() / 2**30 if device.is_cuda() else None


def describe_machine() -> dict[str, Any]:
    """Name the device and the versions that decide the speed."""
    report = environment_report()
    versions = report["packages"]
    cudnn = torch.backends.cudnn.version() if device.is_cuda() else None
    named = {
        "device": device.name(),
        "driver": report["nvidia_driver"],
        "python": report["python"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "megatron-core": versions["megatron-core"],
        "transformer-engine": versions["transformer-engine"],
    }
    return {name: value for name, value in named.items() if value is not None}


if __name__ == "__main__":  # torch may start processes to compile in, which must not measure
    sys.exit(main(sys.argv[1:]))
