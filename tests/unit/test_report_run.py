"""The HTML report of a run: whole, self-contained, well-formed, and true to the rows."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ext.errors import EXIT_CODE
from tests.unit.run_folders import BEGAN, row, start, stop, train, valid, write_run
from tools import report_run
from tools.watching import charts, page
from tools.watching.reading import read_run

VOID = {"meta", "input", "br", "img", "link", "hr"}
LOG = """\
2026-11-21 00:00:00 2 ranks: tp 1 x dp 2 on CPU
2026-11-21 00:00:00 model: 43,360 parameters
2026-11-21 00:00:00 data: source      tokens  epochs
2026-11-21 00:00:00 data: data/prose   8,576    0.53
2026-11-21 00:00:00 validation: 93 samples
"""


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every tag closed in order, ids once, and where each text stands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.outside: list[str] = []
        self.labels_for: list[str] = []
        self.labelled: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open
        assert len(self.ids) == len(set(self.ids)), self.ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute twice in <{tag}>"
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [(values["href"] or "")] if "href" in values else []
        self.labels_for += [values["for"] or ""] if "for" in values else []
        self.labelled += [values["aria-labelledby"] or ""] if "aria-labelledby" in values else []
        self.outside += [f"{tag} {name}" for name in ("src", "srcset", "xlink:href", "action") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "rect"), tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def write_small(folder: Path, **how) -> Path:
    rows = [
        start(0, 0), train(10, 20, 5.0), valid(10, 21, 5.5), row("checkpoint", 10, 22), train(20, 40, 9.0),
        start(10, 60), train(20, 80, 4.0), valid(20, 81, 4.5), stop(20, 82, "asked by SIGTERM"),
    ]  # fmt: skip
    return write_run(folder, rows, log=LOG, **how)


def report(*folders: Path, by: str = "tokens") -> str:
    return page.page_html([read_run(folder) for folder in folders], by=by, now=BEGAN + 90)


def chart_data(text: str, name: str) -> dict:
    found = re.search(
        rf'<figure class="chart" id="{name}">.*?<script type="application/json">(.*?)</script>', text, re.S
    )
    assert found is not None
    return json.loads(found[1])


def test_page_is_well_formed_and_needs_nothing_from_outside(tmp_path):
    text = report(write_small(tmp_path / "a"), write_small(tmp_path / "b"))
    read = Page(text)
    assert read.outside == [] and all(link.startswith("#") for link in read.links)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text


def test_page_refers_only_to_ids_that_it_has(tmp_path):
    read = Page(report(write_small(tmp_path / "a")))
    referred = {link.removeprefix("#") for link in read.links} | {*read.labels_for, *read.labelled}
    assert referred and referred <= set(read.ids)


def test_curves_leave_out_what_a_resume_did_again(tmp_path):
    data = chart_data(report(write_small(tmp_path / "a")), "loss")
    by_label = {one["label"]: one for one in data["series"]}
    assert (by_label["train"]["iteration"], by_label["train"]["y"]) == ([10, 20], [5.0, 4.0])
    assert by_label["train"]["x"] == [1280, 2560]
    assert (by_label["validation"]["y"], by_label["validation"]["x"]) == ([5.5, 4.5], [1280, 2560])


def test_axis_by_iteration_is_asked_for(tmp_path):
    data = chart_data(report(write_small(tmp_path / "a"), by="iteration"), "lr")
    assert (data["xLabel"], data["series"][0]["x"]) == ("iteration", [10, 20])


def test_several_runs_share_each_chart(tmp_path):
    data = chart_data(report(write_small(tmp_path / "a"), write_small(tmp_path / "b")), "grad_norm")
    assert [(one["label"], one["color"]) for one in data["series"]] == [("a", 0), ("b", 1)]


def test_texts_of_a_run_are_escaped_wherever_they_stand(tmp_path):
    evil = "</script><script>alert(1)</script>&\"'<img src=x onerror=alert(1)>"
    folder = write_run(
        tmp_path / "<b>run & 'co'",
        [start(0, 0, device=evil), train(10, 10), row("skip", 10, 11, reason=evil), stop(10, 12, evil)],
        log=LOG + f"2026-11-21 00:00:00 data: {evil}\n2026-11-21 00:00:00 WARNING {evil}\n",
    )
    (folder / "config.toml").write_text(f"name = '''{evil}'''\n")
    (folder / "environment.json").write_text(json.dumps({"host": evil, "command": [evil], "packages": {evil: evil}}))
    text = report(folder, write_small(tmp_path / "b"))
    read = Page(text)
    assert read.outside == [] and "<script>alert" not in text and "<img" not in text
    assert evil in read.text
    assert chart_data(text, "loss")["series"][0]["label"] == "<b>run & 'co': train"


def test_configurations_are_compared_where_they_differ(tmp_path):
    first, second = write_small(tmp_path / "a", train_iters=100), write_small(tmp_path / "b", train_iters=200)
    text = report(first, second)
    assert re.search(r'<th scope="row">train\.train_iters</th><td>100</td><td>200</td>', text)
    assert "train.exit_iters" not in text.split("config.toml of")[0]


def test_data_sources_stand_in_a_table(tmp_path):
    text = report(write_small(tmp_path / "a"))
    assert re.search(r'<th scope="row">data/prose</th><td class="number">8,576</td><td class="number">0\.53</td>', text)
    assert "validation: 93 samples" in text


def test_data_lines_of_another_shape_are_shown_as_they_are(tmp_path):
    folder = write_small(tmp_path / "a")
    (folder / "log.txt").write_text("2026-11-21 00:00:00 data: data/a: 9,761 samples, 0.02 passes\n")
    assert "<pre>data/a: 9,761 samples, 0.02 passes</pre>" in report(folder)


def test_summary_tells_restarts_and_where_the_best_validation_was(tmp_path):
    text = Page(report(write_small(tmp_path / "a"))).text
    assert "4.5000 at iteration 20" in text and "43,360" in text
    assert "1, 38 s lost" in text  # 18 s done again since the checkpoint's row at 22, and 20 s between


def test_time_line_has_a_bar_for_each_session(tmp_path):
    text = report(write_small(tmp_path / "a"))
    assert text.count("<rect") == 2
    assert "ended without a word" in text and text.count("killed-mark") == 1 + 1  # in the style sheet, and once drawn


def test_run_that_has_not_trained_yet_is_reported_all_the_same(tmp_path):
    read = Page(report(write_run(tmp_path / "a", [start(0, 0)])))
    assert "No training row yet." in read.text


def test_loss_that_was_not_finite_breaks_the_curve(tmp_path):
    rows = [start(0, 0), *(train(i, i, None if i == 30 else 4.0) for i in range(10, 60, 10))]
    text = report(write_run(tmp_path / "a", rows))
    Page(text)
    assert chart_data(text, "loss")["series"][0]["y"] == [4.0, 4.0, None, 4.0, 4.0]
    path = re.search(r'<path class="line"[^>]* d="([^"]*)"', text.split('id="loss"')[1])
    assert path is not None and path[1].count("M") == 2


def test_thinning_keeps_ends_and_spikes():
    values = [1.0] * 10_000
    values[4321], values[7777] = 99.0, -99.0
    positions = list(range(10_000))
    thin = charts.thinned(charts.Series(label="", color=0, xs=positions, ys=values, iterations=positions), 200)
    assert len(thin.xs) <= 202
    assert {0, 4321, 7777, 9999} <= set(thin.iterations)


@pytest.mark.parametrize(
    "span, ticks",
    [((0, 10), [0, 2, 4, 6, 8, 10]), ((4.17, 4.9), [4.2, 4.4, 4.6, 4.8]), ((0, 3e-4), [0, 1e-4, 2e-4, 3e-4])],
)
def test_ticks_are_round(span, ticks):
    assert charts.nice_ticks(charts.Interval(*span)) == pytest.approx(ticks)


def test_ticks_of_a_log_axis_are_round_too():
    assert charts.log_ticks(charts.Interval(0.1, 10)) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])


def test_report_lies_beside_the_metrics_of_a_single_run(tmp_path, capsys):
    folder = write_small(tmp_path / "a")
    before = {path.name for path in folder.iterdir()}
    assert report_run.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}
    Page((folder / "report.html").read_text())


def test_several_runs_without_output_are_refused(tmp_path, capsys):
    folders = [str(write_small(tmp_path / name)) for name in ("a", "b")]
    assert report_run.main(folders) == EXIT_CODE
    assert capsys.readouterr().err.startswith("error: --output: several runs")


def test_output_that_cannot_be_written_is_one_clear_line(tmp_path, capsys):
    folder = write_small(tmp_path / "a")
    assert report_run.main([str(folder), "--output", str(tmp_path / "no" / "x.html")]) == EXIT_CODE
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.html: cannot be written" in error


def test_missing_run_leaves_the_former_report_alone(tmp_path, capsys):
    output = tmp_path / "report.html"
    output.write_text("former")
    assert report_run.main([str(tmp_path / "no"), "--output", str(output)]) == EXIT_CODE
    assert output.read_text() == "former"
    assert "not there; RUN must be a run directory" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which would read the script, is not installed")
def test_script_of_the_page_is_sound_javascript():
    script = Path(charts.__file__).with_name("report.js")
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
