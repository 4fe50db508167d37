"""Sentences say what the numbers say, and the JSON holds them all."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import fake_measurement, without_class

from smp_ensemble.evaluation.findings import find
from smp_ensemble.evaluation.summary import calibration_sentence, headline, most_uncertain, p_text, summary_json
from smp_ensemble.metrics.bootstrap import Difference


def said(low: float, estimate: float, high: float, p_value: float = 0.01) -> str:
    """The headline where the best member differs by so much."""
    measurement = fake_measurement()
    findings = find(measurement, resamples=50)
    found = Difference(estimate, low, high, p_value)
    return " ".join(headline(measurement, replace(findings, differences=[found] * 5)))


def test_the_headline_has_the_score_and_its_interval():
    measurement = fake_measurement()
    findings = find(measurement)
    first = headline(measurement, findings)[0]
    mean = findings.means[-1]
    assert f"IoU {mean.estimate:.3f} (95 % interval {mean.low:.3f} to {mean.high:.3f})" in first


def test_a_win_a_loss_and_a_draw_are_called_so():
    assert "better than its best member" in said(0.01, 0.02, 0.03)
    assert "worse than its best member" in said(-0.03, -0.02, -0.01)
    assert "by 0.020 (paired difference −0.020 [−0.030, −0.010], p = 0.010)" in said(-0.03, -0.02, -0.01)
    assert "cannot be told from its best member" in said(-0.01, 0.01, 0.03, 0.3)
    assert "ahead of it by 0.010" in said(-0.01, 0.01, 0.03, 0.3)
    assert "behind it by 0.010" in said(-0.03, -0.01, 0.01, 0.3)


def test_how_the_best_member_was_chosen_is_said():
    measurement = fake_measurement()
    sentences = " ".join(headline(measurement, find(measurement, resamples=50)))
    ious = [member.score.metrics["iou"] for member in measurement.members]
    assert measurement.members[int(np.argmax(ious))].name in sentences
    assert "chosen as best on this very data" in sentences


def test_one_image_gives_no_interval_and_no_verdict():
    measurement = fake_measurement(images=1)
    sentences = " ".join(headline(measurement, find(measurement)))
    assert "no interval" in sentences
    assert "nan" not in sentences
    assert "better" not in sentences


def test_an_ensemble_of_one_is_compared_with_nobody():
    measurement = fake_measurement(members=1)
    (sentence,) = headline(measurement, find(measurement))
    assert sentence.startswith("The model reaches")


def test_no_class_at_all_is_said():
    measurement = without_class(fake_measurement(classes=1), 0)
    assert "not defined" in headline(measurement, find(measurement))[0]


def test_calibration_in_words():
    measurement = fake_measurement()
    assert f"{measurement.ensemble.score.metrics['ece']:.4f}" in calibration_sentence(measurement)
    without = calibration_sentence(replace(measurement, uncalibrated=None))
    assert "no temperature" in without
    found = measurement.ensemble.reliability
    timid = replace(measurement.ensemble, reliability=found._replace(confidence=found.accuracy - 0.1))
    assert "under-confident" in calibration_sentence(replace(measurement, ensemble=timid))


def test_the_most_uncertain_images_come_first():
    measurement = fake_measurement(images=12)
    order = most_uncertain(measurement)
    entropy = measurement.uncertainty[:, 0]
    assert len(order) == 10
    assert list(entropy[order]) == sorted(entropy, reverse=True)[:10]
    unknown = measurement.uncertainty.copy()
    unknown[order[0]] = np.nan
    assert most_uncertain(replace(measurement, uncertainty=unknown))[0] == order[1]


@pytest.mark.parametrize(("p_value", "text"), [(0.5, "p = 0.500"), (0.0009, "p < 0.001"), (float("nan"), "no p-value")])
def test_p_values(p_value, text):
    assert p_text(p_value) == text


@pytest.mark.parametrize("options", [{}, {"members": 1, "classes": 1, "images": 1}])
def test_the_json_holds_the_numbers_and_is_json(options):
    measurement = fake_measurement(**options)
    values = json.loads(json.dumps(summary_json(measurement), allow_nan=False))
    assert values["ensemble"]["metrics"] == dict(measurement.ensemble.score.metrics)
    assert [one["name"] for one in values["members"]] == [member.name for member in measurement.members]
    assert values["data"]["digest"] == measurement.data.digest
    if measurement.diversity is not None:
        assert np.allclose(values["diversity"]["disagreement"], measurement.diversity.disagreement)
        assert [one["member"] for one in values["differences"]] == [member.name for member in measurement.members]
    else:
        assert (values["diversity"], values["differences"], values["best_member"]) == (None, [], None)
        assert values["ensemble"]["iou"]["low"] is None  # one image


def test_scores_that_are_not_there_are_null():
    values = summary_json(without_class(fake_measurement(), 2))
    assert values["ensemble"]["classes"]["road"] == {"estimate": None, "low": None, "high": None}
    assert "iou/road" not in values["ensemble"]["metrics"]
