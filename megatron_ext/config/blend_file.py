"""Read the sources of a run, and how much of each, from a TOML file of their own.

    [[source]]
    prefix = "data/textbooks_text_document"
    tokens = 25e9                            # of the whole run; or: weight = 3, or: epochs = 2

All rows count in the same thing. The rows take the place of data.train_data, data.train_weights and
data.train_weights_unit, so that a resolved configuration is complete without the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_ext.config.tree import Config, DataConfig
from megatron_ext.errors import ConfigError

_UNITS: dict[str, Literal["proportion", "tokens", "epochs"]] = {
    "weight": "proportion",
    "tokens": "tokens",
    "epochs": "epochs",
}
_SOURCES = ("train_data", "train_weights", "train_weights_unit")


def read_blend(config: Config, *, base: DataConfig | None = None) -> Config:
    """Put the rows of data.blend_file, where one is given, into the fields that they stand for.

    Args:
        config: the configuration, perhaps with a blend_file.
        base: the data section before blend_file was given on the command line, which replaces its sources;
            None: the file's own section.

    Raises:
        ConfigError: every problem of the file, or that the sources are given twice.
    """
    data = config.data
    if data.blend_file is None:
        return config
    if base is None:
        base = DataConfig(tokenizer=data.tokenizer)
    twice = [f"data.{name}" for name in _SOURCES if getattr(data, name) != getattr(base, name)]
    if twice:
        raise ConfigError(
            f"data.blend_file ({data.blend_file}) is given beside {' and '.join(twice)}, which it stands for; "
            "give one or the other."
        )
    path = Path(data.blend_file)
    rows = _read(path)
    problems = list(_problems(rows))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    (name,) = {name for row in rows for name in _UNITS if name in row}
    sources = replace(
        data,
        blend_file=None,
        train_data=tuple(row["prefix"] for row in rows),
        train_weights=tuple(float(row[name]) for row in rows),
        train_weights_unit=_UNITS[name],
    )
    return replace(config, data=sources)


def _read(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}; strings need quotes, and numbers have none.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"data.blend_file ({path}) cannot be read: {reason}.") from None
    unknown = [key for key in content if key != "source"]
    rows = content.get("source")
    if unknown or not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        found = f"holds {', '.join(unknown)}" if unknown else "holds no [[source]]"
        raise ConfigError(f"{path}: {found}; it must hold a table [[source]] for each prefix, and nothing else.")
    return rows


def _problems(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    """Say what is wrong with each row, and with all of them together."""
    known = ("prefix", *_UNITS)
    for number, row in enumerate(rows, start=1):
        where = f"source {number} ({row.get('prefix', 'without a prefix')})"
        for key in row:
            if key not in known:
                close = difflib.get_close_matches(key, known, 1)
                yield f"{where}: unknown key {key}; " + (
                    f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
                )
        if not isinstance(row.get("prefix"), str):
            yield f"{where}: prefix must be a string, the path of a .bin/.idx pair without ending."
        amounts = [name for name in _UNITS if name in row]
        if len(amounts) != 1:
            yield f"{where}: has {' and '.join(amounts) or 'no amount'}; give one of {', '.join(_UNITS)}."
        for name in amounts:
            if not isinstance(row[name], int | float) or isinstance(row[name], bool):
                yield f"{where}: {name} ({row[name]!r}) must be a number."
    used = [name for name in _UNITS if any(name in row for row in rows)]
    if len(used) > 1:
        yield f"some sources give {' and some '.join(used)}; count all in the same."
