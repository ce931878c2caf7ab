"""From a TOML file and a command line to one `Config`, or to every reason why not. The only door to tyro.

Order of precedence: class default < file < command line. In TOML, which has no null, and on the command
line, the word "none" stands for None.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, make_dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from megatron_ext.config.blend_file import read_blend
from megatron_ext.config.tree import Config
from megatron_ext.errors import ConfigError

_T = TypeVar("_T")
_BUNDLED = Path(__file__).resolve().parents[2] / "configs"
_SINGULAR = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_PLURAL = {int: "integers", float: "numbers", str: "strings"}


class CommandLine(NamedTuple):
    """What an entry point was asked to do."""

    config: Config
    config_path: Path
    dry_run: bool
    """Describe the run and start nothing."""
    world_size: int | None
    """Processes to describe it for; only with dry_run."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    """One training run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print what the run would be (sizes, memory, schedule, layout) and start nothing."""
    world_size: int | None = None
    """Number of processes to describe, with --dry_run."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, then apply overrides such as ("--train.train_iters", "10").

    Raises:
        ConfigError: with every problem of the file, or else every problem of the overrides.
    """
    before = _read(path)
    return read_blend(_override(Config, before, overrides), base=before.data)


def config_from_dict(values: Mapping[str, Any], *, source: str = "config") -> Config:
    """Build the tree from nested tables, as TOML or JSON reads them (None, too, is taken for None).

    Raises:
        ConfigError: every unknown, missing or ill-typed key, each prefixed by `source`.
    """
    problems: list[str] = []
    config = _build(Config, values, "", problems)
    if config is None:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return read_blend(config)


def parse_command_line(argv: Sequence[str], *, prog: str, description: str) -> CommandLine:
    """Parse `CONFIG [--dry_run] [--world_size N] [--section.field VALUE ...]`.

    --help prints and leaves by SystemExit(0): about the program without a CONFIG, about every field with one.

    Raises:
        ConfigError: CONFIG or an option is not sound; the configuration's own rules are `checks.py`'s.
    """
    before, name, after = _split_at_config(argv)
    wants_help = any(word in ("-h", "--help") for word in (*before, *after))
    if name is None:
        if wants_help:
            print(_program_help(prog, description))
            raise SystemExit(0)
        raise ConfigError(
            f"CONFIG is missing; name a TOML file or a bundled config ({_bundled_list()}), or see {prog} --help."
        )
    path = find_config(name)
    defaults = _Options(config=_read(path))
    if wants_help:
        tyro.cli(
            _Options,
            default=defaults,
            args=["--help"],
            prog=f"{prog} {name}",
            description=f"{description}\n\nDefaults are the values of {path}.",
            use_underscores=True,
        )
    options = _override(_Options, defaults, [*before, *after])
    if options.world_size is not None and not options.dry_run:
        raise ConfigError(
            "command line: --world_size has no effect without --dry_run; the launcher starts the processes."
        )
    if options.world_size is not None and options.world_size < 1:
        raise ConfigError(f"command line: --world_size ({options.world_size}) must be at least 1.")
    config = read_blend(options.config, base=defaults.config.data)
    return CommandLine(config, path, options.dry_run, options.world_size)


def find_config(name: str) -> Path:
    """Find a TOML file by its path, or a bundled config by its name alone (`pints_1.5b_2k`).

    Raises:
        ConfigError: there is neither; names those that come close.
    """
    path = Path(name)
    if path.is_file():
        return path
    bare = name.removesuffix(".toml")
    if path.name == name and bare in _bundled_names():
        return _BUNDLED / f"{bare}.toml"  # also where a folder has that name: the demo works in demo/
    if path.is_dir():
        inside = path / "config.toml"
        hint = f"did you mean {inside}?" if inside.is_file() else "name a TOML file."
        raise ConfigError(f"{name}: is a folder; {hint}")
    raise ConfigError(
        f"{name}: no such file, and no bundled config of that name;"
        f"{_did_you_mean(Path(bare).name, _bundled_names())} bundled are {_bundled_list()}."
    )


def to_toml(config: Config) -> str:
    """Write the whole tree as TOML, defaults included; reading it gives the same tree."""
    lines, sections = [], []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            sections += ["", f"[{field.name}]"]
            sections += [f"{leaf.name} = {_toml(getattr(value, leaf.name))}" for leaf in fields(value)]
        else:
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join([*lines, *sections, ""])


def expected_type(annotation: Any) -> str:
    """Say in words what a field takes: `an integer or "none"`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return f'{expected_type(arguments[0])} or "none"'
    if origin is Literal:
        return f"one of {', '.join(map(_toml, arguments))}"
    if origin is tuple:
        several = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"an array of {several}{_PLURAL[arguments[0]]}"
    return _SINGULAR[annotation]


