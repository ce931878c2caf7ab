"""Say what of megapints works on this machine, and what each missing part would give."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

Status = Literal["ok", "missing", "broken"]

EPILOG = """\
examples:
  python tools/doctor.py            a table for people
  python tools/doctor.py --json     the same for programs: {"ok": bool, "checks": [...]}

exit status: 0 when everything that a CPU run needs is there; 1 when a required part is missing or broken.
Parts marked optional never change it.
"""
# The versions that the tests run on, by Python version: requirements.txt says why there are two.
SUPPORTED_MEGATRON = {"0.16.1": "Python 3.11", "0.19.2": "Python 3.12 or later"}
_MINIMUM_PYTHON = (3, 11)
_COMMAND_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part: what was found, and what to do about it."""

    name: str
    required: bool
    status: Status
    found: str
    """Version or state; the reason where it is missing or broken."""
    gives: str
    """What the part is for."""
    mend: str
    """What to do about a part that is missing or broken; empty for one that works."""


class Absent(Exception):
    """A part is not there: the message says what was looked for."""


class Unfit(Exception):
    """A part is there, but cannot serve: the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    checks = run_checks()
    ok = all(check.status == "ok" for check in checks if check.required)
    if arguments.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(format_table(checks))
        print(summary(checks))
    return 0 if ok else 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to look for: `probe` answers with what it found, or raises."""

    name: str
    required: bool
    gives: str
    mend: str
    probe: Callable[[], str]


def run_checks() -> list[Check]:
    """Look for every part, required ones first. Slow: imports torch, megatron-core and more."""
    return [run_check(part) for part in parts()]


def run_check(part: Part) -> Check:
    """Run one probe; whatever it raises becomes a line of the report."""
    status: Status = "ok"
    mend = ""
    try:
        with _silence():
            found = part.probe()
    except Absent as error:
        status, found, mend = "missing", str(error), part.mend
    except Exception as error:  # a broken binary fails in its own way, and must not end the report
        reason = _first_line(str(error))
        found = reason if isinstance(error, Unfit) else f"{type(error).__name__}: {reason}"
        status, mend = "broken", part.mend
    return Check(name=part.name, required=part.required, status=status, found=found, gives=part.gives, mend=mend)


def parts() -> list[Part]:
    """List the parts in the order of the report."""
    pip = "make builds .venv with it; elsewhere: pip install -r requirements.txt"
    return [*_required_parts(pip), *_optional_parts(pip)]


def _required_parts(pip: str) -> list[Part]:
    def part(name: str, gives: str, probe: Callable[[], str], mend: str = pip) -> Part:
        return Part(name=name, required=True, gives=gives, mend=mend, probe=probe)

    return [
        part("Python", "runs everything", _python, "install Python 3.11 or 3.12; make PYTHON=python3.12"),
        part("torch", "tensors, gradients, gloo and NCCL", lambda: _package("torch")),
        part("megatron-core", "model parallelism, optimizer, checkpoints, datasets", _megatron),
        part(
            "dataset helpers",
            "Megatron's compiled sample-index builder, without which no data set opens",
            _dataset_helpers,
            "take megatron-core's wheel (pip install --force-reinstall --no-deps --only-binary :all: "
            "megatron-core==VERSION), or build it where there is a C++ compiler",
        ),
        part("numpy", "memory-mapped token files", lambda: _package("numpy")),
        part("tokenizers", "text to token ids", lambda: _package("tokenizers")),
        part("safetensors", "reads and writes Hugging Face weights", lambda: _package("safetensors")),
        part("tyro", "configuration from TOML and the command line", lambda: _package("tyro")),
        part("rich", "progress displays", lambda: _package("rich")),
        part("psutil", "checkpoint saving: Megatron's writer processes die without it",
             lambda: _package("psutil")),
    ]  # fmt: skip


def _optional_parts(pip: str) -> list[Part]:
    def part(name: str, gives: str, probe: Callable[[], str], mend: str = pip) -> Part:
        return Part(name=name, required=False, gives=gives, mend=mend, probe=probe)

    gpu = "see requirements-gpu.txt"
    return [
        part("transformers", "checks exported models; generates text", lambda: _package("transformers")),
        part("TensorBoard", "event files beside metrics.jsonl", _tensorboard),
        part("matplotlib", "tools/plot_run.py", lambda: _package("matplotlib")),
        part("orjson", "JSON Lines in tools/preprocess_data.py", lambda: _package("orjson")),
        part("pyarrow", "Parquet and datasets folders in tools/preprocess_data.py", lambda: _package("pyarrow")),
        part("zstandard", ".zst inputs of tools/preprocess_data.py", lambda: _package("zstandard")),
        part("native encoder", "text to ids many times faster than by tokenizers", _native_encoder,
             "install a C++ compiler (c++, g++ or clang++)"),
        part("nltk", "sentence splitting (--split-sentences)", lambda: _package("nltk")),
        part("wandb", "online experiment tracking (log.wandb_project)", lambda: _package("wandb"),
             "pip install wandb"),
        part("CUDA", "training at speed; without it everything runs on the CPU with gloo", _cuda,
             "needs an NVIDIA driver and a CUDA build of torch; nvidia-smi tells what the driver sees"),
        part("Transformer Engine", "FP8, fused attention, context parallelism", _transformer_engine, gpu),
        part("apex", "fusion of weight-gradient accumulation into the matrix product", _apex, gpu),
        part("mpi4py", "ranks under mpiexec; text tools over several nodes", _mpi4py),
        part("mpiexec", "starts ranks without Slurm (torchrun does too)", _mpiexec),
        part("Slurm", "sbatch and srun on a cluster", _slurm,
             "nothing on one machine; on a cluster, ask those who run it"),
    ]  # fmt: skip


