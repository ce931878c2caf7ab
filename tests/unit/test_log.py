"""Which rank says what, and where."""

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_ext.errors import MegapintsError
from megatron_ext.log import setup_logging

ROOT = Path(__file__).resolve().parents[2]
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(autouse=True)
def _restore_logging():
    """Take our handlers and warning filters off again."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if hasattr(handler, "of_megapints")]:
        root.removeHandler(handler)
        handler.close()


def test_rank_zero_prints_with_a_time_stamp(capsys):
    setup_logging(rank=0, world_size=4, path=None)
    logging.getLogger("megatron_ext.training").info("iteration %d", 7)
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"{STAMP} iteration 7\n", out)
    assert err == ""


def test_rank_zero_names_the_level_of_a_warning(capsys):
    setup_logging(rank=0, world_size=1, path=None)
    logging.getLogger("megatron_ext").warning("careful")
    assert re.fullmatch(rf"{STAMP} WARNING careful\n", capsys.readouterr().out)


def test_other_rank_keeps_quiet_about_information(capsys):
    setup_logging(rank=3, world_size=4, path=None)
    logging.getLogger("megatron_ext").info("nothing new")
    assert capsys.readouterr() == ("", "")


def test_other_rank_warns_under_its_number(capsys):
    setup_logging(rank=3, world_size=4, path=None)
    logging.getLogger("megatron_ext").warning("careful")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"{STAMP} \[rank 3\] WARNING careful\n", err)


def test_file_holds_what_rank_zero_said(tmp_path):
    path = tmp_path / "run" / "log.txt"
    setup_logging(rank=0, world_size=1, path=path)
    logging.getLogger("megatron_ext").info("hello")
    assert re.fullmatch(rf"{STAMP} hello\n", path.read_text())


def test_file_of_a_former_start_is_continued(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("before\n")
    setup_logging(rank=0, world_size=1, path=path)
    logging.getLogger("megatron_ext").info("after")
    assert re.fullmatch(rf"before\n{STAMP} after\n", path.read_text())


def test_other_rank_leaves_the_file_alone(tmp_path):
    path = tmp_path / "log.txt"
    setup_logging(rank=1, world_size=2, path=path)
    logging.getLogger("megatron_ext").error("bad")
    assert not path.exists()


def test_second_call_replaces_the_first(capsys, tmp_path):
    setup_logging(rank=0, world_size=1, path=tmp_path / "a.txt")
    setup_logging(rank=0, world_size=1, path=tmp_path / "b.txt")
    logging.getLogger("megatron_ext").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "a.txt").read_text() == ""


@pytest.mark.parametrize("library", ["megatron.core.optimizer", "torch.distributed", "transformer_engine"])
def test_library_information_is_left_out(capsys, library):
    setup_logging(rank=0, world_size=1, path=None)
    logging.getLogger(library).info("planning 17 buckets")
    assert capsys.readouterr() == ("", "")


def test_library_warning_is_said_once_by_rank_zero(capsys):
    setup_logging(rank=0, world_size=2, path=None)
    logging.getLogger("megatron.core").warning("odd")
    assert "odd" in capsys.readouterr().out
    setup_logging(rank=1, world_size=2, path=None)
    logging.getLogger("megatron.core").warning("odd")
    assert capsys.readouterr() == ("", "")


def test_library_whose_name_only_begins_alike_is_ours(capsys):
    setup_logging(rank=0, world_size=1, path=None)
    logging.getLogger("megatron_ext.data").info("ours")
    assert "ours" in capsys.readouterr().out


def warn_as(module: str) -> None:
    warnings.warn_explicit("beware", UserWarning, filename="x.py", lineno=1, module=module)


def test_python_warning_goes_through_the_log(capsys):
    setup_logging(rank=0, world_size=1, path=None)
    warn_as("megatron_ext.data.blend")
    out, err = capsys.readouterr()
    assert re.match(rf"{STAMP} WARNING x.py:1: UserWarning: beware", out)
    assert err == ""


@pytest.mark.parametrize("module", ["megatron.core.optimizer", "torch", "torch.jit._script"])
def test_library_import_warning_is_dropped(capsys, module):
    setup_logging(rank=0, world_size=1, path=None)
    warn_as(module)
    assert capsys.readouterr() == ("", "")


def test_unwritable_file_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MegapintsError, match="log file cannot be written .*; free the path"):
        setup_logging(rank=0, world_size=1, path=tmp_path / "file" / "log.txt")


def test_console_follows_a_replaced_stdout(capsys, monkeypatch):
    # What a live progress display does while it runs.
    setup_logging(rank=0, world_size=1, path=None)
    said = []

    class Display:
        def write(self, text):
            said.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Display())
    logging.getLogger("megatron_ext").info("above the bar")
    assert "above the bar" in "".join(said)


def test_log_module_does_not_import_torch():
    code = "import sys, megatron_ext.log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
