"""Accuracy kept against cost: shares by hand, and none where there is nothing to share."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.fakes import measure, simulate
from evaluation.noisy import make_data, make_engine

from smp_ensemble.workflows import comparing
from smp_ensemble.workflows.comparing import compare, forward_passes, table, time_ratio


def scores(members=5, images=12):
    """A teacher whose members err much alone, so that their mean gains; the student is its first member."""
    simulated = simulate(members=members, classes=5, images=images, alone=1.5, temperature=1)
    one = simulated.members[0]
    return measure(simulated), measure(replace(simulated, members=one[None], raw=one, ensemble=one))


def iou(counts):
    """The mean over classes, all of which occur."""
    tp, fp, fn = counts.sum(axis=0).T
    return (tp / (tp + fp + fn)).mean()


def test_shares_are_those_of_the_counts():
    teacher, student = scores()
    best = teacher.best_member
    found = compare("test", teacher, best, student)
    whole, single, own = (iou(one.counts) for one in (teacher.ensemble, teacher.members[best], student.ensemble))
    assert whole > single
    assert found.accuracy_kept == pytest.approx(own / whole)
    assert found.gain.low > 0
    assert found.gain_kept == pytest.approx((own - single) / (whole - single))
    metrics = found.metrics()
    assert metrics["teacher_test_iou"] == pytest.approx(whole)
    assert metrics["best_member_test_iou"] == pytest.approx(single)
    assert metrics["student_test_iou"] == pytest.approx(own)
    assert metrics["gain_kept_test"] == found.gain_kept
    assert {"student_test_ece", "student_test_nll"} <= metrics.keys()
    assert f"keeps {100 * own / whole:.1f} % of the teacher's IoU" in found.sentence()
    assert found.values()["gain"]["estimate"] == pytest.approx(whole - single)


def test_a_gain_that_may_be_none_is_not_shared():
    teacher, student = scores()
    best = teacher.best_member
    same = replace(teacher, ensemble=teacher.members[best])
    found = compare("val", same, best, student)
    assert found.gain.estimate == 0
    assert found.gain_kept is None
    assert "gain_kept_val" not in found.metrics()
    assert "may be none: no share of it is told" in found.sentence()


def test_a_teacher_of_one_is_its_own_best_member():
    teacher, student = scores(members=1)
    found = compare("val", teacher, 0, student)
    assert found.best_member is teacher.ensemble
    assert found.accuracy_kept == 1
    assert found.gain_kept is None


def test_scores_that_are_no_numbers_are_not_logged():
    teacher, student = scores(images=3)
    empty = replace(
        student.ensemble, score=replace(student.ensemble.score, metrics={"iou": np.nan, "ece": 0.1, "nll": 1})
    )
    found = compare("val", teacher, 0, replace(student, ensemble=empty)).metrics()
    assert "student_val_iou" not in found
    assert "accuracy_kept_val" not in found
    assert found["student_val_ece"] == 0.1


def test_passes_are_members_times_views(tmp_path):
    engine = make_engine(make_data(tmp_path / "set", "binary"), members=3)
    assert forward_passes(engine) == 3
    assert forward_passes(engine.with_options(views="d4+scales:0.5,1")) == 3 * 8 * 2


def test_the_ratio_is_that_of_the_medians(tmp_path, monkeypatch):
    """Clocks that each engine moves by its own cost, with one outlier each."""
    data = make_data(tmp_path / "set", "binary")
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Clocked:
        def __init__(self, costs):
            self.costs = iter(costs)

        def __call__(self, batch):
            assert batch.shape == (1, 3, 32, 20)  # images of the first one's size
            now[0] += next(self.costs)
            return torch.zeros(1)

    slow, fast = Clocked([900, 12, 12, 90, 12, 11]), Clocked([70, 3, 3, 3, 44, 2])
    assert comparing.REPETITIONS == 5
    assert time_ratio(slow, fast, data, batch_size=4) == pytest.approx(4)


def test_the_table_has_a_line_for_each_model():
    teacher, student = scores(images=4)
    found = [compare(split, teacher, 0, student) for split in ("val", "test")]
    rows = table(found, {"teacher": 40, "best member": 8, "student": 1})
    assert [(row["model"], row["passes"]) for row in rows] == [("teacher", 40), ("best member", 8), ("student", 1)]
    assert rows[2]["test IoU"] == student.ensemble.score.metrics["iou"]
    assert list(rows[0])[2:] == ["val IoU", "val ECE", "val NLL", "test IoU", "test ECE", "test NLL"]
