"""Reading a configuration: every problem is told at once, and what is read is what was written."""

import json
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_ext.config.load import (
    config_from_dict,
    find_config,
    load_config,
    parse_command_line,
    to_toml,
)
from megatron_ext.config.tree import Config
from megatron_ext.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

SOUND = """
name = "run"

[model]
num_layers = 2
hidden_size = 64
ffn_hidden_size = 128
num_attention_heads = 4
num_query_groups = 2
vocab_size = 1000
max_position_embeddings = 128

[data]
tokenizer = "tok"
train_data = ["a", "b"]

[train]
seq_length = 128
micro_batch_size = 2
global_batch_size = 8
train_iters = 10

[optimizer]
lr = 1e-3
"""


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SOUND, encoding="utf-8")
    return path


def problems_of(path: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the problems that loading `text` gives, without the file's name in front."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return [problem.removeprefix(f"{path}: ") for problem in error.value.problems]


def parse(*words: object) -> list[str]:
    """Return the problems that a command line gives."""
    with pytest.raises(ConfigError) as error:
        parse_command_line([str(word) for word in words], prog="prog", description="Train.")
    return list(error.value.problems)


def test_load_config_sound_file_gives_values_and_defaults(sound: Path) -> None:
    config = load_config(sound)
    assert config.model.hidden_size == 64
    assert config.data.train_data == ("a", "b")
    assert config.optimizer.adam_beta2 == 0.95
    assert config.parallel.use_distributed_optimizer is True


def test_load_config_integer_for_a_number_is_taken_as_a_number(sound: Path) -> None:
    config = load_config(Path(sound), ["--optimizer.clip_grad", "2"])
    assert isinstance(config.optimizer.clip_grad, float)
    sound.write_text(SOUND.replace("lr = 1e-3", "lr = 1\nclip_grad = 0"), encoding="utf-8")
    assert isinstance(load_config(sound).optimizer.clip_grad, float)


def test_load_config_none_in_quotes_is_none(sound: Path) -> None:
    sound.write_text(SOUND.replace("train_iters = 10", 'train_iters = 10\neval_interval = "none"'))
    assert load_config(sound).train.eval_interval is None


def test_load_config_none_for_a_choice_of_that_name_stays_a_choice(sound: Path) -> None:
    sound.write_text(SOUND + '[parallel]\nrecompute_granularity = "none"\n')
    assert load_config(sound).parallel.recompute_granularity == "none"


def test_load_config_problem_is_prefixed_by_the_file(sound: Path) -> None:
    sound.write_text(SOUND.replace("num_layers = 2", "num_layers = 2.5"))
    with pytest.raises(ConfigError) as error:
        load_config(sound)
    assert str(error.value) == f"{sound}: model.num_layers: 2.5 is not an integer."


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("num_layers = 2", "num_layer = 2", "model.num_layer: unknown key; did you mean num_layers?"),
        ("[data]", "[dat]", "dat: unknown section or key; did you mean data?"),
        (
            "lr = 1e-3",
            "lr = 1e-3\nseq_length = 1",
            "optimizer.seq_length: unknown key; it belongs in [train].",
        ),
        ('name = "run"', 'name = "run"\nlr = 1.0', "lr: unknown key; it belongs in [optimizer]."),
        ("num_layers = 2", "", "model.num_layers: missing; it must be an integer."),
        ("[optimizer]\nlr = 1e-3", "", "optimizer: missing; add a table [optimizer] with lr."),
        ("num_layers = 2", "num_layers = true", "model.num_layers: true is not an integer."),
        ("num_layers = 2", "num_layers = 2.0", "model.num_layers: 2.0 is not an integer; write 2."),
        ("num_layers = 2", 'num_layers = "2"', 'model.num_layers: "2" is not an integer; write 2.'),
        ("lr = 1e-3", 'lr = "3e-4"', 'optimizer.lr: "3e-4" is not a number; write 0.0003.'),
        (
            'train_data = ["a", "b"]',
            'train_data = "a"',
            'data.train_data: "a" is not an array of strings; write ["a"].',
        ),
        (
            'train_data = ["a", "b"]',
            'train_data = ["a", 1]',
            'data.train_data: ["a", 1] is not an array of strings.',
        ),
        (
            "train_iters = 10",
            "train_iters = 10\nrampup_batch_size = [2, 2]",
            'train.rampup_batch_size: [2, 2] is not an array of 3 integers or "none".',
        ),
        (
            "lr = 1e-3",
            'lr = 1e-3\nlr_decay_style = "cosin"',
            'optimizer.lr_decay_style: "cosin" is not one of "cosine", "linear", "wsd", "constant"; write "cosine".',
        ),
        (
            "train_iters = 10",
            'train_iters = 10\nseed = "none"',
            'train.seed: "none" is not an integer.',
        ),
    ],
)
def test_load_config_bad_file_gives_its_message(sound: Path, old: str, new: str, problem: str) -> None:
    assert old in SOUND
    assert problem in problems_of(sound, SOUND.replace(old, new))


