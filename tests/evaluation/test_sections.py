"""The tables of the page hold the numbers of the measurement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.fakes import fake_measurement, without_class
from evaluation.test_markup import Reader

from smp_ensemble.evaluation import sections
from smp_ensemble.evaluation.findings import find, image_ious
from smp_ensemble.evaluation.measurement import Measurement, ModelMeasurement, Score


class Tables(Reader):
    """Tables as lists of rows of texts, and which cells are marked as best."""

    def __init__(self, page: str) -> None:
        self.tables, self.best, self.inside = [], [], False
        super().__init__(page)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.inside = True
            self.tables[-1][-1].append("")
            if dict(attrs).get("class") == "best":
                self.best.append((len(self.tables[-1]) - 1, len(self.tables[-1][-1]) - 1))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in {"td", "th"}

    def handle_data(self, data):
        super().handle_data(data)
        if self.inside:
            self.tables[-1][-1][-1] += data


def with_metric(model: ModelMeasurement, name: str, value: float) -> ModelMeasurement:
    return replace(model, score=Score(model.score.threshold, {**model.score.metrics, name: value}))


def read(measurement: Measurement, name: str, *arguments) -> Tables:
    return Tables(getattr(sections, name)(measurement, *arguments, {}))


def test_all_models_and_metrics_are_in_the_table_with_the_best_marked():
    measurement = fake_measurement()
    found = read(measurement, "models", find(measurement))
    table = found.tables[0]
    shown = [name for name in sections.COLUMNS if name != "coverage"]
    assert [heading.split("\u00a0")[0] for heading in table[0][1:]] == [sections.COLUMNS[name][0] for name in shown]
    for row, model in zip(table[1:], measurement.models, strict=True):
        assert row[0].endswith(model.name)
        assert [float(cell) for cell in row[1:]] == pytest.approx([model.score.metrics[m] for m in shown], abs=5e-5)
    expected = set()
    for column, name in enumerate(shown, 1):
        values = [model.score.metrics[name] for model in measurement.models]
        pick = np.argmax if sections.COLUMNS[name][1] > 0 else np.argmin
        expected.add((int(pick(values)) + 1, column))
    assert set(found.best) == expected


def test_nan_is_a_dash_and_never_the_best():
    measurement = fake_measurement()
    members = [with_metric(member, "iou", float("nan")) for member in measurement.members]
    found = read(replace(measurement, members=members), "models", find(measurement))
    assert [row[1] for row in found.tables[0][1:6]] == ["–"] * 5
    assert (6, 1) in found.best


def test_coverage_is_shown_where_pixels_are_rejected_and_has_no_best():
    measurement = fake_measurement()
    found = read(
        replace(measurement, ensemble=with_metric(measurement.ensemble, "coverage", 0.9)), "models", find(measurement)
    )
    assert [row[-1] for row in found.tables[0]] == ["Coverage", *["–"] * 5, "0.9000"]
    assert max(column for _, column in found.best) < len(found.tables[0][0]) - 1


def test_coverage_is_left_out_where_no_pixel_is_rejected():
    measurement = fake_measurement()
    measurement = replace(measurement, ensemble=with_metric(measurement.ensemble, "coverage", 1.0))
    assert "Coverage" not in read(measurement, "models", find(measurement)).tables[0][0]


def test_classes_have_their_boundary_iou_where_it_was_measured():
    measurement = fake_measurement()
    measurement = replace(measurement, ensemble=with_metric(measurement.ensemble, "boundary_iou/road", 0.3125))
    (table,) = read(measurement, "classes", find(measurement)).tables
    column = table[0].index("Boundary IoU\u00a0↑")
    overall = f"{measurement.ensemble.score.metrics['boundary_iou']:.4f}"
    assert [row[column] for row in table[1:]] == ["–", "–", "0.3125", "–", "–", overall]
    assert len({len(row) for row in table}) == 1


def test_differences_have_intervals_and_p_values():
    measurement = fake_measurement()
    findings = find(measurement)
    rows = read(measurement, "models", findings).tables[1][1:]
    for row, difference in zip(rows, findings.differences, strict=True):
        assert float(row[1].replace("−", "-")) == pytest.approx(difference.estimate, abs=5e-5)
        low, high = (float(end.replace("−", "-")) for end in row[2].split(" to "))
        assert (low, high) == pytest.approx((difference.low, difference.high), abs=5e-4)
        assert float(row[3]) == pytest.approx(difference.p_value, abs=5e-4)


def test_a_model_alone_has_no_differences_and_no_best():
    found = read(fake_measurement(members=1), "models", find(fake_measurement(members=1)))
    assert len(found.tables) == 1
    assert found.best == []


def test_classes_have_pixels_intervals_and_what_members_reach():
    measurement = without_class(fake_measurement(), 4)
    findings = find(measurement)
    (table,) = read(measurement, "classes", findings).tables
    truth = measurement.ensemble.counts[:, :, [0, 2]].sum((0, 2))
    assert [row[0] for row in table[1:]] == [*measurement.task.class_names, "mean over classes"]
    for index, row in enumerate(table[1:5]):
        assert int(row[2].replace("\u202f", "")) == truth[index]
        assert float(row[3]) == pytest.approx(findings.classes[-1][index].estimate, abs=5e-5)
        members = [each[index].estimate for each in findings.classes[:-1]]
        assert [float(end) for end in row[6].split(" to ")] == pytest.approx([min(members), max(members)], abs=5e-4)
        assert float(row[7]) == pytest.approx(members[findings.best], abs=5e-5)
    assert table[5][1:] == ["0", "0", "–", "–", "–", "–", "–"]
    assert float(table[6][3]) == pytest.approx(measurement.ensemble.score.metrics["iou"], abs=5e-5)


def test_binary_classes_are_one_row():
    measurement = fake_measurement(classes=1)
    (table,) = read(measurement, "classes", find(measurement)).tables
    assert [row[0] for row in table] == ["Class", "building"]


def test_the_most_uncertain_images_have_their_scores():
    measurement = fake_measurement()
    (table,) = read(measurement, "uncertainty").tables
    names = list(measurement.images)
    ious = image_ious(measurement.ensemble.counts)
    for row in table[1:]:
        index = names.index(row[0])
        assert [float(cell) for cell in row[1:4]] == pytest.approx(measurement.uncertainty[index], abs=5e-5)
        assert float(row[4]) == pytest.approx(ious[index], abs=5e-4)


def test_a_model_alone_has_entropy_only():
    (table,) = read(fake_measurement(members=1), "uncertainty").tables
    assert table[0] == ["Image", "Entropy (nats)", "IoU"]


def test_ambiguity_is_explained_with_its_numbers():
    measurement = fake_measurement()
    text = "".join(read(measurement, "diversity").text)
    found = measurement.diversity
    for value in (found.ensemble_error, found.member_error, found.ambiguity):
        assert f"{value:.4f}" in text
    assert sections.diversity(fake_measurement(members=1), {}) is None
    assert sections.examples({}) is None
