"""Names are drawn as they are, numbers as people read them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.evaluation.drawing import (
    DPI,
    WIDTH,
    finite_range,
    interval_text,
    new_figure,
    number,
    percent,
    plain,
    png_bytes,
    set_title,
)
from smp_ensemble.metrics.bootstrap import Difference, Interval


def drawn(text: str) -> np.ndarray:
    figure = new_figure(1)
    figure.text(0.1, 0.5, text)
    return np.array(Image.open(io.BytesIO(png_bytes(figure))).convert("L"))


def test_dollars_are_dollars_and_not_mathematics():
    assert (drawn(plain("a $x_1$ b")) != drawn("a $x_1$ b")).any()
    assert (drawn(plain(r"$\frac$")) < 128).any()  # as mathematics it would not parse


@pytest.mark.parametrize("name", ["", " \n\t ", "_hidden", "line\nbreak", "道路", "x" * 500, "\x07bell", "🏠 house"])
def test_every_name_can_be_drawn_in_one_line(name):
    figure = new_figure(1)
    axes = figure.add_subplot()
    axes.plot([0, 1], label=plain(name))
    legend = axes.legend()
    assert len(legend.get_texts()) == 1
    assert "\n" not in plain(name)
    assert len(plain(name)) <= 28 + 1  # a space may hide an underscore
    png_bytes(figure)


def test_a_long_name_keeps_its_ends():
    assert plain("abcdefghijklmnopqrstuvwxyz", 11) == "abcde…vwxyz"
    assert plain("abcdefghijk", 11) == "abcdefghijk"


def test_a_png_has_the_common_width():
    figure = new_figure(2)
    set_title(figure, "A title that states what one sees", "And how to read it.")
    assert Image.open(io.BytesIO(png_bytes(figure))).size == (round(WIDTH * DPI), 2 * DPI)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (-0.5, "−0.5000"), (float("nan"), "–"), (0.0, "0.0000"), (1, "1.0000")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_signed_numbers_have_a_sign_unless_they_are_zero():
    assert [number(value, 3, signed=True) for value in (0.5, -0.5, 0.0001, -0.0001)] == [
        "+0.500", "−0.500", "0.000", "0.000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.0996, "10 %"), (0.01234, "1.2 %"), (0.999, "99.9 %"), (1e-9, "0 %")],
)
def test_percentages(share, text):
    assert percent(share) == text


def test_intervals_without_ends_are_the_estimate():
    nan = float("nan")
    assert interval_text(Interval(0.5, nan, nan)) == "0.500"
    assert interval_text(Difference(-0.5, -0.6, 0.1, 0.2), signed=True) == "−0.500 [−0.600, +0.100]"
    assert interval_text(Interval(nan, nan, nan)) == "–"


def test_axis_limits_hold_all_that_is_finite():
    low, high = finite_range(0.2, float("nan"), 0.6)
    assert low < 0.2 < 0.6 < high
    assert finite_range(float("nan")) == (0.0, 1.0)
    low, high = finite_range(0.4, 0.4)
    assert low < 0.4 < high
