"""Read units of work: batches of texts, and the place of each record that holds none."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, BinaryIO

from megatron_ext.data.records import BYTE_ORDER_MARK, missing_name, record_texts
from megatron_ext.errors import DataError
from tools.preprocessing.batches import BadRecord, Batch, say_id, shorten
from tools.preprocessing.compression import unpack
from tools.preprocessing.inputs import InputFile, Unit, cut_into_units
from tools.preprocessing.tables import read_table

MAX_LINE_BYTES = 1 << 30
"""A longer line is no record of a corpus, but a file without line ends that would fill the memory."""

SAMPLE_PLACES = 16
"""Places that a sample is taken from."""

_PROBE_BYTES = 64 << 10


def read_unit(
    unit: Unit, *, keys: Sequence[str], id_key: str | None = None, batch_bytes: int = 1 << 20
) -> Iterator[Batch]:
    """Read the records of a unit, in order, `batch_bytes` of text at a time; memory stays around a few of these.

    Args:
        keys: top-level keys, or columns, each of which must hold a text.
        id_key: key or column whose value is told with a bad record.

    Raises:
        DataError: the file as a whole is damaged, lacks a column, or has changed since it was found.
    """
    path = unit.file.path
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read any more ({error.strerror}).") from error
    if size != unit.file.size:
        raise DataError(
            f"{path}: has changed since the run began ({size:,} bytes, was {unit.file.size:,}); "
            "run again when nothing writes to it."
        )
    if unit.file.format == "jsonl":
        return _JsonLines(unit, tuple(keys), id_key).read(batch_bytes)
    return read_table(unit, tuple(keys), id_key, batch_bytes)


def first_texts(files: Sequence[InputFile], *, keys: Sequence[str], limit_bytes: int) -> tuple[list[str], ...]:
    """Take a sample of the texts: up to `limit_bytes` characters in all, from several places of several files.

    The same files give the same sample. Bad records are passed over, and a text longer than its place's share
    is cut.

    Raises:
        DataError: a file is damaged or lacks a column.
    """
    whole = [file for file in files if file.size]
    chosen = [whole[number] for number in _spread(len(whole), SAMPLE_PLACES)]
    places = [unit for file in chosen for unit in _places(file, SAMPLE_PLACES // len(chosen))]
    sample: tuple[list[str], ...] = tuple([] for _ in keys)
    for unit in places:
        share = limit_bytes // len(places)
        left = [share // len(keys)] * len(keys)
        left_to_read = 8 * share  # there may be little text in much else
        for batch in read_unit(unit, keys=keys, batch_bytes=min(max(share, _PROBE_BYTES), 1 << 20)):
            for number, texts in enumerate(batch.texts):
                for text in texts:
                    if left[number] > 0:
                        sample[number].append(text[: left[number]])
                        left[number] -= len(text)
            left_to_read -= batch.weight
            if max(left) <= 0 or left_to_read <= 0:
                break
    return sample


def _places(file: InputFile, number: int) -> list[Unit]:
    """Cut a file into units and choose some, evenly."""
    units = cut_into_units([file], unit_bytes=max(-(-file.size // number), 1))
    return [units[place] for place in _spread(len(units), number)]


def _spread(length: int, number: int) -> list[int]:
    """Choose up to `number` of `length` places, evenly, the first among them."""
    number = min(length, number)
    return [length * place // number for place in range(number)]


class _JsonLines:
    """Reader of a unit of JSON Lines."""

    def __init__(self, unit: Unit, keys: tuple[str, ...], id_key: str | None) -> None:
        import orjson

        self._unit = unit
        self._path = unit.file.path
        self._keys = keys
        self._id_key = id_key
        self._loads: Callable[[bytes], Any] = orjson.loads
        self._get: Callable[[Any], Any] = itemgetter(*keys)

    def read(self, batch_bytes: int) -> Iterator[Batch]:
        """Read the unit."""
        with open(self._path, "rb", buffering=0) as file:
            if self._unit.file.compression is None:
                first = _line_start(file, self._unit.start, self._unit.file)
                stop = _line_start(file, self._unit.end, self._unit.file)
                pieces = _pieces(file, first, stop, batch_bytes, self._path)
            else:
                first = 0
                pieces = unpack(file, self._unit.file.compression, path=self._path)
            lines_done, read_before = 0, first
            for block in _whole_lines(pieces, batch_bytes, self._path):
                lines = block.split(b"\n")
                if not lines[-1]:
                    lines.pop()
                if first == 0 and lines_done == 0:
                    self._begin_file(lines)
                # What has been read and not been given yet belongs to the next batch, but for the progress it is done.
                yield self._batch(lines, first, lines_done, file.tell() - read_before)
                lines_done, read_before = lines_done + len(lines), file.tell()

    def _begin_file(self, lines: list[bytes]) -> None:
        """Drop the byte order mark; check the first record's id.

        Raises:
            DataError: the first record has no id, which is taken for a mistake of the name.
        """
        lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
        if self._id_key is None:
            return
        number, line = next(((n, line) for n, line in enumerate(lines, start=1) if line.strip()), (1, b""))
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return  # said of it as a bad record
        if isinstance(record, dict) and self._id_key not in record:
            raise DataError(f"{self._path}:{number}: {missing_name(self._id_key, record)}")

    def _batch(self, lines: list[bytes], first: int, lines_done: int, weight: int) -> Batch:
        """Take the texts out of lines."""
        columns = self._texts(lines)
        if columns is not None:
            return Batch(columns, [], weight)
        columns = tuple([] for _ in self._keys)
        bad: list[BadRecord] = []
        for number, line in enumerate(lines, start=lines_done + 1):
            if not line.strip():
                continue
            try:
                found = self._texts([line])
                texts = [column[0] for column in found] if found else record_texts(line, self._keys)
            except DataError as error:
                if self._unit.file.compression is None:
                    number += _lines_before(self._path, first)
                bad.append(BadRecord(f"{self._path}:{number}{self._id(line)}", str(error), shorten(line)))
                continue
            for column, text in zip(columns, texts, strict=True):
                column.append(text)
        return Batch(columns, bad, weight)

    def _texts(self, lines: list[bytes]) -> tuple[list[str], ...] | None:
        """Take the texts out of lines that are all good; None where one may not be.

        orjson refuses more than `json` does (NaN, deep nesting) and nothing less, lone surrogates among it, so what
        it takes needs no second look but at the types.
        """
        try:
            values = list(map(self._get, map(self._loads, lines)))
        except (ValueError, KeyError, TypeError):
            return None
        columns = (values,) if len(self._keys) == 1 else tuple(map(list, zip(*values, strict=True)))
        if any(set(map(type, column)) - {str} for column in columns):
            return None
        return columns

    def _id(self, line: bytes) -> str:
        """Say a bad record's id, if it can be read."""
        if self._id_key is None:
            return ""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return ""
        return say_id(record.get(self._id_key) if isinstance(record, dict) else None)


