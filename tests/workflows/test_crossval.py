"""Cross-validated scores: a mean and a deviation over trainings, and one score of all left-out pixels."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.scoring import Meter
from smp_ensemble.typing import Snapshot, Task
from smp_ensemble.workflows import crossval
from smp_ensemble.workflows.crossval import LeftOutScores, score_left_out, summarize

TASK = Task("multiclass", ("land", "roof", "road"))


def left_out(seed: int, *, classes: int = 3, height: int = 6):
    """Random probabilities and truth of one training's left-out images, with their scores."""
    rng = np.random.default_rng(seed)
    probabilities = torch.from_numpy(rng.dirichlet([1] * 3, size=(2, height, 5)).transpose(0, 3, 1, 2).copy()).float()
    probabilities[:, classes:] = 0
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    target = torch.from_numpy(rng.integers(0, classes, (2, height, 5)))
    meter = Meter(TASK, 0.5)
    meter.update(probabilities, target)
    scores = {f"cv_{name}": value for name, value in meter.score().metrics.items()}
    return probabilities, target, LeftOutScores([scores], scores, meter)


def test_a_summary_is_mean_deviation_and_the_score_of_all_pixels():
    parts = [left_out(seed, height=4 + 3 * seed) for seed in range(3)]
    summary = summarize([one for _, _, one in parts])
    decided = np.concatenate([probabilities.argmax(1).numpy().ravel() for probabilities, _, _ in parts])
    true = np.concatenate([target.numpy().ravel() for _, target, _ in parts])
    pooled = [((decided == k) & (true == k)).sum() / ((decided == k) | (true == k)).sum() for k in range(3)]
    assert summary["cv_iou"] == pytest.approx(np.mean(pooled))
    assert summary["cv_iou/roof"] == pytest.approx(pooled[1])
    for name in ("cv_iou", "cv_dice", "cv_ece", "cv_brier", "cv_iou/road"):
        values = [one.combined[name] for _, _, one in parts]
        assert summary[f"{name}_mean"] == pytest.approx(np.mean(values))
        assert summary[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))


def test_a_class_that_a_fold_does_not_hold_is_left_out_of_its_mean():
    found = [left_out(0)[2], left_out(1, classes=2)[2]]
    assert "cv_iou/road" not in found[1].combined
    summary = summarize(found)
    assert summary["cv_iou/road_mean"] == found[0].combined["cv_iou/road"]
    assert "cv_iou/road_std" not in summary


def test_nothing_left_out_is_no_summary():
    assert summarize([]) == {}


@pytest.mark.parametrize("trained_on", ["train", "test"])
def test_a_training_that_has_seen_its_left_out_images_gets_no_scores(
    make_tiny_network, tiny_splits, monkeypatch, caplog, trained_on
):
    digests = tiny_splits.split(trained_on).image_digests
    member = Member(make_tiny_network(), imagenet(), source="models:/m-1", training_images=digests)
    monkeypatch.setattr(crossval, "load_snapshot", lambda uri, task: member)
    with caplog.at_level(logging.WARNING, logger="smp_ensemble"):
        found = score_left_out([Snapshot("models:/m-1", "r", 1)], tiny_splits.test, precision="32", accelerator="cpu")
    if trained_on == "test":
        assert found is None
        assert "no cross-validated scores: models:/m-1 was trained on 4 of the 4 left-out images" in caplog.text
    else:
        assert found is not None
        assert found.snapshots == [found.combined]
        assert "cv_iou_at_half" not in found.combined
        assert set(found.combined) >= {"cv_iou", "cv_dice", "cv_ece", "cv_nll", "cv_brier", "cv_iou/building"}