def _python() -> str:
    version = platform.python_version()
    if sys.version_info[:2] < _MINIMUM_PYTHON:
        raise Unfit(f"{version} is too old, {'.'.join(map(str, _MINIMUM_PYTHON))} is the least")
    return f"{version} at {sys.executable}"


def _import(module: str) -> ModuleType:
    """Import a module; Absent if it is not installed, anything else if it is but fails."""
    top = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (error.name == module or error.name == top):
            raise Absent("not installed") from None
        raise


def _package(module: str, distribution: str | None = None) -> str:
    _import(module)
    return importlib.metadata.version(distribution or module)


def _megatron() -> str:
    _import("megatron.core")
    version = importlib.metadata.version("megatron-core")
    if version in SUPPORTED_MEGATRON:
        return f"{version} (tested)"
    tested = ", ".join(f"{known} on {python}" for known, python in SUPPORTED_MEGATRON.items())
    return f"{version} (not tested here; tested are {tested})"


def _dataset_helpers() -> str:
    _import("megatron.core")
    module = _import("megatron.core.datasets.helpers_cpp")
    if not hasattr(module, "build_sample_idx_int32"):
        raise Unfit("imported, but build_sample_idx_int32 is not in it")
    return "import"


def _tensorboard() -> str:
    _import("torch.utils.tensorboard")
    return importlib.metadata.version("tensorboard")


def _cuda() -> str:
    torch = _import("torch")
    if torch.version.cuda is None:
        raise Absent(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Absent(f"torch is built for CUDA {torch.version.cuda}, but no device answers")
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    fp8 = "FP8" if (major, minor) >= (8, 9) else "no FP8 (needs compute capability 8.9)"
    return f"{torch.version.cuda}, {count} x {name} ({memory_gib:.0f} GiB, {major}.{minor}, {fp8})"


def _transformer_engine() -> str:
    _import("transformer_engine")
    _import("transformer_engine.pytorch")
    return importlib.metadata.version("transformer-engine")


def _apex() -> str:
    """The package of that name on PyPI is something else: only the compiled kernel tells NVIDIA's."""
    _import("torch")  # the extension's symbols are torch's
    try:
        _import("fused_weight_gradient_mlp_cuda")
    except Absent:
        other = importlib.util.find_spec("apex") is not None
        raise Absent(
            "a package `apex` is there, without fused_weight_gradient_mlp_cuda" if other else "not installed"
        ) from None
    return "with fused_weight_gradient_mlp_cuda"


def _native_encoder() -> str:
    """Load the tokenizer's kernel, compiling it if this was not yet done."""
    from megatron_ext.data.fast_tokenizer import KERNEL
    from megatron_ext.data.native_build import BuildError, load_library

    try:
        load_library(KERNEL)
    except BuildError as error:
        raise Absent(str(error)) from None
    return f"{KERNEL.name}, compiled"


def _mpi4py() -> str:
    """Load the MPI library without starting MPI, which under a launcher would be for the run to do."""
    mpi4py = _import("mpi4py")
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    library = _first_line(_import("mpi4py.MPI").Get_library_version()).rstrip("\0")
    return f"{importlib.metadata.version('mpi4py')} on {library.partition(', package')[0]}"


def _mpiexec() -> str:
    beside = Path(sys.executable).parent / "mpiexec"
    path = str(beside) if beside.exists() else shutil.which("mpiexec")
    if path is None:
        raise Absent("not in the PATH, nor beside this Python")
    return f"{_first_line(_run([path, '--version']))} at {path}"


def _slurm() -> str:
    found = {name: shutil.which(name) for name in ("sbatch", "srun", "scontrol")}
    lacking = [name for name, path in found.items() if path is None]
    if lacking:
        raise Absent(f"{', '.join(lacking)} not in the PATH")
    return _first_line(_run(["srun", "--version"]))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    if done.returncode != 0:
        raise Unfit(f"`{' '.join(command)}` failed: {_first_line(done.stderr or done.stdout)}")
    return done.stdout


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep libraries' import-time chatter out of the report, that of their compiled parts too."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def format_table(checks: Sequence[Check]) -> str:
    """Lay the report out in two groups, with the purpose and the remedy under each part that is not there."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    for title, required in (("Required", True), ("Optional", False)):
        lines.append(f"{title}:")
        for check in (check for check in checks if check.required is required):
            lines.append(f"  {_mark(check)}  {check.name:<{width}}  {check.found}")
            if check.status != "ok":
                lines.append(f"  {'':7}  {'':<{width}}  would give: {check.gives}")
                lines.append(f"  {'':7}  {'':<{width}}  to do:      {check.mend}")
        lines.append("")
    return "\n".join(lines)


def _mark(check: Check) -> str:
    missing = "MISSING" if check.required else "-"
    return {"ok": "ok", "missing": missing, "broken": "BROKEN"}[check.status].ljust(7)


def summary(checks: Sequence[Check]) -> str:
    """One closing line: whether training can start, and on what."""
    bad = [check.name for check in checks if check.required and check.status != "ok"]
    if bad:
        return f"Not ready: {', '.join(bad)}."
    usable = {check.name for check in checks if check.status == "ok"}
    if "CUDA" not in usable:
        return "Ready, on the CPU."
    return f"Ready, on CUDA{' with Transformer Engine' if 'Transformer Engine' in usable else ''}."


if __name__ == "__main__":
    raise SystemExit(main())
