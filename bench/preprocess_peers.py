"""The other ways from JSON Lines to a .bin/.idx pair that bench/preprocess.py compares with, each a command.

    python bench/preprocess_peers.py megatron  --input X.jsonl --tokenizer FOLDER --output-prefix P
    python bench/preprocess_peers.py datatrove --input X.jsonl --tokenizer FOLDER --output-prefix P

`megatron` is the method of Megatron-LM's tools/preprocess_data.py (@core_v0.16.1) in our words: a pool of one worker
parses and encodes line by line, sends lists of ids back pickled, and the parent turns each into an array and writes
it. It is given the cheaper of two tokenizer calls: the `tokenizers` library's own `encode`, where Megatron-LM goes
through transformers on top of that, and none of Megatron-LM's imports. `datatrove` is datatrove's own pipeline,
JsonlReader into MegatronDocumentTokenizer, one local task.

Both end each document with the end-of-document token, so both write the same ids as tools/preprocess_data.py does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import struct
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, ClassVar

CHUNK_LINES = 32
"""Lines per task of the pool, as in Megatron-LM."""


def read_eod(folder: Path) -> str:
    """Name the end-of-document token of a tokenizer folder."""
    token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    return str(token["content"] if isinstance(token, dict) else token)


class LineEncoder:
    """Parses and encodes one line at a time in a worker; what it needs there hangs on the class, as in Megatron-LM."""

    tokenizer: ClassVar[Any] = None
    eod: ClassVar[int] = -1

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self) -> None:
        """Load the tokenizer in the worker."""
        from tokenizers import Tokenizer

        LineEncoder.tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        LineEncoder.eod = LineEncoder.tokenizer.token_to_id(read_eod(self._folder))

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        """Give (ids, lengths of the sequences, characters of the line)."""
        text = json.loads(line)["text"]
        ids: list[int] = []
        lengths: list[int] = []
        for sentence in text if isinstance(text, list) else [text]:
            sentence_ids = LineEncoder.tokenizer.encode(sentence, add_special_tokens=False).ids
            if sentence_ids:
                ids.extend(sentence_ids)
                lengths.append(len(sentence_ids))
        if ids:
            ids.append(LineEncoder.eod)
            lengths[-1] += 1
        return ids, lengths, len(line)


class PairBuilder:
    """Writes as IndexedDatasetBuilder does: an array per document, lengths and indices in Python lists."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        import numpy as np

        self._np, self._file, self._dtype = np, file, np.dtype(dtype)
        self._lengths: list[int] = []
        self._documents = [0]

    def add_document(self, ids: list[int], lengths: list[int]) -> None:
        """Append one document."""
        self._file.write(self._np.array(ids, dtype=self._dtype).tobytes(order="C"))
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def finalize(self, index: Path) -> None:
        """Write the index."""
        np = self._np
        pointers, position = [], 0
        for length in self._lengths:
            pointers.append(position)
            position += length * self._dtype.itemsize
        code = {2: 8, 4: 4}[self._dtype.itemsize]
        with index.open("wb") as file:
            file.write(b"MMIDIDX\x00\x00")
            file.write(struct.pack("<QBQQ", 1, code, len(self._lengths), len(self._documents)))
            file.write(np.array(self._lengths, dtype=np.int32).tobytes())
            file.write(np.array(pointers, dtype=np.int64).tobytes())
            file.write(np.array(self._documents, dtype=np.int64).tobytes())


def run_megatron(source: Path, folder: Path, prefix: str) -> None:
    """Preprocess by Megatron-LM's method with one worker."""
    from tokenizers import Tokenizer

    size = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    encoder = LineEncoder(folder)
    with (
        Path(f"{prefix}.bin").open("wb") as file,
        source.open(encoding="utf-8") as lines,
        multiprocessing.Pool(1, initializer=encoder.begin) as pool,
    ):
        builder = PairBuilder(file, "uint16" if size < 65500 else "int32")
        for ids, lengths, _ in pool.imap(encoder.encode, lines, CHUNK_LINES):
            builder.add_document(ids, lengths)
        pool.close()
        pool.join()  # so that the worker's CPU time is counted
    builder.finalize(Path(f"{prefix}.idx"))


def run_datatrove(source: Path, folder: Path, prefix: str) -> None:
    """Preprocess with datatrove, one task on this machine."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    target = Path(prefix)
    with tempfile.TemporaryDirectory() as logs:
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(str(source.parent), glob_pattern=source.name),
                MegatronDocumentTokenizer(
                    str(target.parent),
                    save_filename=target.name,
                    tokenizer_name_or_path=str(folder / "tokenizer.json"),
                    eos_token=read_eod(folder),
                ),
            ],
            tasks=1,
            logging_dir=logs,
            skip_completed=False,
        ).run()
    for ending in ("bin", "idx"):
        Path(f"{prefix}_00000_tokens.{ending}").rename(f"{prefix}.{ending}")


def main() -> int:
    """Run one of the methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("megatron", "datatrove"))
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output-prefix", required=True)
    args = parser.parse_args()
    method = {"megatron": run_megatron, "datatrove": run_datatrove}[args.method]
    method(args.input, args.tokenizer, args.output_prefix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
