"""A person's mistakes, each through the real command: one clear message, exit code 2, nothing half done."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.data.manifest import Manifest, TokenizerRecord, write_manifest
from megatron_ext.errors import EXIT_CODE
from megatron_ext.parallel.launch import free_port
from tests.conftest import ROOT, TINY_TOML, child_environment

# Names under which the commands write what is not whole yet.
_ASIDE = re.compile(r"\.(tmp|aside|partial|partial-\d+|replaced|removed)\Z")


@dataclass(frozen=True)
class Workplace:
    """A folder with all that the commands need, for a test to spoil."""

    root: Path
    """Holds data/ (tokenizer/, a and b, text.jsonl), run.toml and, for some tests, trained/ (a finished run)."""

    @property
    def config(self) -> Path:
        return self.root / "run.toml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    def edit(self, old: str, new: str) -> None:
        """Change the configuration's text."""
        text = self.config.read_text()
        assert text.count(old) == 1, (old, text.count(old))
        self.config.write_text(text.replace(old, new))

    def replace_data(self, lengths: Sequence[int]) -> None:
        """Give both files documents of these lengths."""
        for name in ("a", "b"):
            with IndexedWriter(self.data / name, dtype=np.dtype("<u2")) as writer:
                for length in lengths:
                    writer.add_document(np.full(length, 5))
                writer.publish()

    def files(self) -> dict[str, bytes]:
        return {p.relative_to(self.root).as_posix(): p.read_bytes() for p in self.root.rglob("*") if p.is_file()}


@dataclass(frozen=True)
class Mistake:
    """One bad input."""

    message: str
    """What the error line must contain, with {root} for the workplace."""
    spoil: Callable[[Workplace], object] = lambda place: None
    command: Sequence[str] = ("pretrain_pints.py", "{root}/run.toml")
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    after_training: bool = False
    """Whether the workplace holds a finished run, trained/, beforehand."""


class Refusal(NamedTuple):
    """What a command left behind."""

    returncode: int
    errors: list[str]
    output: str
    before: dict[str, bytes]
    after: dict[str, bytes]


@pytest.fixture(scope="module")
def finished_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    root = tmp_path_factory.mktemp("finished")
    (root / "run.toml").write_text(TINY_TOML.format(run_dir=root / "trained", data=tiny_data))
    done = run(["pretrain_pints.py", str(root / "run.toml"), "--train.exit_iters", "2"], root)
    assert done.returncode == 0, done.stderr
    return root / "trained"


@pytest.fixture
def place(tiny_data: Path, tmp_path: Path) -> Workplace:
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copyfile(tiny_data / name, tmp_path / "data" / name)
    shutil.copytree(tiny_data / "tokenizer", tmp_path / "data" / "tokenizer")
    (tmp_path / "run.toml").write_text(TINY_TOML.format(run_dir=tmp_path / "run", data=tmp_path / "data"))
    lines = [json.dumps({"text": f"number {number}"}) for number in range(20)]
    (tmp_path / "data" / "text.jsonl").write_text("\n".join(lines) + "\n")
    return Workplace(tmp_path)


