"""Examples: errors are where truth and prediction differ, in every mode, for images of any shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import fake_examples, simulate
from evaluation.test_figures import check_png
from matplotlib.colors import to_rgb

from smp_ensemble.evaluation.drawing import ACCENT, MUTED
from smp_ensemble.evaluation.example_sheet import COLUMNS, LONGEST_SIDE, draw_examples
from smp_ensemble.evaluation.measurement import Example
from smp_ensemble.typing import Task

BINARY = Task("binary", ("background", "roof"))


def example(truth, mask, **changes) -> Example:
    """Of grey pixels."""
    truth, mask = np.asarray(truth, np.uint8), np.asarray(mask, np.uint8)
    height, width = truth.shape[-2:]
    image = np.full((height, width, 3), 100, np.uint8)
    return replace(Example("tile", image, truth, mask, np.zeros((height, width), np.float32), 0.5), **changes)


def errors_of(figure) -> np.ndarray:
    return np.asarray(figure.axes[COLUMNS.index("errors")].images[0].get_array())


@pytest.mark.parametrize("classes", [1, 5, 20])
def test_sheets_are_drawn(classes):
    simulation = simulate(classes=classes, images=3, size=32)
    figure = draw_examples(fake_examples(simulation), simulation.task)
    check_png(figure)
    assert len(figure.axes[0].get_ylabel().splitlines()) == 2


def test_binary_errors_are_told_apart():
    picture = errors_of(draw_examples([example([[0, 0, 1, 1, 255, 1]], [[0, 1, 0, 1, 1, 255]])], BINARY))[0]
    grey = [len(set(pixel.tolist())) == 1 for pixel in picture]
    assert grey == [True, False, False, True, False, False]
    assert picture[1] == pytest.approx(to_rgb(ACCENT))
    assert picture[2] == pytest.approx(to_rgb(MUTED))
    assert not np.allclose(picture[4], picture[5])  # ignored is not rejected


def test_multilabel_errors_are_those_of_any_label():
    truth = np.array([[[1, 0, 0]], [[0, 0, 1]]])
    mask = np.array([[[1, 1, 0]], [[0, 0, 1]]])
    task = Task("multilabel", ("roof", "road"))
    figure = draw_examples([example(truth, mask)], task)
    check_png(figure)
    assert [len(set(pixel.tolist())) > 1 for pixel in errors_of(figure)[0]] == [False, True, False]


def test_entropy_has_one_scale_for_all():
    calm, unsure = (example([[0, 1]], [[0, 1]], entropy=np.full((1, 2), value, np.float32)) for value in (0.1, 0.6))
    figure = draw_examples([calm, unsure], BINARY)
    heats = [figure.axes[4].images[0], figure.axes[9].images[0]]
    assert [heat.get_clim() for heat in heats] == [pytest.approx((0, 0.6)), pytest.approx((0, 0.6))]


@pytest.mark.parametrize(("shape", "bands"), [((3, 900), 4), ((900, 3), 1), ((1300, 1300), 3), ((1, 1), 1)])
def test_images_of_any_shape_and_bands(shape, bands):
    blank = np.zeros(shape, np.uint8)
    image = np.linspace(0, 3000, blank.size * bands).reshape(*shape, bands).astype(np.uint16)
    one = example(blank, blank, image=image, iou=float("nan"), name="$a$_" * 40)
    figure = draw_examples([one], BINARY)
    assert max(figure.axes[0].images[0].get_array().shape[:2]) <= LONGEST_SIDE
    check_png(figure)


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        draw_examples([], BINARY)
