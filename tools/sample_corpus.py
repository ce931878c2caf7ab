#!/usr/bin/env python3
"""Make a small corpus from text that every Python installation has, so that a first run needs no download.

Two sources: `code`, the `.py` files of the standard library and of the installed packages; `prose`, what
people wrote about them: documentation files, packages' descriptions, the language reference behind `help()`,
docstrings and comments. The same installation gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError
from tools.progress import Progress

MIN_CHARACTERS = 200
"""Shorter documents say too little."""

MAX_LINE = 1000
"""A file with a longer line is a table or generated."""

MAX_CHARACTERS = 400_000
"""A longer file is a table or generated."""

MIN_WORDLIKE = 0.75
"""Least share of letters and spaces in prose."""

MIN_COMMENT_LINES = 3
"""Comments of fewer lines are labels, not prose."""

TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test"})
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings"})
"""Installed packages are a root of their own, though they may lie inside the standard library's folder;
`encodings` is a hundred tables of character names."""
DOCUMENT_ENDINGS = frozenset({".rst", ".md", ".txt"})
DESCRIPTIONS = frozenset({"METADATA", "PKG-INFO"})
ENDINGS = DOCUMENT_ENDINGS | {".py"}
WORDLIKE = re.compile(r"(?:[^\W\d_]|\s)+")
TOPICS = ("pydoc_data", "topics.py")
"""The language reference as a module: prose in the form of code."""

EPILOG = """\
writes DIR/prose.train.jsonl, DIR/prose.valid.jsonl, DIR/code.train.jsonl, DIR/code.valid.jsonl; a line is
  {"id": "stdlib/json/decoder.py", "text": "...", "source": "code"}

A document appears once. A file's code and its docstrings are held out together, as are copies of a file that
another package carries along, so the validation files measure unseen text. Tests are taken last, when the
rest is not enough.

example:
  python tools/sample_corpus.py --output-dir corpus --max-mb 8
"""


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class File(NamedTuple):
    """A file of the installation."""

    name: str
    """Root and path in it, the beginning of its documents' ids."""
    path: Path
    is_test: bool
    is_stdlib: bool


class Document(NamedTuple):
    """One document; `family` decides between training and validation."""

    id: str
    text: str
    family: str


def default_roots() -> dict[str, Path]:
    """Name the folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": Path(paths["stdlib"]), "packages": Path(paths["purelib"])}
    if paths["platlib"] != paths["purelib"]:
        roots["platform"] = Path(paths["platlib"])
    return roots


def find_files(roots: dict[str, Path]) -> list[File]:
    """List all files in the order in which they are to be used.

    The standard library comes first and tests last; within that, by a hash of the name: any beginning of the
    list is then a fair sample, and does not change with the file system.
    """
    files = []
    for root_name, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            parts = Path(folder).relative_to(root).parts
            is_test = not TEST_FOLDERS.isdisjoint(parts)
            for name in names:
                if Path(name).suffix in ENDINGS or name in DESCRIPTIONS:
                    full_name = "/".join((root_name, *parts, name))
                    in_test = is_test or name.startswith("test_")
                    files.append(File(full_name, Path(folder, name), in_test, root_name == "stdlib"))
    return sorted(files, key=lambda file: (file.is_test, not file.is_stdlib, _hash(file.name)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def family(name: str) -> str:
    """Name what a file must be held out with: its last two path parts, which a vendored copy keeps."""
    return "/".join(name.split("/")[-2:])


def code_documents(files: Iterable[File]) -> Iterator[Document]:
    """Give Python sources, a file per document."""
    for file in files:
        if file.path.suffix == ".py" and file.path.parts[-2:] != TOPICS and (text := read_text(file.path)):
            yield Document(file.name, text, family(file.name))


def prose_documents(files: Sequence[File]) -> Iterator[Document]:
    """Give written language: documentation first, then what stands in the Python sources."""
    for file in files:
        in_metadata = file.path.parent.suffix in (".dist-info", ".egg-info")
        if file.path.parts[-2:] == TOPICS:
            yield from topic_documents(file)
        elif file.is_test:
            continue
        elif in_metadata and file.path.name in DESCRIPTIONS:
            _, _, description = (read_text(file.path) or "").partition("\n\n")
            yield Document(file.name, description, family(file.name))
        elif not in_metadata and file.path.suffix in DOCUMENT_ENDINGS:
            yield Document(file.name, read_text(file.path) or "", family(file.name))
    for file in files:
        if file.path.suffix == ".py" and (text := read_text(file.path)):
            yield Document(f"{file.name}#prose", prose_in_code(text), family(file.name))


def topic_documents(file: File) -> Iterator[Document]:
    """Give the texts of the language reference, a topic per document."""
    tree = parse(read_text(file.path, limit=None) or "")
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name, topic = getattr(key, "value", None), getattr(value, "value", None)
                if isinstance(name, str) and isinstance(topic, str):
                    yield Document(f"{file.name}#{name}", topic, f"topic {name}")


def read_text(path: Path, *, limit: int | None = MAX_CHARACTERS) -> str | None:
    """Read a file as text; None for what is no text, or is a table or generated."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if limit is not None and len(text) > limit:
        return None
    if "\0" in text or any(len(line) > MAX_LINE for line in text.split("\n")):
        return None
    return text