class Ended(NamedTuple):
    """A command that ended."""

    returncode: int
    stdout: str
    stderr: str


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    # Without a GPU everywhere, so that what needs one is refused everywhere.
    variables = {**child_environment(), "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=variables,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    return Ended(process.returncode, stdout, stderr)


def run(command: Sequence[str], folder: Path) -> Ended:
    return end(start(command, folder))


def refuse(mistake: Mistake, place: Workplace, ranks: Sequence[Mapping[str, str]] = ({},)) -> list[Refusal]:
    """Make the mistake, and see what each rank does about it."""
    mistake.spoil(place)
    before = place.files()
    words = [word.format(root=place.root) for word in (*mistake.command, *mistake.options)]
    environment = {name: value.format(root=place.root) for name, value in mistake.environment.items()}
    processes = [start(words, place.root, {**environment, **rank}) for rank in ranks]
    ended = [end(process) for process in processes]
    after = place.files()
    return [
        Refusal(e.returncode, [line for line in e.stderr.splitlines() if line], e.stdout + e.stderr, before, after)
        for e in ended
    ]


def check(mistake: Mistake, refusal: Refusal, root: Path) -> None:
    """One line that says it, no traceback, the exit code, nothing half-written and nothing changed."""
    assert "Traceback" not in refusal.output, refusal.output
    assert refusal.returncode == EXIT_CODE, refusal.output
    assert len(refusal.errors) == 1, refusal.errors
    assert refusal.errors[0].startswith("error: ")
    assert mistake.message.format(root=root) in refusal.errors[0]
    new = refusal.after.keys() - refusal.before.keys()
    assert not [name for name in new if any(_ASIDE.search(part) for part in Path(name).parts)]
    assert not [name for name in new if "/iter_" in name or name.startswith("out")]
    changed = [name for name in refusal.before if refusal.after.get(name) != refusal.before[name]]
    assert [name for name in changed if not name.endswith("log.txt")] == []


# --- how the inputs are spoilt --------------------------------------------------------------------------------


def truncate(name: str, *, by: int) -> Callable[[Workplace], None]:
    def spoil(place: Workplace) -> None:
        path = place.root / name
        path.write_bytes(path.read_bytes()[:-by])

    return spoil


def overwrite(name: str, content: str) -> Callable[[Workplace], object]:
    return lambda place: (place.root / name).write_text(content)


def remove(name: str) -> Callable[[Workplace], object]:
    return lambda place: (place.root / name).unlink()


def edit(old: str, new: str) -> Callable[[Workplace], None]:
    return lambda place: place.edit(old, new)


def claim_another_tokenizer(place: Workplace) -> None:
    """Put a manifest beside the data that names another tokenizer."""
    record = TokenizerRecord(sha256="ab" * 32, vocab_size=97, eod=2, folder="elsewhere")
    counts = {"documents": 300, "tokens": 1, "empty_documents": 0, "skipped_documents": 0}
    sizes = {f"{end}_bytes": (place.data / f"a.{end}").stat().st_size for end in ("bin", "idx")}
    write_manifest(
        place.data / "a", Manifest(tokenizer=record, options={}, inputs=(), dtype="uint16", **counts, **sizes)
    )


def lose_the_end_token(place: Workplace) -> None:
    path = place.data / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))


def change_the_tokenizer(place: Workplace) -> None:
    """Another tokenizer.json, though of the same ids."""
    path = place.data / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def lose_wandb(place: Workplace) -> None:
    """A package that fails as an absent one does; it comes first on PYTHONPATH."""
    (place.root / "wandb.py").write_text("raise ImportError\n")


def foreign_folder(place: Workplace) -> None:
    """A folder as other trainers leave it."""
    folder = place.root / "foreign" / "iter_0000100" / "mp_rank_00"
    folder.mkdir(parents=True)
    (folder / "model_optim_rng.pt").write_bytes(b"PK")
    (place.root / "foreign" / "latest_checkpointed_iteration.txt").write_text("100")


def multimodal_index(place: Workplace) -> None:
    """A header with a type code that no token ids have (float64)."""
    path = place.data / "a.idx"
    content = bytearray(path.read_bytes())
    struct.pack_into("<B", content, 17, 6)
    path.write_bytes(bytes(content))


DESCRIPTION = "trained/checkpoints/iter_0000002/megapints.json"
IN_TRAINED = ("--run_dir", "{root}/trained")
FROM_TRAINED = ("--checkpoint.init_from", "{root}/trained")
TO_HF = ("tools/convert_checkpoint.py", "to-hf", "--save", "out", "--load")
FROM_HF = ("tools/convert_checkpoint.py", "from-hf", "--save", "out", "--load")
PREPROCESS = ("tools/preprocess_data.py", "--output-prefix", "out", "--tokenizer", "data/tokenizer", "--input")
TRAIN_TOKENIZER = ("tools/build_tokenizer.py", "train", "--output", "out", "--vocab-size", "300", "--input")