def _read(path: Path) -> Config:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}; strings need quotes, and true, false and numbers have none."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return config_from_dict(values, source=str(path))


def _build(cls: type[_T], table: Mapping[str, Any], path: str, problems: list[str]) -> _T | None:
    """Build one dataclass of the tree; add what is wrong to `problems` and return None then."""
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    before = len(problems)
    problems += [f"{path}{key}: {_unknown(key, path, hints)}" for key in table if key not in hints]
    for field in fields(cls):  # type: ignore[arg-type]
        name, annotation = field.name, hints[field.name]
        where = f"{path}{name}"
        if isinstance(annotation, type) and is_dataclass(annotation):
            required = [leaf.name for leaf in fields(annotation) if leaf.default is MISSING]
            if name not in table and field.default_factory is MISSING:
                problems.append(f"{where}: missing; add a table [{name}] with {', '.join(required)}.")
            elif name in table and not isinstance(table[name], Mapping):
                problems.append(f"{where}: {_toml(table[name])} is not a table; write it as [{name}].")
            elif name in table:
                built[name] = _build(annotation, table[name], f"{where}.", problems)
        elif name in table:
            try:
                built[name] = _convert(annotation, table[name])
            except TypeError:
                problems.append(f"{where}: {_mismatch(annotation, table[name])}")
        elif field.default is MISSING:
            problems.append(f"{where}: missing; it must be {expected_type(annotation)}.")
    return cls(**built) if len(problems) == before else None


def _convert(annotation: Any, value: Any) -> Any:
    """Return `value` as the annotation has it; an integer does for a number, nothing else is bent.

    Raises:
        TypeError: it is something else.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return None if value in (None, "none") else _convert(arguments[0], value)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(kinds) == len(value):
                return tuple(_convert(kind, item) for kind, item in zip(kinds, value, strict=True))
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise TypeError(value)


def _mismatch(annotation: Any, value: Any) -> str:
    message = f"{_toml(value)} is not {expected_type(annotation)}"
    for meant in _perhaps_meant(annotation, value):
        try:
            return f"{message}; write {_toml(_convert(annotation, meant))}."
        except TypeError:
            continue
    return f"{message}."


def _perhaps_meant(annotation: Any, value: Any) -> Iterator[Any]:
    yield [value]
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, str):
        try:
            yield tomllib.loads(f"value = {value.lower()}")["value"]
        except tomllib.TOMLDecodeError:
            yield from difflib.get_close_matches(value, _choices(annotation), 1)


def _choices(annotation: Any) -> list[str]:
    leaves = [annotation, *get_args(annotation)]
    return [choice for leaf in leaves if get_origin(leaf) is Literal for choice in get_args(leaf)]


def _unknown(key: str, path: str, known: Mapping[str, Any]) -> str:
    homes = [name.rpartition(".")[0] for name in _leaves(Config) if name.rpartition(".")[2] == key]
    if homes:
        where = f"[{homes[0]}]" if homes[0] else "the top of the file, above the first table"
        return f"unknown key; it belongs in {where}."
    kind = "key" if path else "section or key"
    close = _did_you_mean(key, list(known)) or f" known are {', '.join(known)}."
    return f"unknown {kind};{close}"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 3, 0.7)
    return f" did you mean {' or '.join(', '.join(close).rsplit(', ', 1))}?" if close else ""


def _leaves(cls: Any, path: str = "") -> dict[str, Any]:
    """Map `section.field` to its annotation, for every leaf of the tree (and of `_Options`)."""
    leaves: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls).items():
        if is_dataclass(annotation):
            leaves |= _leaves(annotation, "" if annotation is Config else f"{path}{name}.")
        else:
            leaves[f"{path}{name}"] = annotation
    return leaves


def _override(cls: type[_T], default: _T, words: Sequence[str]) -> _T:
    """Apply command-line words to a tree. Every problem is named; tyro converts the values."""
    known = _leaves(cls)
    problems: list[str] = []
    overrides: dict[str, list[str]] = {}
    for option, values in _group(words, problems):
        name, negated = option.replace("-", "_"), False
        section, dot, leaf = name.rpartition(".")
        if name not in known and known.get(f"{section}{dot}{leaf.removeprefix('no_')}") is bool:
            name, negated = f"{section}{dot}{leaf.removeprefix('no_')}", True
        if name not in known:
            same = [f"--{other}" for other in known if other.rpartition(".")[2] == leaf]
            close = f" did you mean {same[0]}?" if same else _did_you_mean(f"--{name}", [f"--{n}" for n in known])
            problems.append(f"command line: --{option}: unknown option;{close or ' --help lists them all.'}")
        elif name in overrides:
            problems.append(f"command line: --{option}: given twice; give it once.")
        else:
            overrides[name] = _tyro_words(name, values, known[name], negated=negated)
    if problems:
        raise ConfigError(problems)
    try:
        words = [word for group in overrides.values() for word in group]
        return _quietly(lambda: tyro.cli(cls, default=default, args=words, use_underscores=True))
    except ValueError:
        refused = list(_refused(overrides, known))
        # Never an error without a word, should a value pass alone and not among the others.
        raise ConfigError(refused or f"command line: {' '.join(words)}: not understood; see --help.") from None


def _group(words: Sequence[str], problems: list[str]) -> list[tuple[str, list[str]]]:
    """Split `--a 1 --b=2 3` into [("a", ["1"]), ("b", ["2", "3"])]."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            groups.append((option, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            problems.append(f"command line: {word}: unexpected; options are written --section.field VALUE.")
    return groups


