"""How a run stands, from its directory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import EXIT_CODE
from tests.conftest import ROOT
from tests.unit.run_folders import BEGAN, row, start, stop, train, valid, write_checkpoint, write_run
from tools import status
from tools.watching.state import Status, Watched


def look(folder: Path, seconds: float) -> Status:
    """Look at a run so many seconds after its first start."""
    return Watched(folder).look(BEGAN + seconds)


def log_at(folder: Path, seconds: float, text: str) -> None:
    (folder / "log.txt").write_text(text)
    os.utime(folder / "log.txt", (BEGAN + seconds, BEGAN + seconds))


def test_running_run_tells_its_newest_figures(tmp_path):
    rows = [start(0, 0), train(10, 20, 5.0), train(20, 40, 4.0, lr=2e-4, mfu=0.4), valid(20, 41, 4.5)]
    found = look(write_run(tmp_path, rows), 45)
    assert (found.state, found.iteration, found.progress) == ("running", 20, 0.2)
    assert (found.loss, found.lr, found.mfu, found.valid_loss) == (4.0, 2e-4, 0.4, 4.5)
    assert (found.consumed_tokens, found.tokens_per_second, found.world_size) == (20 * 128, 64.0, 2)


def test_time_left_is_at_the_pace_of_rows_with_validations_included(tmp_path):
    # 3 s an iteration by the clock, though 2 s by iteration_seconds; 80 remain, and 5 s have passed
    found = look(write_run(tmp_path, [start(0, 0), train(10, 30), train(20, 60)]), 65)
    assert found.eta_seconds == pytest.approx(80 * 3 - 5)


def test_time_left_after_one_row_is_at_its_own_pace(tmp_path):
    assert look(write_run(tmp_path, [start(0, 0), train(10, 30)]), 30).eta_seconds == pytest.approx(90 * 2)


def test_pace_of_a_session_before_the_restart_does_not_count(tmp_path):
    rows = [start(0, 0), train(10, 10), start(10, 5000), train(20, 5030), train(30, 5060)]
    assert look(write_run(tmp_path, rows), 5060).eta_seconds == pytest.approx(70 * 3)


def test_run_without_new_rows_for_long_is_stalled(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 50), train(20, 100)])
    assert look(folder, 100 + 149).state == "running"  # three times 50 s
    found = look(folder, 100 + 151)
    assert (found.state, found.since, found.eta_seconds) == ("stalled", BEGAN + 100, None)
    assert found.warnings[0].startswith("no new metrics for 2 min 31 s")


def test_first_iteration_may_take_longer_than_a_row(tmp_path):
    folder = write_run(tmp_path, [start(0, 0)])
    assert look(folder, 600).state == "running"
    assert look(folder, 901).state == "stalled"


def test_stopped_run_says_why(tmp_path):
    found = look(write_run(tmp_path, [start(0, 0), train(10, 10), stop(10, 11, "asked by SIGTERM")]), 99999)
    assert (found.state, found.reason, found.eta_seconds) == ("stopped", "asked by SIGTERM", None)


def test_failed_run_says_how(tmp_path):
    found = look(write_run(tmp_path, [start(0, 0), train(10, 10), stop(10, 11, "failed: the loss is nan")]), 99999)
    assert (found.state, found.reason) == ("failed", "the loss is nan")


def test_start_that_failed_before_any_other_row_is_failed(tmp_path):
    found = look(write_run(tmp_path, [stop(0, 11, "failed: node n7 has no GPU")]), 99)
    assert (found.state, found.reason) == ("failed", "node n7 has no GPU")


def test_finished_run_is_finished(tmp_path):
    found = look(write_run(tmp_path, [start(0, 0), train(100, 10), stop(100, 11, "finished: 100 iterations")]), 99)
    assert (found.state, found.progress, found.warnings) == ("finished", 1.0, [])


def test_directory_without_anything_has_not_started(tmp_path):
    found = look(tmp_path, 0)
    assert (found.state, found.warnings) == ("not started", ["nothing of a run is in this directory yet"])


def test_run_with_a_log_but_no_rows_is_starting(tmp_path):
    log_at(tmp_path, 0, "2026-11-21 00:00:00 starting from random weights\n")
    assert look(tmp_path, 60).state == "starting"
    assert look(tmp_path, 901).state == "stalled"


def test_stopped_run_whose_log_goes_on_is_starting_again(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10), stop(10, 11, "asked by SIGUSR1")])
    log_at(folder, 11, "2026-11-21 00:00:00 stopped after iteration 10: asked by SIGUSR1\n")
    assert look(folder, 500).state == "stopped"
    log_at(folder, 490, "2026-11-21 00:00:00 resumed from runs/x/checkpoints/iter_0000010\n")
    assert look(folder, 500).state == "starting"


def test_restarts_are_counted_with_reason_and_lost_time(tmp_path):
    rows = [
        start(0, 0), train(10, 10), stop(10, 12, "asked by SIGTERM"), start(10, 20),
        train(20, 30), start(10, 42), train(20, 50),
    ]  # fmt: skip
    found = look(write_run(tmp_path, rows), 50)
    assert [(one.iteration, one.redone_iterations) for one in found.restarts] == [(10, 0), (10, 10)]
    assert found.lost_seconds == pytest.approx((20 - 12) + (42 - 30) + (30 - 20))


def test_restart_shows_what_the_run_said_of_it(tmp_path):
    said = {"restart": 1, "reason": "srun ended with signal KILL", "lost_seconds": 77.0, "redone_iterations": 5}
    (one,) = look(write_run(tmp_path, [start(0, 0), train(15, 10), start(10, 20, **said)]), 50).restarts
    assert (one.reason, one.lost_seconds, one.redone_iterations) == ("srun ended with signal KILL", 77.0, 5)


def test_three_starts_at_one_iteration_are_a_warning(tmp_path):
    rows = [start(10, 0), train(15, 5), start(10, 20), train(15, 25), start(10, 40)]
    assert any("does not get on" in warning for warning in look(write_run(tmp_path, rows), 41).warnings)


def test_skips_and_rewinds_are_told_in_their_own_words(tmp_path):
    rows = [start(0, 0), train(10, 10), row("rewind", 5, 11, reason="spike"), row("skip", 5, 11, first_sample=40)]
    found = look(write_run(tmp_path, rows), 12)
    assert (found.rewinds, found.skipped) == (["at iteration 5: reason spike"], ["at iteration 5: first_sample 40"])


def test_rows_of_unknown_kinds_are_no_obstacle(tmp_path):
    rows = [start(0, 0), {"kind": "preflight", "hosts": ["n1"]}, train(10, 10), {"kind": "straggler", "rank": 3}]
    assert look(write_run(tmp_path, rows), 12).iteration == 10


def test_loss_that_is_not_finite_is_a_warning(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10, float("nan"))])
    found = look(folder, 12)
    assert found.loss is None and found.warnings == ["the loss is not finite (nan)"]


def test_checkpoint_is_told_with_age_and_size(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)])
    path = write_checkpoint(folder, 10, size=2048)
    os.utime(path / "megapints.json", (BEGAN + 5, BEGAN + 5))
    found = look(folder, 15).checkpoint
    assert found is not None
    assert (found.iteration, found.size_bytes) == (10, 2048) and found.age_seconds == pytest.approx(10)


def test_save_in_progress_is_told_and_a_dead_one_is_a_warning(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)])
    (folder / "checkpoints" / "iter_0000010.tmp").mkdir(parents=True)
    running, stalled = look(folder, 12), look(folder, 9999)
    assert (running.being_saved, running.warnings) == ("iter_0000010.tmp", [])
    assert stalled.being_saved is None and any("iter_0000010.tmp is not whole" in one for one in stalled.warnings)


def test_checkpoints_that_cannot_be_listed_are_a_warning(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)])
    (folder / "checkpoints").symlink_to("/archive")
    (warning,) = look(folder, 12).warnings
    assert "checkpoints: is a link to /archive, which is not there" in warning


def test_warnings_of_the_log_are_passed_on(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)])
    log_at(folder, 10, "2026-11-21 00:00:00 fine\n2026-11-21 00:00:01 WARNING the save failed\n")
    assert look(folder, 12).warnings == ["log.txt, 2026-11-21 00:00:01: WARNING the save failed"]


def test_run_is_looked_at_again_as_it_grows(tmp_path):
    folder = write_run(tmp_path, [start(0, 0)], tail='{"kind": "trai')
    watched = Watched(folder)
    assert watched.look(BEGAN).iteration == 0
    write_run(folder, [start(0, 0), train(10, 10)])
    assert watched.look(BEGAN + 10).iteration == 10


def test_no_terminal_gets_plain_lines(tmp_path, capsys):
    folder = write_run(tmp_path / "a", [start(0, 0), train(10, 10), stop(10, 11, "finished: 10 iterations")])
    assert status.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("state") and "finished since" in lines[0]
    assert any(line.startswith("progress") and "iteration 10 of 100, 10.0%" in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_several_runs_get_a_line_each(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name, [start(0, 0), train(10, 10)])) for name in ("a", "b")]
    assert status.main(folders) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "iteration"]
    assert [line.split()[:3] for line in lines] == [["a", "stalled", "10"], ["b", "stalled", "10"]]


def test_runs_of_one_name_go_by_their_paths(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name / "run", [start(0, 0)])) for name in ("a", "b")]
    assert status.main(folders) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == folders


def test_json_is_one_strict_object_a_run(tmp_path, capsys):
    rows = [start(0, 0), train(10, 10, float("nan")), train(20, 20), start(20, 30)]
    folders = [write_run(tmp_path / "a", rows), write_run(tmp_path / "b", [start(0, 0)])]
    write_checkpoint(folders[0], 20)
    assert status.main(["--json", *map(str, folders)]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(word)

    first, second = (json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines())
    assert (first["name"], first["restarts"][0]["iteration"], first["checkpoint"]["iteration"]) == ("a", 20, 20)
    assert first["recent_losses"] == [None, 4.0] and first["progress"] == 0.2
    assert second["loss"] is None and second["checkpoint"] is None


def test_screen_shows_every_fact_and_no_markup_of_its_own(tmp_path):
    from rich.console import Console

    rows = [start(0, 0), train(10, 10), stop(10, 11, "asked by [bold]someone[/bold]")]
    found = look(write_run(tmp_path / "a", rows), 20)
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(status.screen([found]))
    console.print(status.screen([found, found]))
    text = console.export_text()
    assert "asked by [bold]someone[/bold]" in text
    for fact in status.facts(found):
        assert fact.label in text and fact.text in text


def test_missing_run_is_one_clear_line(tmp_path, capsys):
    assert status.main([str(tmp_path / "no")]) == EXIT_CODE
    message = f"error: {tmp_path}/no: not there; RUN must be a run directory, which a run makes when it starts\n"
    assert capsys.readouterr().err == message


def test_file_of_something_else_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "x.toml").write_text("a = 1\n")
    assert status.main([str(tmp_path / "x.toml")]) == EXIT_CODE
    assert "no line of it is a row of metrics" in capsys.readouterr().err


def test_status_needs_neither_torch_nor_megatron(tmp_path):
    folder = write_run(tmp_path, [start(0, 0), train(10, 10)])
    code = (
        "import sys; from tools import status, report_run; "
        f"status.main([{str(folder)!r}]); report_run.main([{str(folder)!r}]); "
        "print(sorted({'torch', 'megatron', 'numpy', 'matplotlib', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
