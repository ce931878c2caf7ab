"""What there is to read: files, folders, patterns, lists and standard input become files, and files units of work.

Nothing is scanned beforehand: a plain file is cut at byte positions, whose lines the reader finds, and a
Parquet file by its footer. The units depend on the files alone, never on who works on them.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from megatron_ext.durable import aside_path, publish
from megatron_ext.errors import DataError
from tools.preprocessing.compression import recognise, unpack

if TYPE_CHECKING:
    import pyarrow

STANDARD_INPUT = "-"

_PACKED = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

ENDINGS: dict[str, tuple[str, str | None]] = {
    ".parquet": ("parquet", None),
    ".arrow": ("arrow", None),
    **{text + packed: ("jsonl", _PACKED[packed]) for text in (".jsonl", ".json", ".ndjson") for packed in _PACKED},
}
"""Format and compression by the ending of a name."""

_KNOWN = ".jsonl, .json, .ndjson (also .gz, .zst, .bz2), .parquet, .arrow"

_OTHER_PACKINGS = (".xz", ".lz4", ".br", ".zip", ".7z", ".lzma", ".sz", ".tar")

_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file to read."""

    path: str
    """As given, or below the folder that was given."""
    format: str
    """"jsonl", "parquet" or "arrow"."""
    compression: str | None
    """None, "gzip", "zstd" or "bz2"; only JSON Lines are packed as a whole."""
    size: int
    """Bytes on disk."""
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A piece of work: some of a file's records.

    Plain JSON Lines: the lines that begin in the bytes [start, end). Packed JSON Lines: the whole file, (0, size).
    Parquet: the row groups [start, end). Arrow: the record batches [start, end).
    """

    number: int
    """Place in the order of all units, from 0."""
    file: InputFile
    start: int
    end: int
    weight: int
    """Bytes on disk; the weights of a file's units add up to its size."""


def find_inputs(words: Sequence[str], *, lists: Sequence[str] = (), spool: Path | None = None) -> list[InputFile]:
    """Find the files that `words` and `lists` name, in order, and look at the head of each.

    A word is a file, a folder (walked down, in the order of names; hidden files, names that begin with "_" and
    endings that are not known are passed over), a folder written by `save_to_disk` of Hugging Face's `datasets`,
    a pattern (`*`, `?`, `[...]`, `**`), or "-" for standard input.

    Args:
        words: what to read; relative paths are relative to the current folder.
        lists: files with a word per line; blank lines and lines that begin with "#" are passed over.
        spool: file that standard input is copied to, for it to be read like any other.

    Raises:
        DataError: a word that names nothing that can be read, or a file that is named twice.
    """
    if list(words).count(STANDARD_INPUT) > 1:
        raise DataError("standard input (-): is there twice; name each input once.")
    files: list[InputFile] = []
    seen: dict[tuple[int, int], str] = {}
    for word in (*words, *_read_lists(lists)):
        for file in _files_of(word, spool):
            status = os.stat(file.path)
            first = seen.setdefault((status.st_dev, status.st_ino), file.path)
            if len(seen) <= len(files):
                same = "" if first == file.path else f" (as {first})"
                raise DataError(f"{file.path}: is there twice{same}; name each input once.")
            files.append(file)
    if not files:
        raise DataError("no input is named; give files, folders, patterns, or - for standard input.")
    return files


def _read_lists(lists: Sequence[str]) -> Iterator[str]:
    """Read the words of list files."""
    for path in lists:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of inputs ({_reason(error)}).") from error
        words = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not words:
            raise DataError(f"{path}: names no input; it must hold a path per line.")
        if STANDARD_INPUT in words:
            raise DataError(f"{path}: names standard input (-); name that on the command line.")
        yield from words


def _files_of(word: str, spool: Path | None) -> Iterator[InputFile]:
    """Find the files of one word."""
    if word == STANDARD_INPUT:
        yield _spool(sys.stdin.buffer, spool)
    elif os.path.lexists(word):
        yield from _folder(word) if os.path.isdir(word) else [_file(word)]
    elif glob.has_magic(word):
        found = sorted(glob.glob(word, recursive=True))
        if "**" in word:  # which finds folders and what is in them
            found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise DataError(f"{word}: no file fits this pattern.")
        for path in found:
            yield from _folder(path) if os.path.isdir(path) else [_file(path)]
    else:
        raise DataError(f"{word}: there is no such file or folder.")


