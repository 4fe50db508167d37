"""Matrices of pairs: their numbers, and any number of members."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import fake_measurement
from evaluation.test_figures import check_png

from smp_ensemble.evaluation.heat_maps import draw_diversity


@pytest.mark.parametrize("members", [2, 10, 20])
def test_any_number_of_members_is_drawn(members):
    figure = draw_diversity(fake_measurement(members=members, classes=3))
    check_png(figure)
    numbers = [len(axes.texts) for axes in figure.axes[:3]]
    cells = members * (members - 1)
    headings = 1  # the unit, above
    assert numbers == (
        [headings] * 3 if members > 10 else [cells + headings, cells + headings, cells + members + headings]
    )


def test_cells_hold_the_numbers_of_the_matrices():
    measurement = fake_measurement()
    found = measurement.diversity
    disagreement, correlation, fault = draw_diversity(measurement).axes[:3]
    apart = ~np.eye(5, dtype=bool)
    assert np.asarray(disagreement.images[0].get_array())[apart] == pytest.approx(found.disagreement[apart])
    assert np.asarray(correlation.images[0].get_array())[apart] == pytest.approx(found.error_correlation[apart])
    assert np.asarray(fault.images[0].get_array()) == pytest.approx(found.double_fault)
    shown = {text.get_text() for text in fault.texts}
    assert {f"{100 * error:.1f}" for error in found.errors} <= shown


def test_members_that_never_err_have_no_correlation():
    measurement = fake_measurement()
    nothing = np.zeros((5, 5))
    diversity = replace(
        measurement.diversity, disagreement=nothing, double_fault=nothing, error_correlation=np.full((5, 5), np.nan)
    )
    figure = draw_diversity(replace(measurement, diversity=diversity))
    check_png(figure)
    assert "–" in {text.get_text() for text in figure.axes[1].texts}
    assert "correlate" not in figure.get_suptitle()


def test_an_ensemble_of_one_has_none():
    with pytest.raises(ValueError, match="several members"):
        draw_diversity(fake_measurement(members=1))
