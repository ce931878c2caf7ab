"""Figures of a run as people say them."""

import math

import pytest

from tools.watching import figures


def test_smoothing_averages_neighbours_on_both_sides():
    assert figures.smooth([0, 3, 6, 3, 0], 3) == [0, 3, 4, 3, 1.5]


def test_smoothing_over_one_row_changes_nothing():
    assert figures.smooth([5, 1, 4], 1) == [5, 1, 4]


def test_smoothing_leaves_gaps_out():
    assert figures.smooth([1, math.nan, 3], 3)[1] == 2


@pytest.mark.parametrize(
    "count, text",
    [(950, "950"), (12_500, "12.5k"), (3e6, "3M"), (57e9, "57B"), (1.2e12, "1.2T"), (0, "0")],
)
def test_tokens_are_written_as_people_say_them(count, text):
    assert figures.format_tokens(count) == text


@pytest.mark.parametrize("value, text", [(4e-4, "4e-4"), (2.5e-5, "2.5e-5"), (0, "0"), (1.0, "1e0")])
def test_learning_rate_is_written_as_in_a_config(value, text):
    assert figures.format_lr(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (8.4, "8 s"), (60, "1 min"), (125, "2 min 5 s"), (12_000, "3 h 20 min"), (352_800, "4 d 2 h")],
)
def test_duration_is_written_by_its_largest_units(seconds, text):
    assert figures.format_duration(seconds) == text


@pytest.mark.parametrize("size, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")])
def test_size_is_written_in_binary_units(size, text):
    assert figures.format_bytes(size) == text


def test_sparkline_shows_the_shape():
    assert figures.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"


def test_sparkline_averages_what_does_not_fit():
    assert figures.sparkline([0, 0, 7, 7], 2) == "▁█"


def test_sparkline_leaves_gaps_and_keeps_a_flat_curve_in_the_middle():
    assert figures.sparkline([2, math.nan, 2], 3) == "▄ ▄"


def test_sparkline_of_nothing_is_empty():
    assert figures.sparkline([], 10) == "" == figures.sparkline([math.nan], 10)