MISTAKES = {
    # the configuration
    "config_missing": Mistake(
        "nowhere.toml: no such file, and no bundled config of that name", command=("pretrain_pints.py", "nowhere.toml")
    ),
    "config_misspelt": Mistake("did you mean pints_1.5b_2k, ", command=("pretrain_pints.py", "pints_1.5b_2")),
    "config_not_toml": Mistake("{root}/run.toml: not valid TOML:", spoil=edit("num_layers = 4", "num_layers : 4")),
    "config_unknown_key": Mistake(
        "{root}/run.toml: model.num_layer: unknown key; did you mean num_layers?",
        spoil=edit("num_layers = 4", "num_layers = 4\nnum_layer = 4"),
    ),
    "config_key_in_another_section": Mistake(
        "{root}/run.toml: model.seq_length: unknown key; it belongs in [train].",
        spoil=edit("num_layers = 4", "num_layers = 4\nseq_length = 4"),
    ),
    "config_key_missing": Mistake(
        "{root}/run.toml: model.hidden_size: missing; it must be an integer.", spoil=edit("hidden_size = 32", "")
    ),
    "config_wrong_type": Mistake(
        '{root}/run.toml: optimizer.lr: "1e-2" is not a number; write 0.01.', spoil=edit("lr = 1e-2", 'lr = "1e-2"')
    ),
    "option_unknown": Mistake(
        "command line: --train.train_iter: unknown option; did you mean --train.train_iters, ",
        options=("--train.train_iter", "5"),
    ),
    "option_of_wrong_type": Mistake(
        "command line: --train.train_iters: many is not an integer.", options=("--train.train_iters", "many")
    ),
    # the layout
    "heads_not_divided_by_tensor_parallel_size": Mistake(
        "parallel.tensor_model_parallel_size (3) must divide model.num_attention_heads (4)",
        options=("--parallel.tensor_model_parallel_size", "3"),
        environment={"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ),
    "world_size_not_a_multiple_of_the_layout": Mistake(
        "the number of processes (1) must be a multiple of tensor x pipeline x context parallel size (2 x 1 x 1 = 2)",
        options=("--parallel.tensor_model_parallel_size", "2"),
    ),
    "launcher_variables_half_set": Mistake("torchrun", environment={"RANK": "0"}),
    "micro_batch_not_dividing_the_batch": Mistake(
        "train.global_batch_size (8) must be a multiple of train.micro_batch_size x data-parallel size (3 x 1 = 3)",
        options=("--train.micro_batch_size", "3"),
    ),
    "fp8_without_transformer_engine": Mistake(
        "precision.dtype (fp8) needs Transformer Engine and a CUDA device; use bf16 here",
        options=("--precision.dtype", "fp8"),
    ),
    "transformer_engine_without_cuda": Mistake(
        "model.transformer_impl (transformer_engine) needs a CUDA device",
        options=("--model.transformer_impl", "transformer_engine"),
    ),
    "context_parallel_with_local_modules": Mistake(
        "parallel.context_parallel_size (2) needs Transformer Engine's attention",
        options=("--parallel.context_parallel_size", "2", "--model.transformer_impl", "local"),
        environment={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    ),
    # the run directory
    "run_dir_is_a_file": Mistake("run_dir ({root}/run.toml) is a file", options=("--run_dir", "{root}/run.toml")),
    "run_dir_not_writable": Mistake(
        "{root}/run.toml/below/log.txt: the log file cannot be written (Not a directory)",
        options=("--run_dir", "{root}/run.toml/below"),
    ),
    # the data
    "data_missing": Mistake(
        "data.train_data ({root}/data/c): {root}/data/c.bin and {root}/data/c.idx not found",
        options=("--data.train_data", "{root}/data/c"),
    ),
    "data_named_with_its_ending": Mistake(
        "must be a prefix; leave the ending away: {root}/data/a.",
        spoil=lambda place: (
            shutil.copyfile(place.data / "a.bin", place.data / "a.bin.bin")
            and shutil.copyfile(place.data / "a.idx", place.data / "a.bin.idx")
        ),
        options=("--data.train_data", "{root}/data/a.bin"),
    ),
    "bin_cut_short": Mistake("{root}/data/a.bin: holds", spoil=truncate("data/a.bin", by=2)),
    "idx_cut_short": Mistake("{root}/data/a.idx: holds", spoil=truncate("data/a.idx", by=1)),
    "idx_empty": Mistake("{root}/data/a.idx: is not a Megatron index", spoil=overwrite("data/a.idx", "")),
    "idx_of_another_format": Mistake(
        "{root}/data/a.idx: is not a Megatron index (no MMIDIDX header)",
        spoil=overwrite("data/a.idx", "a text file that is longer than a header of thirty-four bytes"),
    ),
    "idx_of_no_token_ids": Mistake("{root}/data/a.idx: type code is 6", spoil=multimodal_index),
    "idx_of_another_file": Mistake(
        "{root}/data/a.bin: holds",
        spoil=lambda place: shutil.copyfile(place.data / "b.idx", place.data / "a.idx"),
    ),
    "data_without_tokens": Mistake("holds no tokens", spoil=lambda place: place.replace_data([0, 0])),
    "data_shorter_than_a_sample": Mistake(
        "is shorter than one sample of train.seq_length + 1 = 17 tokens", spoil=lambda place: place.replace_data([3, 4])
    ),
    "manifest_damaged": Mistake(
        "{root}/data/a.manifest.json", spoil=overwrite("data/a.manifest.json", '{"version": 1')
    ),
    "cache_not_writable": Mistake(
        "cannot write the index cache", options=("--data.path_to_cache", "{root}/run.toml/cache")
    ),
    # the tokenizer
    "tokenizer_missing": Mistake(
        "data.tokenizer ({root}/nowhere) is not a folder", options=("--data.tokenizer", "{root}/nowhere")
    ),
    "tokenizer_without_its_file": Mistake("has no tokenizer.json", spoil=remove("data/tokenizer/tokenizer.json")),
    "tokenizer_damaged": Mistake(
        "data/tokenizer/tokenizer.json: is not a tokenizer", spoil=truncate("data/tokenizer/tokenizer.json", by=9)
    ),
    "tokenizer_without_an_end_token": Mistake("names no eos_token", spoil=lose_the_end_token),
    "tokenizer_of_other_data": Mistake("{root}/data/a: made with another tokenizer", spoil=claim_another_tokenizer),
    "tokenizer_larger_than_the_model": Mistake(
        "model.vocab_size (90) must cover the tokenizer's ids: {root}/data/tokenizer has 97",
        options=("--model.vocab_size", "90"),
    ),
    # what a run reports
    "wandb_not_installed": Mistake(
        "log.wandb_project is set, but the wandb package is not installed",
        spoil=lose_wandb,
        options=("--log.wandb_project", "pints"),
        environment={"PYTHONPATH": "{root}"},
    ),
    "more_passes_than_allowed": Mistake(
        "data.max_epochs (0.01) would be passed: {root}/data/a is read",
        options=("--data.train_data", "{root}/data/a", "--data.max_epochs", "0.01"),
    ),
    # checkpoints
    "init_from_missing": Mistake(
        "checkpoint.init_from ({root}/nowhere) not found", options=("--checkpoint.init_from", "{root}/nowhere")
    ),
    "init_from_foreign_folder": Mistake(
        "holds no whole checkpoint", spoil=foreign_folder, options=("--checkpoint.init_from", "{root}/foreign")
    ),
    "init_from_another_model": Mistake(
        "of another model: hidden_size 32 there, 64 here",
        options=(*FROM_TRAINED, "--model.hidden_size", "64"),
        after_training=True,
    ),
    "init_from_cut_short": Mistake(
        "trained: holds no whole checkpoint (iter_0000002: common.pt has",
        spoil=truncate("trained/checkpoints/iter_0000002/common.pt", by=1),
        options=FROM_TRAINED,
        after_training=True,
    ),
    "init_from_with_damaged_description": Mistake(
        "trained: holds no whole checkpoint",
        spoil=overwrite(DESCRIPTION, "{"),
        options=FROM_TRAINED,
        after_training=True,
    ),
    "run_dir_of_another_model": Mistake(
        "of another model: num_layers 4 there, 2 here",
        options=(*IN_TRAINED, "--model.num_layers", "2"),
        after_training=True,
    ),
    "run_dir_of_another_tokenizer": Mistake(
        "trained with another tokenizer than data.tokenizer ({root}/data/tokenizer)",
        spoil=change_the_tokenizer,
        options=IN_TRAINED,
        after_training=True,
    ),
    "run_dir_of_another_run_and_no_resume": Mistake(
        "the run directory already holds a checkpoint and checkpoint.resume is false",
        options=(*IN_TRAINED, "--checkpoint.resume", "false"),
        after_training=True,
    ),
    # the tools
    "preprocess_missing_input": Mistake("nowhere.jsonl", command=(*PREPROCESS, "nowhere.jsonl")),
    "preprocess_bad_json": Mistake(
        "data/text.jsonl:21: is not valid JSON",
        spoil=lambda place: (place.data / "text.jsonl").open("a").write('{"text": "cut sho'),
        command=(*PREPROCESS, "data/text.jsonl"),
    ),
    "preprocess_missing_key": Mistake(
        "data/text.jsonl:1: has no key 'content'; keys found: 'text'",
        command=(*PREPROCESS, "data/text.jsonl"),
        options=("--json-keys", "content"),
    ),
    "build_tokenizer_missing_input": Mistake("nowhere.jsonl", command=(*TRAIN_TOKENIZER, "nowhere.jsonl")),
    "build_tokenizer_missing_base": Mistake(
        "nowhere.json", command=("tools/build_tokenizer.py", "pints", "--output", "out", "--base", "nowhere.json")
    ),
    "inspect_missing_data": Mistake("data/c.bin: no such file", command=("tools/inspect_data.py", "data/c")),
    "inspect_cut_short": Mistake(
        "data/a.bin: holds", spoil=truncate("data/a.bin", by=2), command=("tools/inspect_data.py", "data/a")
    ),
    "convert_missing_run": Mistake("nowhere: does not exist", command=(*TO_HF, "nowhere")),
    "convert_foreign_folder": Mistake("holds no whole checkpoint", spoil=foreign_folder, command=(*TO_HF, "foreign")),
    "convert_cut_short": Mistake(
        "not a whole checkpoint: __0_0.distcp has",
        spoil=truncate("trained/checkpoints/iter_0000002/__0_0.distcp", by=100),
        command=(*TO_HF, "trained/checkpoints/iter_0000002"),
        after_training=True,
    ),
    "convert_from_a_folder_that_is_no_model": Mistake("config.json", command=(*FROM_HF, "data")),
    "plot_missing_run": Mistake("nowhere", command=("tools/plot_run.py", "nowhere")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gives_one_message_and_leaves_nothing_half_done(name, place, request):
    mistake = MISTAKES[name]
    if mistake.after_training:
        shutil.copytree(request.getfixturevalue("finished_run"), place.root / "trained")
    (refusal,) = refuse(mistake, place)
    check(mistake, refusal, place.root)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_of_other_data",
        pytest.param("run_dir_of_another_model", marks=pytest.mark.slow),
        pytest.param("wandb_not_installed", marks=pytest.mark.slow),
    ],
)
def test_mistake_met_by_two_ranks_ends_both_and_is_told_once(name, place, request):
    mistake = MISTAKES[name]
    if mistake.after_training:
        shutil.copytree(request.getfixturevalue("finished_run"), place.root / "trained")
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**meeting, "RANK": number, "LOCAL_RANK": number} for number in "01"]
    first, second = refuse(mistake, place, ranks)
    check(mistake, first, place.root)
    assert (second.returncode, second.errors) == (EXIT_CODE, [])


def test_several_mistakes_are_told_at_once(place):
    place.edit("hidden_size = 32", "hidden_sise = 32")
    place.edit("lr = 1e-2", 'lr = "fast"')
    done = run(["pretrain_pints.py", str(place.config)], place.root)
    assert (done.returncode, done.stderr.count("error: ")) == (EXIT_CODE, 3)


def test_mistake_of_a_configuration_makes_no_run_directory(place):
    place.edit("num_attention_heads = 4", "num_attention_heads = 5")
    run(["pretrain_pints.py", str(place.config)], place.root)
    assert not (place.root / "run").exists()


def test_damaged_checkpoint_that_is_the_only_one_is_refused_rather_than_begun_anew(place, finished_run):
    shutil.copytree(finished_run, place.root / "run")
    path = place.root / "run" / "checkpoints" / "iter_0000002"
    (path / "megapints.json").write_text('{"format": 1')
    done = run(["pretrain_pints.py", str(place.config), "--train.exit_iters", "1"], place.root)
    assert done.returncode == 2
    assert f"ignored {path}: " in done.stdout
    assert "none that is whole" in done.stderr and "Traceback" not in done.stderr
