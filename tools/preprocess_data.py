#!/usr/bin/env python3
"""Turn text into Megatron's memory-mapped token format: JSON Lines, Parquet, datasets; resumable, on many cores.

This file is the command line; tools/preprocessing does the work.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, without installing

from megatron_ext.errors import EXIT_CODE, DataError, MegapintsError

if TYPE_CHECKING:
    from tools.preprocessing.plan import Request
    from tools.preprocessing.ranks import Ranks

INTERRUPTED = 128 + signal.SIGINT

EPILOG = """\
Inputs are JSON Lines (.jsonl, .json, .ndjson, also .gz .zst .bz2), Parquet, and folders that Hugging Face's
`datasets` saved, in any mixture: files, folders (walked down in the order of names), patterns, - for standard
input. Each record holds a text under every key of --json-keys. For each key the tool writes
  OUTPUT_PREFIX_KEY_document.bin / .idx        token ids and index, in Megatron's format
  OUTPUT_PREFIX_KEY_document.manifest.json     tokenizer, options, inputs (sha256), counts; written last
(KEY_sentence with --split-sentences), and training takes the path without ending:
  data.train_data = ["OUTPUT_PREFIX_KEY_document"].

Ids are those of the `tokenizers` library for the folder's tokenizer.json: no BOS unless --prepend-bos. A fast
encoder of our own makes them where it has proved, on a sample of this input and on texts made to break it, that
it gives the same. Megatron-LM itself goes through transformers' AutoTokenizer, which adds BOS and may give other
ids around special tokens: --tokenizer-backend transformers reproduces its files byte for byte, slowly.

Special tokens spelt out in a text (</s>, <|im_end|>) become their ids by default (--special-tokens-in-text
parse), as in Megatron-LM, the `tokenizers` library and 1.5-Pints, which equal bytes need. For text from the web
that nobody has looked at, escape is the safe choice: they stay text like any other, so that no document can
forge an end of document or a chat turn.

