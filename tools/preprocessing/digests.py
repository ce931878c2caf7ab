"""SHA-256 of the input files, found in the background while the workers are busy, and never twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import DataError
from tools.preprocessing.inputs import InputFile
from tools.preprocessing.parts import writing

_READ_BYTES = 1 << 20


def read_digests(folder: Path, files: Sequence[InputFile]) -> dict[InputFile, str]:
    """Read what this run and earlier ones have found, for the files that are still the same."""
    wanted = {(os.path.abspath(file.path), file.size, file.mtime_ns): file for file in files}
    found = {}
    for path in sorted(folder.glob("digests-*")):
        for line in path.read_bytes().splitlines():
            try:
                name, size, mtime_ns, digest = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            if file := wanted.get((name, size, mtime_ns)):
                found[file] = digest
    return found


def sha256(file: InputFile, stop: threading.Event | None = None) -> str | None:
    """Hash a file; None if it was told to stop.

    Raises:
        DataError: the file cannot be read, or is not the one that was found at the start.
    """
    digest = hashlib.sha256()
    try:
        with open(file.path, "rb", buffering=0) as source:
            buffer = memoryview(bytearray(_READ_BYTES))
            while count := source.readinto(buffer):
                if stop is not None and stop.is_set():
                    return None
                digest.update(buffer[:count])
        check_unchanged(file)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def check_unchanged(file: InputFile) -> None:
    """Compare a file's size and time with those found at the start.

    Raises:
        DataError: they differ.
    """
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read any more ({error.strerror}).") from error
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DataError(
            f"{file.path}: has changed while the run went on ({status.st_size:,} bytes, was {file.size:,}); "
            "when nothing writes to it any more, begin again with --restart."
        )


class DigestThread:
    """Hash files one after another in a thread (the library lets go of the interpreter meanwhile)."""

    def __init__(self, files: Sequence[InputFile], record: Path) -> None:
        self._files = files
        self._record = record
        self._stop = threading.Event()
        self._error: Exception | None = None
        self.found: dict[InputFile, str] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with writing(self._record), self._record.open("ab", buffering=0) as record:
                for file in self._files:
                    digest = sha256(file, self._stop)
                    if digest is None:
                        return
                    line = json.dumps([os.path.abspath(file.path), file.size, file.mtime_ns, digest])
                    record.write(f"\n{line}\n".encode())  # a line that a kill cut short ends here
                    self.found[file] = digest
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Wait until all files are hashed.

        Raises:
            DataError: a file cannot be read, or has changed, or the record cannot be written.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread early."""
        self._stop.set()
        self._thread.join()
