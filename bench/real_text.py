"""Real text of this machine for benchmarks: sources and documentation of what is installed, nothing downloaded.

    python bench/real_text.py OUT.jsonl [--mb 200] [--root FOLDER ...]

Every document is a file: {"id": its path, "text": its content, "source": "code" or "prose"}. A content appears
once. The order is that of a hash of the content, so any beginning of the file is a fair sample, and the same
installation gives the same bytes. Code and prose take turns by bytes as long as both last.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.durable import aside_path, publish
from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError

CODE_ENDINGS = frozenset({
    ".py", ".pyi", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".tcc", ".js", ".ts", ".pl", ".pm", ".sh",
    ".rb", ".java", ".go", ".rs", ".lua", ".sql", ".cmake",
})  # fmt: skip
PROSE_ENDINGS = frozenset({".rst", ".md", ".txt", ".pod", ".html", ".adoc", ".tex", ".org"})
PROSE_NAMES = frozenset({"METADATA", "PKG-INFO", "README", "NEWS", "changelog", "AUTHORS", "copyright", "TODO", "FAQ"})
MANUAL_PAGES = frozenset("123456789")
"""Sections of the manual, which its files end with."""

SYSTEM_FOLDERS = ("/usr/share/doc", "/usr/share/man", "/usr/include", "/usr/share/perl", "/usr/share/perl5",
                  "/usr/lib/python3", "/usr/share/vim", "/usr/share/common-licenses")  # fmt: skip
MIN_BYTES, MAX_BYTES = 200, 1_000_000
"""Shorter files say too little; a longer one is a table or generated, and would weigh too much in a small sample."""


class Found(NamedTuple):
    """A distinct text, before it is read again to be written."""

    digest: bytes
    path: Path
    size: int
    """Bytes of UTF-8."""


class Collected(NamedTuple):
    """What a corpus holds."""

    documents: int
    text_bytes: int
    """Bytes of UTF-8, not of JSON."""
    code_bytes: int
    file_bytes: int


def default_roots() -> list[Path]:
    """Name the folders of text that most machines have."""
    paths = sysconfig.get_paths()
    names = [*(paths[key] for key in ("stdlib", "purelib", "platlib", "include")), *SYSTEM_FOLDERS]
    return [Path(name) for name in dict.fromkeys(names) if Path(name).is_dir()]


def kind(name: str) -> str | None:
    """Tell `code` from `prose` by a file's name; None for what is neither."""
    stem, ending = os.path.splitext(name.removesuffix(".gz"))
    if ending in CODE_ENDINGS:
        return "code"
    if ending in PROSE_ENDINGS or stem in PROSE_NAMES or ending[1:2] in MANUAL_PAGES:
        return "prose"
    return None


def read_text(path: Path) -> bytes | None:
    """Read a file, unpacked, as UTF-8; None for what is no text or is too short or too long."""
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return None
    return content if MIN_BYTES <= len(content) <= MAX_BYTES and b"\0" not in content else None


def walk(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Give (kind, path) of every file of text, in a fixed order, links left out."""
    seen: set[str] = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
            if folder in seen:  # installed packages may lie inside the standard library's folder
                subfolders.clear()
                continue
            seen.add(folder)
            for name in sorted(names):
                if (found := kind(name)) and not Path(folder, name).is_symlink():
                    yield found, Path(folder, name)


def find_texts(roots: Sequence[Path]) -> dict[str, list[Found]]:
    """List the distinct texts of each kind, in the order of their hashes."""
    seen: set[bytes] = set()
    texts: dict[str, list[Found]] = {"code": [], "prose": []}
    for which, path in walk(roots):
        content = read_text(path)
        digest = hashlib.sha256(content or b"").digest()
        if content and digest not in seen:
            seen.add(digest)
            texts[which].append(Found(digest, path, len(content)))
    return {which: sorted(found) for which, found in texts.items()}


def take_turns(texts: dict[str, list[Found]], max_bytes: int) -> Iterator[tuple[str, Found]]:
    """Choose documents until there are enough bytes, always of the kind that has fewer so far."""
    left = {which: list(reversed(found)) for which, found in texts.items()}
    taken = dict.fromkeys(texts, 0)
    while any(left.values()) and sum(taken.values()) < max_bytes:
        which = min((which for which in left if left[which]), key=taken.__getitem__)
        found = left[which].pop()
        taken[which] += found.size
        yield which, found


def collect(output: Path, *, max_bytes: int, roots: Sequence[Path] = ()) -> Collected:
    """Write the corpus, whole or not at all.

    Args:
        output: JSON Lines file to write.
        max_bytes: text to collect; less if there is not as much.
        roots: folders to search; the installation's if none are given.

    Raises:
        DataError: there is no text.
    """
    folders = list(roots) or default_roots()
    documents = text_bytes = code_bytes = 0
    aside = aside_path(output)
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for which, found in take_turns(find_texts(folders), max_bytes):
                text = (read_text(found.path) or b"").decode()
                file.write(json.dumps({"id": str(found.path), "text": text, "source": which}, ensure_ascii=False))
                file.write("\n")
                documents += 1
                text_bytes += found.size
                code_bytes += found.size * (which == "code")
        if not documents:
            raise DataError(f"{', '.join(map(str, folders))}: hold no text; name other folders with --root.")
        publish(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    return Collected(documents, text_bytes, code_bytes, output.stat().st_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a corpus and say what it holds; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--mb", type=float, default=200, help="text to collect, in 10^6 bytes (200)")
    parser.add_argument(
        "--root", type=Path, nargs="+", default=[], metavar="FOLDER", help="search these folders instead"
    )
    args = parser.parse_args(argv)
    try:
        found = collect(args.output, max_bytes=int(args.mb * 1e6), roots=args.root)
    except (MegapintsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    text, written = found.text_bytes / 1e6, found.file_bytes / 1e6
    print(f"{args.output}: {found.documents:,} documents, {text:,.1f} MB of text, "
          f"{found.code_bytes / found.text_bytes:.0%} code; {written:,.1f} MB of JSON Lines")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
