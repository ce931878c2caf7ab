"""A tokenizer of 1,024 ids for tests, trained in a fraction of a second on text written here."""

from __future__ import annotations

from pathlib import Path

from tools import build_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

_SYLLABLES = (
    "ba",
    "ke",
    "mi",
    "no",
    "su",
    "ter",
    "lan",
    "dor",
    "fin",
    "gra",
    "hol",
    "pes",
    "vut",
    "zim",
    "qua",
)
WORDS = [first + second for first in _SYLLABLES for second in _SYLLABLES]


def training_text() -> str:
    """Write sentences, numbers, and code with indentation from a fixed list of words."""
    lines = []
    for number, word in enumerate(WORDS):
        other = WORDS[(7 * number + 3) % len(WORDS)]
        lines.append(f"The {word} and the {other} met {number} times, said {other.title()}.")
        lines.append(f"def {word}_{other}(self):\n    if self.{other}:\n        return '{word}'  # naïve ü\n")
    return "\n".join(lines * 3)


def build_small_tokenizer(folder: Path) -> Path:
    """Train the tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "training_text.txt"
    text.write_text(training_text(), encoding="utf-8")
    content = build_tokenizer.train_tokenizer(
        [text], key="text", vocab_size=1024, limit_alphabet=128, show_progress=False
    )
    build_tokenizer.write_folder(content, folder)
    return folder