def test_load_config_section_that_is_a_value_is_refused(sound: Path) -> None:
    assert problems_of(sound, "precision = 3\n" + SOUND) == ["precision: 3 is not a table; write it as [precision]."]


def test_load_config_true_in_quotes_says_what_to_write(sound: Path) -> None:
    assert problems_of(sound, SOUND + '[parallel]\nsequence_parallel = "True"\n') == [
        'parallel.sequence_parallel: "True" is not true or false; write true.'
    ]


def test_load_config_all_problems_come_at_once(sound: Path) -> None:
    text = SOUND.replace("num_layers = 2", "num_layers = true\nfoo = 1").replace("lr = 1e-3", "")
    assert [problem.split(":")[0] for problem in problems_of(sound, text)] == [
        "model.foo",
        "model.num_layers",
        "optimizer.lr",
    ]


def test_load_config_broken_toml_tells_the_line(sound: Path) -> None:
    (problem,) = problems_of(sound, "name = run\n")
    assert problem.startswith("not valid TOML:") and "line 1" in problem


def test_load_config_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "no.toml")
    assert str(error.value) == f"{tmp_path}/no.toml: cannot be read: No such file or directory."


def test_load_config_file_that_is_no_text_is_one_line(sound: Path) -> None:
    sound.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec can't decode") as error:
        load_config(sound)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        (["--train.train_iters", "30"], "train.train_iters", 30),
        (["--train.train-iters=30"], "train.train_iters", 30),
        (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
        (["--parallel.sequence_parallel"], "parallel.sequence_parallel", True),
        (["--parallel.no_use_distributed_optimizer"], "parallel.use_distributed_optimizer", False),
        (["--parallel.use_distributed_optimizer", "false"], "parallel.use_distributed_optimizer", False),
        (["--log.tensorboard=false"], "log.tensorboard", False),
        (["--train.eval_interval", "none"], "train.eval_interval", None),
        (["--parallel.recompute_granularity", "none"], "parallel.recompute_granularity", "none"),
        (["--data.train_data", "x", "y", "z"], "data.train_data", ("x", "y", "z")),
        (["--data.train_weights", "1", "2.5"], "data.train_weights", (1.0, 2.5)),
        (["--train.rampup_batch_size", "2", "2", "50"], "train.rampup_batch_size", (2, 2, 50)),
        (["--optimizer.weight_decay", "-1"], "optimizer.weight_decay", -1.0),
        (["--checkpoint.init_from", "hf/model"], "checkpoint.init_from", "hf/model"),
    ],
)
def test_load_config_override_sets_its_field_alone(sound: Path, words: list[str], path: str, expected: object) -> None:
    section, name = path.split(".")
    before = load_config(sound)
    after = load_config(sound, words)
    assert getattr(getattr(after, section), name) == expected
    changed = replace(getattr(before, section), **{name: expected})
    assert after == replace(before, **{section: changed})


def test_load_config_override_of_the_name_needs_no_section(sound: Path) -> None:
    assert load_config(sound, ["--name", "other"]).name == "other"


