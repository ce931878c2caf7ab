"""Layer 4: compile a C++ source of this checkout at its first use, and load it with ctypes.

Standard library only. What was compiled is kept, named by the source, the compiler and the flags, in
`build/native` of the checkout or, where that cannot be written, in `~/.cache/megapints`. It is written aside and
renamed, so any number of processes and nodes may compile at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.durable import publish

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
"""No -march: nodes of several kinds may share the file system that the result is kept on."""
_COMPILE_SECONDS = 300


class BuildError(Exception):
    """A library cannot be had on this machine; the message is a reason, in one line."""


def cache_folders() -> tuple[Path, ...]:
    """List where compiled libraries may lie, the preferred place first."""
    root = Path(__file__).resolve().parents[2]
    own = (root / "build" / "native",) if (root / "pyproject.toml").is_file() else ()
    try:
        return (*own, Path.home() / ".cache" / "megapints")
    except RuntimeError:  # nobody's home is known
        return own


def load_library(source: Path, *, folders: Sequence[Path] | None = None) -> ctypes.CDLL:
    """Load a C++ source's library, compiling it if this was not yet done.

    Args:
        source: the one source file.
        folders: where compiled libraries lie; default `cache_folders()`.

    Raises:
        BuildError: there is no source or no compiler, it failed, no folder can be written, or the result does not load.
    """
    folders = cache_folders() if folders is None else folders
    try:
        content = source.read_bytes()
    except OSError as error:
        raise BuildError(f"{source} cannot be read ({error.strerror})") from error
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    prefix = f"{source.stem}-{_digest(content, ' '.join(FLAGS).encode(), platform.machine().encode())}"
    if compiler is None:
        # Perhaps another node of the cluster has one, and has compiled.
        ready = [path for folder in folders for path in sorted(folder.glob(f"{prefix}-*.so"))]
        if not ready:
            raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)}) in PATH")
        return _open(ready[0])
    name = f"{prefix}-{_digest(compiler.encode(), _version(compiler))}.so"
    for folder in folders:
        if (folder / name).is_file():
            return _open(folder / name)
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, source, folder / name)
            return _open(folder / name)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
    raise BuildError(f"no folder can hold the compiled kernel ({'; '.join(problems)})")


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile into a folder of this call's own, then rename: a half-written library is never loaded."""
    with tempfile.TemporaryDirectory(prefix=f"{target.stem}.", dir=target.parent) as folder:
        aside = Path(folder) / target.name
        command = [compiler, *FLAGS, "-o", str(aside), str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took longer than {_COMPILE_SECONDS} s on {source.name}") from error
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            detail = lines[0].strip() if lines else f"exit code {done.returncode}"
            raise BuildError(f"{compiler} cannot compile {source.name} ({detail})")
        publish(aside, target)


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=_COMPILE_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return os.fsencode(compiler)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled kernel does not load ({error})") from error


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
