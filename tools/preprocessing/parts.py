"""The work folder: the plan of a run, and the parts of its output that are finished.

A run's input is cut into parts, the same whoever works on them. PREFIX.partial holds, until the output is whole:

    plan                what the parts are made of; a run with another plan may not use them
    00000012.part       JSON, written last: the part's files, with sizes and checksums, and its counts
    00000012.0.bin      raw ids of the first key      (.1. of the second, and so on)
    00000012.0.len      int32 tokens of each document, or of each sentence
    00000012.0.doc      int32 sentences of each document, where documents are split
    00000012.skipped    bad records that were left out, as JSON Lines
    joined.0.bin        ids of the first key of all parts up to one, which lose their own once these are on the disk
    digests-0           SHA-256 of input files        (by the rank that read them)

No worker waits for the disk. What a kill leaves is in the system's memory and whole; what a power cut leaves of a part
that was not on the disk yet is found out by its checksums, and the part is made again.

No name ends like an input's, so that a folder that is both input and output does not feed on itself.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from megatron_ext.data.indexed import bin_path
from megatron_ext.data.manifest import manifest_path
from megatron_ext.durable import aside_path, write_whole
from megatron_ext.errors import DataError

if TYPE_CHECKING:
    from tools.preprocessing.batches import BadRecord
    from tools.preprocessing.encode import Documents
    from tools.preprocessing.inputs import Unit

PART_BYTES = 16 << 20
"""Most input per part: some tenths of a second of work, which is what a kill loses and a worker may end later."""

_READ_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Part(NamedTuple):
    """Some neighbouring units of the input, whose ids go into one set of files."""

    number: int
    units: tuple[Unit, ...]

    @property
    def weight(self) -> int:
        """Bytes of input."""
        return sum(unit.weight for unit in self.units)


def choose_part_bytes(input_bytes: int) -> int:
    """Choose a part's size by the input's: a small one too is cut into enough parts to keep some workers busy."""
    return min(PART_BYTES, max(input_bytes // 64, PART_BYTES // 8))


def group_units(units: Sequence[Unit], part_bytes: int) -> list[Part]:
    """Put neighbouring units together as long as a part stays within `part_bytes`: many small files make few parts."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.weight > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.weight
    return [Part(number, tuple(group)) for number, group in enumerate(groups)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRecord:
    """What a finished part holds."""

    number: int
    documents: int
    skipped: int
    sizes: dict[str, int]
    """Bytes of each file, by name."""
    checksums: dict[str, int]
    """CRC-32 of each file as it was written."""


class Finished(NamedTuple):
    """What earlier runs have left."""

    records: dict[int, PartRecord]
    """By number of the part."""
    joined: int
    """Parts, from the first on, whose ids are in the joined files."""
    joined_bytes: tuple[int, ...]
    """`[keys]` what these hold of them; whatever follows is of no use."""


def endings(*, sentences: bool) -> tuple[str, ...]:
    """Name the files of a part, for each key."""
    return ("bin", "len", "doc") if sentences else ("bin", "len")


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn a failure to write into one line that says what to do.

    Raises:
        DataError: the disk is full, the quota used up, or the file cannot be written for another reason.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL:
            raise DataError(
                f"{what}: the disk is full ({reason}); free some space, and give the same command again."
            ) from error
        raise DataError(f"{error.filename or what}: cannot be written ({reason}).") from error


class PartWriter:
    """Write the files of one part; a context manager that leaves nothing half-written behind."""

    def __init__(self, folder: Path, number: int, *, num_keys: int, sentences: bool) -> None:
        self._folder = folder
        self._number = number
        self._documents = self._skipped = 0
        self._open: dict[str, IO[bytes]] = {}
        self._checksums: dict[str, int] = {}
        self._keys = [[f"{key}.{ending}" for ending in endings(sentences=sentences)] for key in range(num_keys)]
        self._stack = ExitStack()

    def __enter__(self) -> PartWriter:
        with writing(self._folder), ExitStack() as stack:
            for name in (name for names in self._keys for name in names):
                self._open[name] = stack.enter_context(self._aside(name).open("wb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
            self._stack.close()
        for name in (*self._open, "part"):
            self._aside(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._number:08d}.{name}"

    def _aside(self, name: str) -> Path:
        return aside_path(self._path(name))

    def add(self, columns: Sequence[Documents]) -> None:
        """Append documents: the same ones under each key."""
        with writing(self._path("bin")):
            for names, documents in zip(self._keys, columns, strict=True):
                arrays = (documents.ids, documents.lengths, documents.sequences)
                for name, array in zip(names, arrays, strict=False):
                    assert array is not None, name
                    self._write(name, array.data)
        counted = columns[0].lengths if columns[0].sequences is None else columns[0].sequences
        self._documents += counted.size

    def skip(self, records: Sequence[BadRecord]) -> None:
        """Set bad records aside."""
        with writing(self._path("skipped")):
            if "skipped" not in self._open:
                self._open["skipped"] = self._stack.enter_context(self._aside("skipped").open("wb"))
            for record in records:
                self._write("skipped", (json.dumps(record._asdict(), ensure_ascii=False) + "\n").encode())
        self._skipped += len(records)

    def _write(self, name: str, data: bytes | memoryview) -> None:
        self._open[name].write(data)
        self._checksums[name] = zlib.crc32(data, self._checksums.get(name, 0))

    def finish(self) -> PartRecord:
        """Name all files, and write the record that makes them a part."""
        with writing(self._path("part")):
            self._stack.close()
            sizes, checksums = {}, {}
            for name in self._open:
                path = self._path(name)
                sizes[path.name] = self._aside(name).stat().st_size
                checksums[path.name] = self._checksums.get(name, 0)
                self._aside(name).replace(path)
            record = PartRecord(
                number=self._number,
                documents=self._documents,
                skipped=self._skipped,
                sizes=sizes,
                checksums=checksums,
            )
            self._aside("part").write_text(json.dumps(asdict(record)), encoding="utf-8")
            self._aside("part").replace(self._path("part"))
        return record


class WorkFolder:
    """PREFIX.partial, owned by one run at a time."""

    def __init__(self, output_prefix: str) -> None:
        self.path = Path(f"{output_prefix}.partial")

    @contextmanager
    def claimed(self, *, restart: bool) -> Iterator[WorkFolder]:
        """Own the folder; on leaving remove it, unless parts are finished that a later run can use.

        Raises:
            DataError: another run owns it, or it is somebody else's folder.
        """
        lock = self.path / "lock"
        if self.path.exists() and (not self.path.is_dir() or (any(self.path.iterdir()) and not lock.exists())):
            raise DataError(
                f"{self.path}: is in the way; unfinished work is kept there: move it, or choose another prefix."
            )
        with writing(lock):
            self.path.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        with file:
            _own(file, self.path)
            for path in self.path.iterdir():
                if path != lock and (restart or ".partial-" in path.name):
                    path.unlink()
            try:
                yield self
            finally:
                if not any(self.path.glob("*.part")):
                    shutil.rmtree(self.path, ignore_errors=True)

    def discard(self) -> None:
        """Drop the finished parts: the output is whole, or they are of no use; the folder goes when it is left."""
        for path in self.path.glob("*.part"):
            path.unlink()

    def check_plan(self, plan: Mapping[str, Any]) -> None:
        """Compare the plan with that of the finished parts, or record it where there is none.

        Raises:
            DataError: says what differs.
        """
        path = self.path / "plan"
        plan = json.loads(json.dumps(plan))  # as it will be read back
        finished = sum(1 for _ in self.path.glob("*.part"))
        if path.exists() and finished:
            before = json.loads(path.read_text(encoding="utf-8"))
            if (change := difference(before, plan)) is not None:
                raise DataError(
                    f"{change} {finished:,} finished parts in {self.path} were made with what was there before: "
                    "put it back to continue, or drop them with --restart."
                )
        with writing(path):
            write_whole(path, json.dumps(plan, ensure_ascii=False))

    def finished(self, *, num_keys: int, clean: bool) -> Finished:
        """Read the records of the parts whose files are all there, unharmed; drop the others.

        Args:
            clean: drop parts with skipped records, which are to be met again.
        """
        records: dict[int, PartRecord] = {}
        joined, ends = 0, (0,) * num_keys
        for path in sorted(self.path.glob("*.part")):
            record = _read_record(path)
            if record is None or (clean and record.skipped) or not self._is_unharmed(record):
                path.unlink()
                continue
            ids = [self.part_file(record.number, key, "bin") for key in range(num_keys)]
            if not all(file.exists() for file in ids):
                # Ids are appended to all joined files, in the order of parts, before the first of them is dropped.
                after = tuple(end + record.sizes.get(file.name, 0) for end, file in zip(ends, ids, strict=True))
                if record.number != joined or not self._hold(after):
                    path.unlink()
                    continue
                joined, ends = joined + 1, after
            records[record.number] = record
        return Finished(records, joined, ends)

    def _is_unharmed(self, record: PartRecord) -> bool:
        """Compare a part's files with its record; those of ids may be gone."""
        for name, size in record.sizes.items():
            path = self.path / name
            if path.exists():
                if path.stat().st_size != size or _checksum(path) != record.checksums[name]:
                    return False
            elif path.suffix != ".bin":
                return False
        return True

    def _hold(self, sizes: Sequence[int]) -> bool:
        """Say whether the joined files have at least these sizes."""
        files = [self.joined_file(key) for key in range(len(sizes))]
        return all(file.exists() and file.stat().st_size >= size for file, size in zip(files, sizes, strict=True))

    def take_back(self, key: int, pair: Path) -> None:
        """Take back the joined ids of a pair that was half published when the run was ended.

        Args:
            pair: path of the pair without .bin and .idx.
        """
        joined, published = self.joined_file(key), bin_path(pair)
        begun = self.is_finished(0) and not self.part_file(0, key, "bin").exists()
        if begun and not joined.exists() and not manifest_path(pair).exists() and published.exists():
            with writing(published):
                published.replace(joined)

    def is_finished(self, number: int) -> bool:
        """Say whether a part is there, with all its files."""
        return (self.path / f"{number:08d}.part").exists()

    def part_file(self, number: int, key: int, ending: str) -> Path:
        """Name a file of a part."""
        return self.path / f"{number:08d}.{key}.{ending}"

    def joined_file(self, key: int) -> Path:
        """Name the file that the ids of parts are joined in."""
        return self.path / f"joined.{key}.bin"

    def skipped_file(self, number: int) -> Path:
        """Name the file of a part's skipped records."""
        return self.path / f"{number:08d}.skipped"


def _own(lock: IO[str], folder: Path) -> None:
    """Lock a file until this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:  # some network file systems; the run is then the user's to keep apart
            return
        raise DataError(
            f"{folder}: another run is writing there; wait for it or choose another prefix "
            "(under mpiexec or srun, give --mpi)."
        ) from error


def _read_record(path: Path) -> PartRecord | None:
    """Read a part's record; None unless it is whole."""
    try:
        record = PartRecord(**json.loads(path.read_text(encoding="utf-8")))
        return record if record.sizes.keys() == record.checksums.keys() else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _checksum(path: Path) -> int:
    """Find the CRC-32 of a file."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say the first thing that differs between two plans, or None."""
    for name in sorted({*before, *now} - {"inputs"}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            key = next(key for key in (*old, *new) if old.get(key) != new.get(key))
            name = f"--{key.replace('_', '-')}" if name == "option" else f"{name}: {key}"
            old, new = old.get(key), new.get(key)
        if old != new:
            return f"{name} is {new!r}, was {old!r}."
    old_inputs = {path: rest for path, *rest in before.get("inputs", [])}
    new_inputs = {path: rest for path, *rest in now.get("inputs", [])}
    for path, rest in new_inputs.items():
        if path not in old_inputs:
            return f"{path}: was not among the inputs."
        if rest != old_inputs[path]:
            size, was = rest[0], old_inputs[path][0]
            sizes = f"{size:,} bytes, was {was:,}" if size != was else "another time of change or content, same size"
            return f"{path}: has changed ({sizes})."
    if missing := next((path for path in old_inputs if path not in new_inputs), None):
        return f"{missing}: is no longer among the inputs."
    return None if list(old_inputs) == list(new_inputs) else "the inputs are in another order."
