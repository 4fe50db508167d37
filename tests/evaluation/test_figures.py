"""Figures show the numbers of the measurement, and hold for any number of members, classes and images."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import fake_measurement, without_class
from PIL import Image

from smp_ensemble.evaluation.drawing import ACCENT, png_bytes
from smp_ensemble.evaluation.figures import draw_differences, draw_reliability, draw_risk_coverage, draw_scores
from smp_ensemble.evaluation.findings import find
from smp_ensemble.metrics.selective import RiskCoverage

CASES = {
    "one member, one class, one image": {"members": 1, "classes": 1, "images": 1},
    "one member": {"members": 1},
    "binary": {"classes": 1},
    "five members": {},
    "many of all": {"members": 20, "classes": 20, "images": 3},
}


def points(axes, color: str | None = None) -> set[tuple[float, float]]:
    """All dots on axes, x and y rounded."""
    lines = [line for line in axes.lines if line.get_marker() == "o" and color in (None, line.get_color())]
    return {(round(float(x), 6), round(float(y), 3)) for line in lines for x, y in line.get_xydata()}


def check_png(figure) -> None:
    """It is drawn, and nothing leaves the figure."""
    picture = np.array(Image.open(io.BytesIO(png_bytes(figure))).convert("L"))
    assert picture.std() > 3
    edge = np.concatenate([picture[:3].ravel(), picture[-3:].ravel(), picture[:, :3].ravel(), picture[:, -3:].ravel()])
    assert edge.min() > 250, "something is cut off at the edge"


@pytest.fixture(params=CASES, scope="module")
def measurement(request):
    return fake_measurement(**CASES[request.param])


def test_every_case_is_drawn(measurement):
    findings = find(measurement, resamples=50)
    figures = [draw_scores(measurement, findings), draw_reliability(measurement), draw_risk_coverage(measurement)]
    if measurement.members:
        figures.append(draw_differences(measurement, findings))
    for figure in figures:
        check_png(figure)
        assert figure.get_suptitle()


def test_scores_are_at_their_places():
    measurement = fake_measurement()
    findings = find(measurement)
    models, classes = draw_scores(measurement, findings).axes
    expected = [findings.means[-1], *findings.means[:-1]]
    assert points(models) == {(round(mean.estimate, 6), float(row)) for row, mean in enumerate(expected)}
    assert {x for x, _ in points(models, ACCENT)} == {round(findings.means[-1].estimate, 6)}
    assert {x for x, _ in points(classes, ACCENT)} == {round(each.estimate, 6) for each in findings.classes[-1]}
    assert len(points(classes)) == 6 * 5
    ends = {tuple(np.round(line.get_xdata(), 6)) for line in models.lines if len(line.get_xdata()) == 2}
    assert ends == {(round(mean.low, 6), round(mean.high, 6)) for mean in findings.means}


def test_a_class_that_does_not_occur_is_said_to_be_absent():
    measurement = without_class(fake_measurement(), 1)
    figure = draw_scores(measurement, find(measurement))
    check_png(figure)
    assert "not in this data" in {text.get_text() for text in figure.axes[-1].texts}
    assert len(points(figure.axes[-1])) == 6 * 4


def test_no_score_at_all_is_drawn():
    measurement = without_class(fake_measurement(classes=1), 0)
    findings = find(measurement)
    for figure in (draw_scores(measurement, findings), draw_differences(measurement, findings)):
        check_png(figure)


def test_names_of_any_length_stay_inside():
    names = ("a very long name of a class that nobody wanted to shorten " * 3, "$x$ & _y_", "<b>", "_", "W" * 60)
    measurement = fake_measurement(names=names)
    members = [replace(member, name=name) for name, member in zip(names, measurement.members, strict=True)]
    measurement = replace(measurement, members=members)
    findings = find(measurement, resamples=50)
    check_png(draw_scores(measurement, findings))
    check_png(draw_differences(measurement, findings))
    check_png(draw_risk_coverage(measurement))


def test_differences_are_at_their_places_and_in_their_colours():
    measurement = fake_measurement()
    findings = find(measurement)
    axes = draw_differences(measurement, findings).axes[0]
    assert points(axes) == {(round(found.estimate, 6), float(row)) for row, found in enumerate(findings.differences)}
    better = {(round(f.estimate, 6), float(row)) for row, f in enumerate(findings.differences) if f.low > 0}
    assert points(axes, ACCENT) == better
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert [row for row, label in enumerate(labels) if "★" in label] == [findings.best]


def test_the_reliability_diagram_has_both_curves_with_their_errors():
    measurement = fake_measurement()
    figure = draw_reliability(measurement)
    labels = " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())
    assert f"{measurement.ensemble.score.metrics['ece']:.4f}" in labels
    assert "before temperature" in labels
    found = measurement.ensemble.reliability
    there = found.pixels > 0
    drawn = [np.asarray(group.get_offsets()) for group in figure.axes[0].collections]
    assert any(
        np.allclose(xy, np.stack([found.confidence, found.accuracy], 1)[there]) for xy in drawn if len(xy) == sum(there)
    )
    without = draw_reliability(replace(measurement, uncalibrated=None))
    assert "before" not in " ".join(text.get_text() for text in without.axes[0].get_legend().get_texts())


def test_curves_of_risk_are_those_of_the_measurement():
    measurement = fake_measurement()
    axes = draw_risk_coverage(measurement).axes[0]
    for model in measurement.models:
        curve = np.stack([model.risk_coverage.coverage, model.risk_coverage.risk], 1)
        assert any(np.array_equal(line.get_xydata(), curve) for line in axes.lines)
    labels = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    assert all(f"{model.risk_coverage.aurc:.4f}" in labels for model in measurement.models)


def test_data_without_a_pixel_is_drawn():
    measurement = fake_measurement(members=1)
    empty = RiskCoverage(np.empty(0), np.empty(0), float("nan"), float("nan"))
    nothing = measurement.ensemble.reliability._replace(
        pixels=np.zeros(15, np.int64), confidence=np.full(15, np.nan), accuracy=np.full(15, np.nan)
    )
    ensemble = replace(measurement.ensemble, risk_coverage=empty, reliability=nothing)
    measurement = replace(measurement, ensemble=ensemble, uncalibrated=None)
    for figure in (draw_reliability(measurement), draw_risk_coverage(measurement)):
        check_png(figure)
        assert figure.get_suptitle() == "No pixels"
