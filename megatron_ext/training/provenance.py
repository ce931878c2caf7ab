"""What a run was made with: code revision, versions, machine, environment. Written into the run directory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_ext.parallel import launch

UNKNOWN_REVISION = "unknown"
# The packages whose version can change what a run computes, reads or writes.
PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "tokenizers",
    "transformers",
    "safetensors",
    "transformer-engine",
    "flash-attn",
    "apex",
    "mpi4py",
    "tyro",
    "psutil",
)
_GIT_SECONDS = 10


def code_revision(root: Path) -> str:
    """Name the commit checked out at `root`: its hash, with `-dirty` where tracked files differ from it.

    `unknown` where `root` is not the top of a checkout (an installed copy, even one that lies within
    somebody else's repository) or git is not there.
    """
    if not (root / ".git").exists():
        return UNKNOWN_REVISION
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    if not commit or changes is None:
        return UNKNOWN_REVISION
    return f"{commit}-dirty" if changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    """Run git in `root`; None if it fails or is missing."""
    # In a container the checkout often belongs to another user than the process, and git would refuse it;
    # whose code this is was settled when it was started. fsmonitor off: a query must not start a daemon.
    command = ["git", "-c", f"safe.directory={root.resolve()}", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def environment_report() -> dict[str, Any]:
    """Describe this process's machine and software, as plain values for JSON.

    Keys: host, platform, cpu_model, cpu_cores, memory_gib, nvidia_driver (None without one), python,
    python_executable, command, packages {name: version or None}, environment {variable: value}. Versions are
    those installed, read without importing anything. Variables that look like secrets are left out.
    """
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu_model": _first_field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cpu_cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "nvidia_driver": _nvidia_driver(),
        "python": platform.python_version(),
        "python_executable": sys.executable,
        "command": list(sys.argv),
        "packages": package_versions(),
        "environment": launch.recorded_environment(),
    }


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Look up installed versions without importing; None where a package is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _first_field(path: str, key: str) -> str | None:
    """Value of the first `key : value` line of a /proc file; None where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, separator, value = line.partition(":")
        if separator and name.strip() == key:
            return value.strip()
    return None


def _memory_gib() -> float | None:
    text = _first_field("/proc/meminfo", "MemTotal")
    return round(int(text.split()[0]) / 2**20, 1) if text else None


def _nvidia_driver() -> str | None:
    try:
        version = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return version.splitlines()[0].partition(":")[2].strip() or None