def _reason(error: Exception) -> str:
    """Say an error in short."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


# ------------------------------------------------------------------------------------------------ folders


class _Walk(NamedTuple):
    files: list[InputFile]
    passed_over: set[str]
    """Endings that are not known."""


def _folder(path: str) -> list[InputFile]:
    """Find the files of a folder."""
    walk = _Walk([], set())
    _walk(path, walk, (os.path.realpath(path),))
    if not walk.files:
        there = f"; endings there: {', '.join(sorted(walk.passed_over))}" if walk.passed_over else ""
        raise DataError(f"{path}: holds no input{there}; known are {_KNOWN}.")
    return walk.files


def _walk(folder: str, walk: _Walk, above: tuple[str, ...]) -> None:
    """Collect the files below a folder, in the order of names; `above` are the real paths from the top to here."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({_reason(error)}).") from error
    if (saved := _saved_dataset(folder, names)) is not None:
        walk.files.extend(saved)
        return
    for name in names:
        if name.startswith((".", "_")):
            continue
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            real = os.path.realpath(path)
            if real not in above:  # a link to a folder that it lies in leads round for ever
                _walk(path, walk, (*above, real))
        elif _format_of(name):
            walk.files.append(_file(path))
        elif any(f"{text}." in name.lower() for text in (".jsonl", ".ndjson")) and name.endswith(_OTHER_PACKINGS):
            raise DataError(f"{path}: is packed in a way that is not known here; known are {_KNOWN}.")
        else:
            walk.passed_over.add(os.path.splitext(name)[1] or name)


def _saved_dataset(folder: str, names: Sequence[str]) -> list[InputFile] | None:
    """List the data of a folder that `datasets`' save_to_disk wrote; None if it is no such folder."""
    if "dataset_dict.json" in names:
        splits = _load_json(os.path.join(folder, "dataset_dict.json")).get("splits")
        found = ", ".join(os.path.join(folder, str(split)) for split in splits) if isinstance(splits, list) else "?"
        raise DataError(f"{folder}: is a dataset of several splits; name those to read: {found}.")
    if "state.json" not in names or "dataset_info.json" not in names:
        return None
    state = _load_json(os.path.join(folder, "state.json"))
    if state.get("_indices_data_files"):  # datasets 1.x
        raise DataError(
            f"{folder}: is a selection of rows of a dataset; write it whole: flatten_indices(), save_to_disk()."
        )
    try:
        data = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder}/state.json: does not list the dataset's files; save the dataset again.") from error
    if not data:
        raise DataError(f"{folder}: is a dataset without data.")
    return [_file(os.path.join(folder, name)) for name in data]