def _tyro_words(name: str, values: list[str], annotation: Any, *, negated: bool) -> list[str]:
    """Spell an override as tyro wants it: flags without a value, None with a capital."""
    said = [value.lower() for value in values]  # Python's spelling, True, does as well as TOML's
    if annotation is bool and (not said or said in (["true"], ["false"])):
        section, dot, leaf = name.rpartition(".")
        return [f"--{name}" if (said != ["false"]) != negated else f"--{section}{dot}no_{leaf}"]
    if values == ["none"] and type(None) in get_args(annotation):
        values = ["None"]
    # One word, so that a value may begin with a dash.
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _quietly(parse: Callable[[], _T]) -> _T:
    """Turn tyro's way of refusing (it prints a box, whatever console_outputs says) into ValueError."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return parse()
        except SystemExit as refusal:
            raise ValueError(refusal.code) from None


def _refused(overrides: Mapping[str, list[str]], known: Mapping[str, Any]) -> Iterator[str]:
    """Ask tyro about each value alone, because it stops at the first that it cannot take."""
    for name, words in overrides.items():
        values = [*([words[0].partition("=")[2]] if "=" in words[0] else []), *words[1:]]
        if known[name] is bool and not values:
            continue
        one_value = make_dataclass("one_value", [("value", known[name])])
        spelled = [f"--value={values[0]}"] if len(values) == 1 else ["--value", *values]
        try:
            _quietly(partial(tyro.cli, one_value, args=spelled))
        except ValueError:
            wanted = expected_type(known[name]).removeprefix("an array of ")
            given = f"{' '.join(values)} is not" if values else "needs"
            yield f"command line: --{name}: {given} {wanted}."


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON escapes as TOML does, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "a table"
    return repr(value) if isinstance(value, int | float) else str(value)


def _split_at_config(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Find CONFIG: the first word that is neither an option nor the value of --world_size."""
    position = 0
    while position < len(argv) and argv[position].startswith("-"):
        if argv[position] not in ("-h", "--help"):
            option = argv[position].partition("=")[0].replace("-", "_")
            if option not in ("__dry_run", "__world_size"):
                raise ConfigError(f"CONFIG must come before {argv[position]}; see --help.")
            position += argv[position] in ("--world_size", "--world-size")
        position += 1
    if position >= len(argv):
        return list(argv), None, []
    return list(argv[:position]), argv[position], list(argv[position + 1 :])


def _bundled_names() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in _BUNDLED.glob("*.toml"))


def _bundled_list() -> str:
    return ", ".join(_bundled_names()) or "none, because configs/ is not beside the package"


def _program_help(prog: str, description: str) -> str:
    names = _bundled_names()
    width = max((len(name) for name in names), default=0)
    listed = []
    for name in names:
        with (_BUNDLED / f"{name}.toml").open(encoding="utf-8") as file:
            listed.append(f"  {name:<{width}}  {file.readline().lstrip('#').strip()}")
    return "\n".join(
        [
            f"usage: {prog} CONFIG [--dry_run] [--world_size N] [--SECTION.FIELD VALUE ...]",
            "",
            description,
            "",
            "  CONFIG                 a TOML file, or the name of a bundled config",
            "  --dry_run              print sizes, memory, schedule and layout, and start nothing",
            "  --world_size N         number of processes to describe, with --dry_run",
            "  --SECTION.FIELD VALUE  override any field; none stands for no value, and",
            "                         --SECTION.no_FIELD switches a flag off",
            f"  {prog} CONFIG --help   lists every field, with the values of CONFIG as defaults",
            "",
            "examples:",
            f"  python {prog} pints_1.5b_2k --dry_run --world_size 8",
            f"  python {prog} configs/tlm_xs.toml --train.micro_batch_size 8 --checkpoint.keep_last 3",
            f"  torchrun --nproc-per-node 8 {prog} pints_1.5b_2k --precision.dtype fp8",
            "",
            "bundled configs:",
            *listed,
        ]
    )