Blank lines are no documents. An empty text is an empty document: it holds no token, not even the
end-of-document token, but keeps its place (with --prepend-bos it is BOS and the end, as in Megatron's own tool).

The bytes of the output depend on the inputs and options alone, not on --workers, ranks, restarts or packing.
Until the output is whole, the work is in OUTPUT_PREFIX.partial: a run that was interrupted or killed continues
when the same command is given again. Needs room for the output twice.

examples:
  python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \\
      --tokenizer tokenizers/pints --append-eod --workers 8
  python tools/preprocess_data.py --input 'web/*.jsonl.zst' books.parquet --output-prefix data/mixed \\
      --tokenizer tokenizers/pints --json-keys text title --append-eod --on-error skip
  zcat dump.gz | python tools/preprocess_data.py --input - --output-prefix data/dump --tokenizer tokenizers/pints
  mpiexec -n 16 python tools/preprocess_data.py --mpi --input corpus/ --output-prefix /shared/corpus \\
      --tokenizer tokenizers/pints --append-eod
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Turn text into Megatron's memory-mapped token format (.bin and .idx).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs = parser.add_argument_group("what to read")
    add = inputs.add_argument
    add("--input", nargs="+", default=[], metavar="WORD", help="files, folders, patterns, or -; joined in this order")
    add("--input-list", action="append", default=[], metavar="FILE", help="file with such a word per line")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys or columns to tokenise (default: text)")
    add("--id-key", metavar="KEY", help="key or column whose value is told with a bad record")
    add("--on-error", choices=("fail", "skip"), default="fail",
        help="what a bad record does: end the run (default), or be counted and go to PREFIX.skipped.jsonl")  # fmt: skip
    ids = parser.add_argument_group("what to write")
    add = ids.add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="path that the outputs' names begin with")
    add("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json and its companions")
    add("--append-eod", action="store_true", help="end every document that holds a token with eos_token")
    add("--prepend-bos", action="store_true", help="begin every document (or sentence) with bos_token")
    add("--split-sentences", action="store_true",
        help="make each sentence a sequence: NLTK's punkt, trained on the input where NLTK has no model")  # fmt: skip
    add("--keep-newlines", action="store_true", help="keep white space at the ends of sentences")
    add("--lang", metavar="NAME", help="punkt's model (default: english)")
    add("--special-tokens-in-text", choices=("parse", "escape"), default="parse",
        help="what special tokens spelt out in a text become: their ids (default), or text; see below")  # fmt: skip
    add("--tokenizer-backend", choices=("auto", "tokenizers", "transformers"), default="auto",
        help="auto: the fast encoder where it is proved equal to the library (default); see below")  # fmt: skip
    work = parser.add_argument_group("how")
    add = work.add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenise, per rank (default 1)")
    add("--mpi", action="store_true", help="share the work with the ranks of mpiexec or srun, over a shared folder")
    add("--restart", action="store_true", help="drop what an earlier run has finished, and begin anew")
    add("--log-interval", type=int, default=100_000, metavar="N", help="documents per progress line (100000)")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be, and what would be ignored.

    Raises:
        DataError: the first thing that is wrong.
    """
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')}: is {getattr(args, name)}, must be at least 1.")
    if not args.input and not args.input_list:
        raise DataError("--input: is missing; give files, folders, patterns, or - (or --input-list FILE).")
    for key in args.json_keys:
        if not key or "/" in key or args.json_keys.count(key) > 1:
            raise DataError(f"--json-keys {key!r}: must be given once and hold no '/', for files are named after it.")
    if args.output_prefix.endswith(("/", "/.", "/..")) or not Path(args.output_prefix).name:
        raise DataError(f"--output-prefix {args.output_prefix!r}: must end with a name, not with '/'.")
    if not args.split_sentences:
        for given, option in ((args.keep_newlines, "--keep-newlines"), (args.lang, "--lang")):
            if given:
                raise DataError(f"{option}: only --split-sentences looks at it; add that, or leave this out.")
    if args.tokenizer_backend == "transformers":
        for given, option in (
            (args.prepend_bos, "--prepend-bos"),
            (args.special_tokens_in_text == "escape", "--special-tokens-in-text escape"),
        ):
            if given:
                raise DataError(
                    f"{option}: not with --tokenizer-backend transformers, where AutoTokenizer alone decides, as in "
                    "Megatron-LM; leave one of the two out."
                )


def make_request(args: argparse.Namespace) -> Request:
    """Take a checked command line."""
    from tools.preprocessing.encode import Settings
    from tools.preprocessing.plan import Request

    return Request(
        words=tuple(args.input),
        lists=tuple(args.input_list),
        output_prefix=args.output_prefix,
        settings=Settings(
            tokenizer=args.tokenizer,
            keys=tuple(args.json_keys),
            append_eod=args.append_eod,
            prepend_bos=args.prepend_bos,
            split_sentences=args.split_sentences,
            keep_newlines=args.keep_newlines,
            lang=args.lang or "english",
            special_tokens_in_text=args.special_tokens_in_text,
            backend=args.tokenizer_backend,
        ),
        id_key=args.id_key,
        workers=args.workers,
        skip_errors=args.on_error == "skip",
        restart=args.restart,
        log_interval=args.log_interval,
    )


def run(args: argparse.Namespace, ranks: Ranks) -> int:
    """Do the work on this rank; rank 0 speaks for all. Returns the exit status."""
    try:
        check_arguments(args)
        from tools.preprocessing.engine import Interrupted, preprocess
    except MegapintsError as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE
    try:
        lines = preprocess(make_request(args), ranks, sys.stderr)
    except (MegapintsError, OSError) as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except (Interrupted, KeyboardInterrupt) as stop:
        if ranks.rank == 0:
            print(f"interrupted. {stop}".rstrip(), file=sys.stderr, flush=True)
        if ranks.size > 1:
            time.sleep(1)  # the first rank to abort ends all; what rank 0 says must have got through by then
        ranks.abort(INTERRUPTED)
        return INTERRUPTED
    except Exception:
        if ranks.size == 1:
            raise
        print(f"rank {ranks.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        ranks.abort(EXIT_CODE)  # the others may wait for this rank
    if ranks.rank == 0:
        print(*lines, sep="\n", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_arguments(argv)
    try:
        from megatron_ext.parallel.launch import set_runtime_environment
        from tools.preprocessing.ranks import MpiRanks, OneRank

        set_runtime_environment(cuda=False)  # the tokenizers library on one core: the workers are the parallelism
        ranks: Ranks = MpiRanks() if args.mpi else OneRank()
    except MegapintsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return run(args, ranks)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's TERM ends it as Ctrl-C does
    sys.exit(main())
