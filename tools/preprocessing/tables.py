"""Read units of Parquet and Arrow files: only the wanted columns, a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_ext.data.records import missing_name
from megatron_ext.errors import DataError
from tools.preprocessing.batches import BadRecord, Batch, say_id, shorten
from tools.preprocessing.inputs import Unit, record_batches

if TYPE_CHECKING:
    import pyarrow

MAX_ROWS = 8192
"""Rows at a time, whatever their size: the sizes in a footer are those of encoded values, which repeat for less."""

_READ_BYTES = 1 << 20


class _Part(NamedTuple):
    """Some neighbouring rows of the wanted columns."""

    rows: pyarrow.RecordBatch
    first: int
    """Number of the first row in the file, from 0."""
    weight: int


def read_table(unit: Unit, keys: tuple[str, ...], id_key: str | None, batch_bytes: int) -> Iterator[Batch]:
    """Read a unit; see `read_unit`."""
    parts = _parquet_parts if unit.file.format == "parquet" else _arrow_parts
    names = list(dict.fromkeys((*keys, *([id_key] if id_key else []))))
    for part in parts(unit, keys, names, batch_bytes):
        yield _batch(part, unit.file.path, keys, id_key)


def _parquet_parts(unit: Unit, keys: tuple[str, ...], names: list[str], batch_bytes: int) -> Iterator[_Part]:
    """Read row groups in parts."""
    import pyarrow
    import pyarrow.parquet

    path = unit.file.path
    try:
        # A buffer size makes the library read a column's pages when they are due, not all of a row group's at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            _check_columns(file.schema_arrow, path, keys, names)
            groups = [file.metadata.row_group(number) for number in range(unit.end)]
            begin = sum(group.num_rows for group in groups[: unit.start])
            total = sum(group.num_rows for group in groups[unit.start :])
            columns = [group.column(number) for group in groups[unit.start :] for number in range(group.num_columns)]
            size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names)
            done = 0
            for rows in file.iter_batches(
                batch_size=_rows_at_a_time(total, size, batch_bytes),
                row_groups=range(unit.start, unit.end),
                columns=names,
                use_threads=False,
            ):
                yield _Part(rows, begin + done, _share(unit.weight, done, rows.num_rows, total))
                done += rows.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is damaged Parquet data ({error}); fetch or write it again.") from error


def _arrow_parts(unit: Unit, keys: tuple[str, ...], names: list[str], batch_bytes: int) -> Iterator[_Part]:
    """Read record batches in parts; those before the unit are passed over without being touched."""
    first = 0
    for number, batch in enumerate(record_batches(unit.file)):
        if number == unit.end:
            break
        if number >= unit.start:
            _check_columns(batch.schema, unit.file.path, keys, names)
            wanted = batch.select(names)
            weight = _share(unit.weight, number - unit.start, 1, unit.end - unit.start)
            step = _rows_at_a_time(wanted.num_rows, wanted.nbytes, batch_bytes)
            for done in range(0, wanted.num_rows, step):
                rows = wanted.slice(done, step)
                yield _Part(rows, first + done, _share(weight, done, rows.num_rows, wanted.num_rows))
        first += batch.num_rows


def _rows_at_a_time(rows: int, size: int, batch_bytes: int) -> int:
    """Say how many rows of that average size make a batch."""
    return min(max(batch_bytes * rows // max(size, 1), 1), MAX_ROWS)


def _share(weight: int, done: int, more: int, total: int) -> int:
    """Give the part of a weight that `more` of `total` stand for, after `done`; all parts add up to it."""
    return weight * (done + more) // total - weight * done // total


def _check_columns(schema: pyarrow.Schema, path: str, keys: tuple[str, ...], names: list[str]) -> None:
    """Check that the columns are there and those of `keys` hold text.

    Raises:
        DataError: they do not.
    """
    from pyarrow import types

    for name in names:
        if name not in schema.names:
            raise DataError(f"{path}: {missing_name(name, schema.names, 'column')}")
        kind = schema.field(name).type
        values = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)
        if name in keys and not is_text:
            raise DataError(f"{path}: column {name!r} is {kind}, must be text (string); cast it first.")


def _batch(part: _Part, path: str, keys: tuple[str, ...], id_key: str | None) -> Batch:
    """Take the texts out of rows."""
    columns = [_plain(part.rows.column(name)) for name in keys]
    if not any(column.null_count for column in columns):
        try:
            return Batch(tuple(column.to_pylist() for column in columns), [], part.weight)
        except UnicodeDecodeError:
            pass  # which row it is, the loop finds
    texts: tuple[list[str], ...] = tuple([] for _ in keys)
    bad: list[BadRecord] = []
    for row in range(part.rows.num_rows):
        try:
            values = _row_texts(columns, keys, row)
        except DataError as error:
            name = say_id(part.rows.column(id_key)[row].as_py()) if id_key else ""
            bad.append(BadRecord(f"{path}: row {part.first + row}{name}", str(error), _show_row(columns, keys, row)))
            continue
        for taken, value in zip(texts, values, strict=True):
            taken.append(value)
    return Batch(texts, bad, part.weight)


def _plain(column: pyarrow.Array) -> pyarrow.Array:
    """Give the values of a column that may be encoded by a dictionary."""
    import pyarrow

    return column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column


def _row_texts(columns: Sequence[pyarrow.Array], keys: Sequence[str], row: int) -> list[str]:
    """Take the texts out of one row.

    Raises:
        DataError: what is wrong with the row, without its place.
    """
    texts = []
    for key, column in zip(keys, columns, strict=True):
        try:
            text = column[row].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"column {key!r} is not UTF-8 (byte {error.start} of the text).") from error
        if text is None:
            raise DataError(f"column {key!r} is null, must be a string.")
        texts.append(text)
    return texts


def _show_row(columns: Sequence[pyarrow.Array], keys: Sequence[str], row: int) -> str:
    """Write a bad row as JSON."""
    cells = [column[row].as_buffer() for column in columns]
    texts = [None if cell is None else cell.to_pybytes().decode("utf-8", errors="backslashreplace") for cell in cells]
    return shorten(json.dumps(dict(zip(keys, texts, strict=True)), ensure_ascii=False))