def _load_json(path: str) -> dict[str, Any]:
    """Load one of a dataset folder's own files."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); save the dataset again.") from error
    return content if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------------ files


def _format_of(name: str) -> tuple[str, str | None] | None:
    """Tell format and compression by the ending of a name."""
    lower = name.lower()
    return next((found for ending, found in ENDINGS.items() if lower.endswith(ending)), None)


def _file(path: str) -> InputFile:
    """Look at a file that must be readable and of a known format."""
    found = _format_of(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: is no regular file; pipe it in and name it - (standard input).")
        if found is None:
            raise DataError(f"{path}: its ending is not known; known are {_KNOWN}.")
        with open(path, "rb") as file:
            _check_head(file, path, *found, size=status.st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}).") from error
    return InputFile(path=path, format=found[0], compression=found[1], size=status.st_size, mtime_ns=status.st_mtime_ns)


def _check_head(file: BinaryIO, path: str, form: str, compression: str | None, *, size: int) -> None:
    """Check that a file is what its name says.

    Raises:
        DataError: it is not.
    """
    head = file.read(_HEAD_BYTES)
    known = recognise(head)
    found = known.name if known else "neither text nor anything known" if b"\0" in head else "text"
    if form in ("parquet", "arrow"):
        if found != f"{form.capitalize()} data":
            found = found if size else "empty"
            raise DataError(f"{path}: is no {form.capitalize()} file ({found}); name it after what it is.")
        return
    if not size:
        return
    if compression:
        if known is None or known.compression != compression:
            raise DataError(f"{path}: is not {compression} data ({found}); name it after what it is.")
        file.seek(0)
        head = next(unpack(file, compression, path=path), b"")
        known = recognise(head)
        found = f"{compression} data that hold {known.name if known else 'no text'}"
    if known or b"\0" in head[:_HEAD_BYTES]:
        raise DataError(f"{path}: is no text ({found}), must be JSON Lines; name it after what it is.")
    _check_lines(head, path)


def _check_lines(head: bytes, path: str) -> None:
    """Refuse JSON that is not one object a line, which every line of it would otherwise say."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"["):
        what, mend = "one JSON array", ".[]"
    elif text.partition(b"\n")[0].strip() == b"{" and len(text) > 2:
        what, mend = "JSON with objects over several lines", "."
    else:
        return
    raise DataError(
        f"{path}: is {what}, must be JSON Lines (an object per line); mend it: jq -c '{mend}' FILE > FILE.jsonl"
    )


def _spool(source: BinaryIO, spool: Path | None) -> InputFile:
    """Copy standard input to a file; what it is, its first bytes tell."""
    if spool is None:
        raise DataError("standard input (-): cannot be read here, for there is no file to keep it in.")
    if source.isatty():
        raise DataError("standard input (-): is a terminal; pipe JSON Lines in, or name files.")
    spool.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(spool)
    try:
        with aside.open("wb") as file:
            while block := source.read(1 << 20):
                file.write(block)
        publish(aside, spool)
    except OSError as error:
        raise DataError(f"{spool}: standard input cannot be copied here ({_reason(error)}).") from error
    finally:
        aside.unlink(missing_ok=True)
    with spool.open("rb") as file:
        known = recognise(file.read(_HEAD_BYTES))
        form = "parquet" if known and known.name == "Parquet data" else "jsonl"
        compression = known.compression if known else None
        status = os.fstat(file.fileno())
        file.seek(0)
        _check_head(file, "standard input", form, compression, size=status.st_size)
    return InputFile(
        path=str(spool), format=form, compression=compression, size=status.st_size, mtime_ns=status.st_mtime_ns
    )


# ------------------------------------------------------------------------------------------------ units


def cut_into_units(files: Sequence[InputFile], *, unit_bytes: int) -> list[Unit]:
    """Cut files into units of about `unit_bytes` on disk; empty files give none.

    Raises:
        DataError: a Parquet or Arrow file is damaged.
    """
    assert unit_bytes > 0, unit_bytes
    units: list[Unit] = []
    for file in files:
        for start, end, weight in _spans(file, unit_bytes):
            units.append(Unit(number=len(units), file=file, start=start, end=end, weight=weight))
    return units


def _spans(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Give (start, end, weight) of each unit of a file."""
    if file.format != "jsonl":
        sizes = _row_group_bytes(file) if file.format == "parquet" else _record_batch_bytes(file)
        yield from _group(sizes, file.size, unit_bytes)
    elif file.compression is None:
        for start in range(0, file.size, unit_bytes):
            end = min(start + unit_bytes, file.size)
            yield start, end, end - start
    elif file.size:
        yield 0, file.size, file.size


def _group(sizes: Sequence[int], file_bytes: int, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Group neighbours whose `sizes` are known up to a factor; the weights add up to `file_bytes`."""
    total = max(sum(sizes), 1)
    start = before = done = 0
    for end, size in enumerate(sizes, start=1):
        done += size
        place = file_bytes * done // total if end < len(sizes) else file_bytes
        if place - before >= unit_bytes or end == len(sizes):
            yield start, end, place - before
            start, before = end, place


def _row_group_bytes(file: InputFile) -> list[int]:
    """Give the bytes of each row group of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file.path)
        return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: is no whole Parquet file ({error}); fetch or write it again.") from error


def _record_batch_bytes(file: InputFile) -> list[int]:
    """Give the bytes of each record batch of an Arrow file; reads no more than their headers."""
    return [batch.nbytes for batch in record_batches(file)]


def record_batches(file: InputFile) -> Iterator[pyarrow.RecordBatch]:
    """Go through the record batches of an Arrow file, mapped into memory; stream and file format alike.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(file.path) as source:
            if source.read(6) == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: is no whole Arrow file ({error}); fetch or write it again.") from error