def test_load_config_bad_overrides_are_all_named(sound: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(sound, ["--train.train_iter", "3", "--lr", "1", "--log.interval=1", "--log.interval=2"])
    assert list(error.value.problems) == [
        "command line: --train.train_iter: unknown option; did you mean --train.train_iters, "
        "--train.exit_iters or --train.eval_iters?",
        "command line: --lr: unknown option; did you mean --optimizer.lr?",
        "command line: --log.interval: given twice; give it once.",
    ]


def test_load_config_bad_override_values_are_all_named(sound: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = "--train.train_iters x --optimizer.lr y --precision.dtype fp16 --name --log.tensorboard maybe"
    with pytest.raises(ConfigError) as error:
        load_config(sound, words.split())
    assert list(error.value.problems) == [
        "command line: --train.train_iters: x is not an integer.",
        "command line: --optimizer.lr: y is not a number.",
        'command line: --precision.dtype: fp16 is not one of "fp32", "bf16", "fp8".',
        "command line: --name: needs a string.",
        "command line: --log.tensorboard: maybe is not true or false.",
    ]
    assert capfd.readouterr() == ("", "")  # tyro's own boxes stay away


def test_to_toml_round_trips_every_kind_of_value(sound: Path) -> None:
    config = load_config(sound, ["--train.rampup_batch_size", "2", "2", "50", "--data.train_weights", "1", "2"])
    awkward = replace(config, run_dir='a "quoted"\\path\n\twith \x7f and é')
    assert config_from_dict(tomllib.loads(to_toml(awkward))) == awkward


def test_to_toml_states_defaults_and_nones(sound: Path) -> None:
    values = tomllib.loads(to_toml(load_config(sound)))
    assert values["run_dir"] == "none"
    assert values["model"]["kv_channels"] == "none"
    assert values["optimizer"]["adam_beta2"] == 0.95
    assert values["parallel"]["sequence_parallel"] is False


def test_config_from_dict_takes_json_of_the_tree(sound: Path) -> None:
    config = load_config(sound)
    assert config_from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_config_from_dict_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^megapints.json: name: missing; it must be a string\."):
        config_from_dict({}, source="megapints.json")


def test_find_config_bundled_name_is_found_without_path_and_ending() -> None:
    assert find_config("pints_1.5b_2k") == find_config("pints_1.5b_2k.toml")
    assert find_config("pints_1.5b_2k") == ROOT / "configs" / "pints_1.5b_2k.toml"


def test_find_config_unknown_name_suggests_the_closest() -> None:
    with pytest.raises(ConfigError) as error:
        find_config("pints_1.5b_3k")
    assert "did you mean pints_1.5b_2k" in str(error.value)


def test_find_config_run_directory_points_to_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match=f"is a folder; did you mean {tmp_path}/config.toml"):
        find_config(str(tmp_path))


def test_parse_command_line_gives_all_four_answers(sound: Path) -> None:
    words = [str(sound), "--dry_run", "--world_size", "4", "--train.train_iters", "7"]
    line = parse_command_line(words, prog="prog", description="Train.")
    assert (line.config_path, line.dry_run, line.world_size) == (sound, True, 4)
    assert line.config == load_config(sound, ["--train.train_iters", "7"])


def test_parse_command_line_flags_may_stand_before_the_file(sound: Path) -> None:
    line = parse_command_line(["--dry_run", "--world_size", "4", str(sound)], prog="prog", description="")
    assert (line.dry_run, line.world_size) == (True, 4)


def test_parse_command_line_without_flags_is_a_real_run(sound: Path) -> None:
    line = parse_command_line([str(sound)], prog="prog", description="Train.")
    assert (line.dry_run, line.world_size) == (False, None)


def test_parse_command_line_without_config_names_the_bundled_ones() -> None:
    (problem,) = parse()
    assert problem.startswith("CONFIG is missing;") and "pints_1.5b_2k" in problem and "prog --help" in problem


def test_parse_command_line_option_before_config_is_refused() -> None:
    assert parse("--train.train_iters", "3", "tlm_xs") == ["CONFIG must come before --train.train_iters; see --help."]


def test_parse_command_line_world_size_without_dry_run_is_refused(sound: Path) -> None:
    assert parse(sound, "--world_size", "4") == [
        "command line: --world_size has no effect without --dry_run; the launcher starts the processes."
    ]


def test_parse_command_line_world_size_of_zero_is_refused(sound: Path) -> None:
    assert parse(sound, "--dry_run", "--world_size", "0") == ["command line: --world_size (0) must be at least 1."]


def test_parse_command_line_stray_word_is_refused(sound: Path) -> None:
    assert parse(sound, "stray") == ["command line: stray: unexpected; options are written --section.field VALUE."]


def test_parse_command_line_help_without_config_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_command_line(["--help"], prog="prog.py", description="Train a model.")
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    for part in ("usage: prog.py CONFIG", "Train a model.", "examples:", "pints_1.5b_2k", "--dry_run"):
        assert part in shown


def test_parse_command_line_help_with_config_shows_fields_and_its_values(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_command_line([str(sound), "--help"], prog="prog.py", description="Train a model.")
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--model.hidden_size INT Width of the residual stream. (default: 64)" in shown
    assert "--dry_run" in shown


def test_load_config_imports_neither_torch_nor_numpy_nor_megatron(sound: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from megatron_ext.config.load import load_config;"
        "from megatron_ext.config.checks import check_config;"
        f"check_config(load_config(Path({str(sound)!r}), ['--train.train_iters', '3']), world_size=8);"
        "print([name for name in ('torch', 'numpy', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_tree_is_frozen(sound: Path) -> None:
    config: Config = load_config(sound)
    with pytest.raises(AttributeError):
        config.train.train_iters = 3  # type: ignore[misc]


@pytest.mark.parametrize(("word", "value"), [("True", True), ("False", False), ("true", True), ("false", False)])
def test_override_flag_in_either_spelling_is_taken(sound: Path, word: str, value: bool) -> None:
    config = load_config(sound, ("--parallel.overlap_grad_reduce", word))
    assert config.parallel.overlap_grad_reduce is value
