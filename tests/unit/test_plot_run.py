"""Metrics to pictures: what is read, what is left out, what is refused."""

import json
import math
from pathlib import Path

import pytest

from megatron_ext.errors import EXIT_CODE, DataError
from tools import plot_run


def train_row(iteration: int, loss: float | None = 2.0, **more) -> dict:
    samples = 4 * iteration
    row = {
        "kind": "train",
        "iteration": iteration,
        "consumed_samples": samples,
        "consumed_tokens": 128 * samples,
        "loss": loss,
        "lr": 1e-3,
        "tokens_per_second": 5000.0,
        "mfu": None,
    }
    return row | more


def valid_row(iteration: int, loss: float = 2.5) -> dict:
    return {
        "kind": "valid",
        "iteration": iteration,
        "consumed_samples": 4 * iteration,
        "loss": loss,
        "tokens": 99,
    }


def write_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def test_run_is_read_with_its_name_and_rows(tmp_path):
    run = plot_run.read_run(write_run(tmp_path / "small", [train_row(10, 3.0), train_row(20, 2.0)]))
    assert (run.name, run.iterations, run.losses) == ("small", [10, 20], [3.0, 2.0])


def test_metrics_file_itself_is_accepted(tmp_path):
    folder = write_run(tmp_path / "small", [train_row(10)])
    assert plot_run.read_run(folder / "metrics.jsonl").name == "small"


def test_validation_stands_at_its_tokens(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [train_row(10), valid_row(15)]))
    # 4 samples an iteration, 128 tokens a sample
    assert run.validations == [plot_run.Validation(15, 15 * 4 * 128, 2.5)]


def test_rows_of_other_kinds_are_ignored(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [{"kind": "start", "time": 0}, train_row(10), {"kind": "stop"}]))
    assert run.iterations == [10]


def test_last_line_cut_short_is_left_out(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [train_row(10)], tail='{"kind": "train", "iter'))
    assert run.iterations == [10]


def test_damaged_line_within_is_left_out_aloud(tmp_path, capsys):
    write_run(tmp_path, [train_row(10)], tail='{"kind": "tr\n' + json.dumps(train_row(20)) + "\n")
    assert plot_run.read_run(tmp_path).iterations == [10, 20]
    assert "metrics.jsonl:2: left out" in capsys.readouterr().err


def test_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("step,loss\n1,2.0\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl: no line of it is a row of metrics"):
        plot_run.read_run(tmp_path)


def test_missing_run_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: not there; RUN must be"):
        plot_run.read_run(tmp_path / "nowhere")


def test_run_without_training_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="no training row yet"):
        plot_run.read_run(write_run(tmp_path, [{"kind": "start"}]))


def test_row_without_its_loss_is_named(tmp_path):
    row = train_row(10)
    del row["loss"]
    with pytest.raises(DataError, match="a row has no 'loss'"):
        plot_run.read_run(write_run(tmp_path, [row]))


def test_resumed_run_is_drawn_as_it_went_on(tmp_path):
    before = [
        train_row(10, 3.0),
        valid_row(10, 3.5),
        train_row(20, 9.0),
        valid_row(20, 9.5),
        train_row(30, 9.0),
    ]
    after = [train_row(20, 2.0), valid_row(20, 2.5)]
    run = plot_run.read_run(write_run(tmp_path, before + after))
    assert (run.iterations, run.losses) == ([10, 20], [3.0, 2.0])
    assert [(point.iteration, point.loss) for point in run.validations] == [(10, 3.5), (20, 2.5)]


def test_loss_stored_as_null_is_a_gap(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [train_row(10), train_row(20, None)]))
    assert math.isnan(run.losses[1])


def shown_loss_range(runs: list[plot_run.Run]) -> tuple[float, float]:
    axes = plot_run.draw(runs, by="tokens", smoothing=None).axes[0]
    return axes.get_ylim()


def test_spike_does_not_flatten_the_loss(tmp_path):
    rows = [train_row(i, 1000.0 if i == 400 else 8.0 - i / 100) for i in range(1, 500)]
    low, high = shown_loss_range([plot_run.read_run(write_run(tmp_path, rows))])
    assert 2.5 < low < 3.02 and 7.99 < high < 9


def test_first_loss_stays_in_the_picture(tmp_path):
    rows = [train_row(1, 10.4)] + [train_row(i, 3.0) for i in range(2, 1000)]
    assert shown_loss_range([plot_run.read_run(write_run(tmp_path, rows))])[1] > 10.4


def test_run_with_nothing_finite_is_still_drawn(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [train_row(1, None), train_row(2, None)]))
    assert len(plot_run.draw([run], by="tokens", smoothing=None).axes) == 3


def test_axis_by_iteration_is_labelled_so(tmp_path):
    run = plot_run.read_run(write_run(tmp_path, [train_row(10), train_row(20)]))
    figure = plot_run.draw([run], by="iteration", smoothing=None)
    assert figure.axes[-1].get_xlabel() == "iteration"
    assert list(figure.axes[1].lines[0].get_xdata()) == [10, 20]


def test_legend_tells_median_rate_and_mfu(tmp_path):
    rows = [train_row(i, tokens_per_second=speed, mfu=0.4) for i, speed in ((1, 10.0), (2, 900e3), (3, 901e3))]
    run = plot_run.read_run(write_run(tmp_path, rows))
    legend = plot_run.draw([run], by="tokens", smoothing=None).axes[2].get_legend()
    assert legend.get_texts()[0].get_text() == "median 900k tokens/s, MFU 40.0 %"


def test_single_run_is_drawn_beside_its_metrics(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [train_row(10), train_row(20), valid_row(20)])
    assert plot_run.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "plot.png"]


def test_several_runs_are_overlaid(tmp_path):
    folders = [write_run(tmp_path / name, [train_row(10), train_row(20)]) for name in ("a", "b")]
    runs = [plot_run.read_run(folder) for folder in folders]
    legend = plot_run.draw(runs, by="tokens", smoothing=None).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a: train", "b: train"]


def test_several_runs_without_output_are_refused(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name, [train_row(10)])) for name in ("a", "b")]
    assert plot_run.main(folders) == EXIT_CODE
    assert capsys.readouterr().err.startswith("error: --output: several runs")


def test_output_that_cannot_be_written_is_told_in_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [train_row(10)])
    assert plot_run.main([str(folder), "--output", str(tmp_path / "no" / "x.png")]) == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "cannot be written" in error
