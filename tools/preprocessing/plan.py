"""Plan a run: find the inputs, choose the encoder, cut the work into parts, and see which are done already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ext.errors import DataError
from tools.preprocessing.digests import sha256
from tools.preprocessing.encode import Settings, choose
from tools.preprocessing.inputs import InputFile, cut_into_units, find_inputs
from tools.preprocessing.parts import Finished, Part, PartRecord, WorkFolder, choose_part_bytes, group_units, writing
from tools.preprocessing.readers import first_texts
from tools.preprocessing.workers import PUNKT_FILE, Job, Loaded, read_batches

if TYPE_CHECKING:
    from megatron_ext.data.tokenizer import Tokenizer

PLAN_FORMAT = 2
"""Of the work folder; another one is never continued from."""

SAMPLE_BYTES = 512 << 10
"""Of this input, on which the fast encoder must prove itself."""

SPOOL_FILE = "stdin"
"""Copy of standard input, in the work folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line."""

    words: tuple[str, ...]
    """Files, folders, patterns, or - for standard input."""
    lists: tuple[str, ...]
    output_prefix: str
    settings: Settings
    id_key: str | None = None
    workers: int = 1
    skip_errors: bool = False
    restart: bool = False
    log_interval: int = 100_000

    def prefix(self, key: str) -> Path:
        """Name the pair of a key, as Megatron does."""
        return Path(f"{self.output_prefix}_{key}_{self.settings.level}")

    @property
    def skipped_path(self) -> Path:
        """Where skipped records are written."""
        return Path(f"{self.output_prefix}.skipped.jsonl")


class Run(NamedTuple):
    """What all ranks know of a run."""

    job: Job
    files: tuple[InputFile, ...]
    parts: tuple[Part, ...]
    finished: dict[int, PartRecord]
    """Parts of an earlier run."""

    def pending(self) -> list[Part]:
        """Give the parts that are still to be made."""
        return [part for part in self.parts if part.number not in self.finished]


class Planned(NamedTuple):
    """A run, and what only rank 0 needs of it."""

    run: Run
    folder: WorkFolder
    finished: Finished
    loaded: Loaded


def make_plan(request: Request, folder: WorkFolder) -> Planned:
    """Find the inputs, choose the encoder, cut the work into parts, and see which are done already; says so on stdout.

    Raises:
        DataError: an input or the tokenizer is wrong, or finished parts were made from something else.
    """
    from megatron_ext.data.tokenizer import Tokenizer

    settings = request.settings
    tokenizer = Tokenizer.load(settings.tokenizer)
    if settings.prepend_bos and tokenizer.bos is None:
        raise DataError(f"--prepend-bos: {settings.tokenizer} names no bos_token; leave the option out.")
    with writing(folder.path):
        files = find_inputs(request.words, lists=request.lists, spool=folder.path / SPOOL_FILE)

    def sample(limit_bytes: int) -> list[str]:
        columns = first_texts(files, keys=settings.keys, limit_bytes=limit_bytes)
        return [text for column in columns for text in column]

    part_bytes = choose_part_bytes(sum(file.size for file in files))
    units = cut_into_units(files, unit_bytes=part_bytes)
    encoder, message = choose(settings, tokenizer, lambda: sample(SAMPLE_BYTES))
    print(message, flush=True)
    job = Job(
        settings=settings,
        encoder=encoder.name,
        id_key=request.id_key,
        skip_errors=request.skip_errors,
        folder=folder.path,
    )
    for unit in units[:1]:
        next(read_batches(job, unit), None)  # a mistyped key is told at once, and not as a lack of text, say
    if settings.split_sentences:
        _prepare_sentences(settings, folder, sample)
    parts = group_units(units, part_bytes)
    folder.check_plan(describe_plan(settings, tokenizer, files, folder))
    for key, name in enumerate(settings.keys):
        folder.take_back(key, request.prefix(name))
    finished = folder.finished(num_keys=len(settings.keys), clean=not request.skip_errors)
    if finished.records:
        print(f"continuing: {len(finished.records):,} of {len(parts):,} parts are done", flush=True)
    run = Run(job, tuple(files), tuple(parts), finished.records)
    return Planned(run, folder, finished, Loaded(tokenizer, encoder))


def _prepare_sentences(settings: Settings, folder: WorkFolder, sample: Callable[[int], list[str]]) -> None:
    """Put the sentence model, once chosen the same for the whole run, into the work folder."""
    from tools.preprocessing import sentences

    path = folder.path / PUNKT_FILE
    if path.exists():
        punkt = sentences.Punkt.read(path)
    else:
        punkt = sentences.load_or_train(lambda: sample(sentences.TRAINING_BYTES), lang=settings.lang)
        with writing(path):
            punkt.write(path)
    print(f"sentences: punkt, {punkt.origin}", flush=True)


def describe_plan(
    settings: Settings, tokenizer: Tokenizer, files: Sequence[InputFile], folder: WorkFolder
) -> dict[str, Any]:
    """Describe all that the bytes of the parts depend on."""
    library = "transformers" if settings.backend == "transformers" else "tokenizers"
    punkt = folder.path / PUNKT_FILE
    configuration = tokenizer.folder / "tokenizer_config.json"
    return {
        "plan format": PLAN_FORMAT,
        "json keys": list(settings.keys),
        "option": settings.options(),
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "bos": tokenizer.bos,
            "eod": tokenizer.eod,
            "configuration": _hash_of(configuration) if library == "transformers" else None,
        },
        "library": f"{library} {version(library)}",
        "sentence library": f"nltk {version('nltk')}" if settings.split_sentences else None,
        "sentence model": _hash_of(punkt) if settings.split_sentences else None,
        # What came in by standard input is copied anew by each run: it is the same if its content is.
        "inputs": [
            [os.path.abspath(file.path), file.size, sha256(file) if is_spool(file, folder) else file.mtime_ns]
            for file in files
        ],
    }


def _hash_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def is_spool(file: InputFile, folder: WorkFolder) -> bool:
    """Say whether a file is the copy of standard input."""
    return Path(file.path).parent == folder.path