def _line_start(file: BinaryIO, offset: int, whole: InputFile) -> int:
    """Find where the first line begins that does not begin before `offset`; the file's size if there is none."""
    if offset == 0:
        return 0
    position = offset - 1  # a line that begins at `offset` has its predecessor's end there
    file.seek(position)
    while position < whole.size:
        probe = file.read(min(_PROBE_BYTES, whole.size - position))
        if not probe:
            raise _shorter(whole.path)
        if (found := probe.find(b"\n")) >= 0:
            return position + found + 1
        position += len(probe)
        if position - offset > MAX_LINE_BYTES:
            raise _no_lines(whole.path)
    return whole.size


def _pieces(file: BinaryIO, start: int, stop: int, size: int, path: str) -> Iterator[bytes]:
    """Read the bytes [start, stop)."""
    file.seek(start)
    while start < stop:
        piece = file.read(min(size, stop - start))
        if not piece:
            raise _shorter(path)
        start += len(piece)
        yield piece


def _whole_lines(pieces: Iterator[bytes], batch_bytes: int, path: str) -> Iterator[bytes]:
    """Put pieces together to blocks of whole lines, of about `batch_bytes`."""
    held: list[bytes] = []
    held_bytes = 0
    for piece in pieces:
        held_bytes += len(piece)
        cut = piece.rfind(b"\n") + 1 if held_bytes >= batch_bytes else 0
        if cut:
            yield b"".join((*held, piece[:cut]))
            held, held_bytes = [piece[cut:]], len(piece) - cut
        else:
            held.append(piece)
            if held_bytes > MAX_LINE_BYTES + batch_bytes:
                raise _no_lines(path)
    if held_bytes:
        yield b"".join(held)


@functools.lru_cache(maxsize=4)
def _line_counter(path: str) -> list[int]:
    """Give the place of a file up to which this process has counted, and the lines before it."""
    return [0, 0]


def _lines_before(path: str, offset: int) -> int:
    """Count the lines before a place: only bad records need it, and the units of a process come in order."""
    counted = _line_counter(path)
    if counted[0] > offset:
        counted[:] = 0, 0
    with open(path, "rb", buffering=0) as file:
        for piece in _pieces(file, counted[0], offset, 4 << 20, path):
            counted[1] += piece.count(b"\n")
    counted[0] = offset
    return counted[1]


def _shorter(path: str) -> DataError:
    return DataError(f"{path}: became shorter while it was read; run again when nothing writes to it.")


def _no_lines(path: str) -> DataError:
    return DataError(
        f"{path}: has a line of more than {MAX_LINE_BYTES >> 20} MiB; it must be JSON Lines, a record each."
    )