def parse(text: str) -> ast.Module | None:
    """Parse Python source; None where it is not valid (test data, templates, another version's syntax)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escape sequences
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def prose_in_code(text: str) -> str:
    """Gather the docstrings and longer comments of a Python source, in their order."""
    tree = parse(text)
    if tree is None:
        return ""
    pieces = comments(text)
    for node in documented(tree):
        docstring = ast.get_docstring(node)
        if docstring and is_prose(docstring):
            pieces.append((node.body[0].lineno, docstring))
    return "\n\n".join(dict.fromkeys(piece for _, piece in sorted(pieces)))


def documented(tree: ast.Module) -> Iterator[Documented]:
    """Find what can have a docstring; goes through statements alone, a fifth of the time of `ast.walk`."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, Documented):
            yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            if isinstance(inner := getattr(node, block, None), list):
                nodes.extend(inner)


def comments(text: str) -> list[tuple[int, str]]:
    """Find comments of several lines: (line number, text without the marks)."""
    found: list[tuple[int, str]] = []
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip())
            continue
        comment = "\n".join(block).strip()
        if len(block) >= MIN_COMMENT_LINES and is_prose(comment):
            found.append((number - len(block), comment))
        block = []
    return found


def is_prose(text: str) -> bool:
    """Tell written language from tables, rulers and code that was commented out."""
    wordlike = sum(map(len, WORDLIKE.findall(text)))
    return " " in text and wordlike >= MIN_WORDLIKE * len(text)


def select(documents: Iterable[Document], *, max_bytes: int, prose: bool) -> Iterator[Document]:
    """Pass on good documents, each text once, until there are enough bytes."""
    seen: set[bytes] = set()
    total = 0
    for document in documents:
        text = document.text.strip("\n")
        if len(text) < MIN_CHARACTERS or (prose and not is_prose(text)):
            continue
        encoded = text.encode("utf-8", "ignore")
        digest = hashlib.sha256(encoded).digest()
        if digest in seen:
            continue
        if total + len(encoded) > max_bytes:
            return
        seen.add(digest)
        total += len(encoded)
        yield document._replace(text=text + "\n")


def is_held_out(group: str, fraction: float) -> bool:
    """Decide by a hash, so that a document keeps its side when others come or go."""
    return int(_hash(group)[:8], 16) < fraction * 2**32


class Count(NamedTuple):
    """What one output file holds; bytes of text, not of JSON."""

    documents: int = 0
    text_bytes: int = 0


def write_source(
    documents: Iterable[Document], source: str, folder: Path, *, valid_fraction: float, max_bytes: int
) -> dict[Path, Count]:
    """Write a source's training and validation files, whole or not at all."""
    from megatron_ext.durable import aside_path, publish

    paths = [folder / f"{source}.train.jsonl", folder / f"{source}.valid.jsonl"]
    asides = [aside_path(path) for path in paths]
    counts = [Count(), Count()]
    progress = Progress(max_bytes, stream=sys.stderr, interval_seconds=5, label=f"{source}: ")
    try:
        with ExitStack() as stack:
            files: list[IO[str]] = [
                stack.enter_context(aside.open("w", encoding="utf-8", newline="\n")) for aside in asides
            ]
            for document in documents:
                side = int(is_held_out(document.family, valid_fraction))
                record = {"id": document.id, "text": document.text, "source": source}
                files[side].write(json.dumps(record, ensure_ascii=False) + "\n")
                size = len(document.text.encode())
                counts[side] = Count(counts[side].documents + 1, counts[side].text_bytes + size)
                progress.update(size)
        progress.close()
        for aside, path in zip(asides, paths, strict=True):
            publish(aside, path)
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)
    return dict(zip(paths, counts, strict=True))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Make a corpus of prose and code from the Python installation itself.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", required=True, metavar="DIR", help="folder to write the four files into")
    add("--max-mb", type=float, default=16, metavar="N", help="most text per source, in 10^6 bytes (16)")
    add("--valid-fraction", type=float, default=0.05, metavar="F", help="share of files to hold out (0.05)")
    add("--root", nargs="+", metavar="FOLDER", help="take the text from these folders instead")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> dict[Path, Count]:
    """Write the corpus.

    Raises:
        DataError: an argument is out of range, or the folders hold no text.
    """
    if not 0 <= args.valid_fraction < 1:
        raise DataError(f"--valid-fraction: is {args.valid_fraction}, must be at least 0 and below 1.")
    if args.max_mb <= 0:
        raise DataError(f"--max-mb: is {args.max_mb}, must be above 0.")
    roots = {Path(name).name: Path(name) for name in args.root} if args.root else default_roots()
    for root in roots.values():
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; name folders with text in --root.")
    files = find_files(roots)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    max_bytes = int(args.max_mb * 1e6)
    counts: dict[Path, Count] = {}
    for source, documents in (("prose", prose_documents(files)), ("code", code_documents(files))):
        chosen = select(documents, max_bytes=max_bytes, prose=source == "prose")
        counts |= write_source(chosen, source, folder, valid_fraction=args.valid_fraction, max_bytes=max_bytes)
    if not any(count.documents for count in counts.values()):
        raise DataError(f"{', '.join(map(str, roots.values()))}: hold no text that could be used.")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        counts = run(args)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    for path, count in counts.items():
        print(f"{path}: {count.documents:,} documents, {count.text_bytes:,} bytes of text")
    total = sum(count.text_bytes for count in counts.values())
    print(f"total: {sum(count.documents for count in counts.values()):,} documents, {total:,} bytes of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
