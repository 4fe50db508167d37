"""What follows from a measurement: intervals, differences, the best member, IoU of images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import ece_of, fake_measurement, without_class

from smp_ensemble.evaluation.findings import ece, find, image_ious


def test_each_model_has_its_own_score_inside_its_interval():
    measurement = fake_measurement()
    findings = find(measurement)
    assert len(findings.means) == len(findings.classes) == 6
    for model, mean, classes in zip(measurement.models, findings.means, findings.classes, strict=True):
        assert mean.estimate == pytest.approx(model.score.metrics["iou"])
        assert mean.low <= mean.estimate <= mean.high
        scores = [model.score.metrics[f"iou/{name}"] for name in measurement.task.output_names]
        assert [interval.estimate for interval in classes] == pytest.approx(scores)


def test_differences_are_ensemble_minus_member_and_the_best_member_is_the_hardest_to_beat():
    measurement = fake_measurement()
    findings = find(measurement)
    own = measurement.ensemble.score.metrics["iou"]
    ious = [member.score.metrics["iou"] for member in measurement.members]
    assert [found.estimate for found in findings.differences] == pytest.approx([own - iou for iou in ious])
    assert findings.best == int(np.argmax(ious))
    assert findings.wins() == sum(found.low > 0 for found in findings.differences)
    assert findings.losses() == sum(found.high < 0 for found in findings.differences)


def test_groups_are_the_units_where_there_are_groups():
    findings = find(fake_measurement(groups=("a", "a", "b", "b", "c", "c")))
    assert (findings.units, findings.grouped, findings.what) == (3, True, "groups")
    findings = find(fake_measurement())
    assert (findings.units, findings.grouped, findings.what) == (6, False, "images")


@pytest.mark.parametrize("options", [{"images": 1}, {"groups": ("a",) * 6}])
def test_one_unit_gives_no_interval(options):
    findings = find(fake_measurement(**options))
    assert np.isnan([findings.means[-1].low, findings.differences[0].p_value]).all()
    assert (findings.wins(), findings.losses()) == (0, 0)


def test_no_class_at_all_gives_no_best_member():
    measurement = without_class(fake_measurement(classes=1), 0)
    findings = find(measurement)
    assert np.isnan(findings.means[-1].estimate)
    assert findings.best is None


def test_the_calibration_error_is_that_of_the_bins():
    measurement = fake_measurement()
    assert ece(measurement.ensemble.reliability) == pytest.approx(measurement.ensemble.score.metrics["ece"])
    assert ece(measurement.uncalibrated) == pytest.approx(ece_of(measurement.uncalibrated))
    empty = measurement.uncalibrated._replace(pixels=np.zeros(15, np.int64))
    assert np.isnan(ece(empty))


def test_iou_of_images_is_the_mean_over_the_classes_that_are_there():
    counts = fake_measurement().ensemble.counts
    by_hand = [np.mean([tp / (tp + fp + fn) for tp, fp, fn in image if tp + fp + fn > 0]) for image in counts.tolist()]
    assert image_ious(counts) == pytest.approx(by_hand)


def test_a_measurement_is_left_as_it_was():
    measurement = fake_measurement()
    before = replace(measurement, ensemble=replace(measurement.ensemble, counts=measurement.ensemble.counts.copy()))
    find(measurement)
    assert (measurement.ensemble.counts == before.ensemble.counts).all()
