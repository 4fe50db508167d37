"""Scores of members and ensemble: as torchmetrics and plain counting give them, on the pixels that count."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from evaluation.noisy import NAMES, collect, iou_at, make_data, make_engine
from torch import nn
from torchmetrics.functional.classification import binary_jaccard_index, multiclass_f1_score, multiclass_jaccard_index

from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.evaluation.scoring import measure, pooled, score
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset


@pytest.fixture(scope="module", params=sorted(NAMES))
def data(request, tmp_path_factory) -> SegmentationDataset:
    return make_data(tmp_path_factory.mktemp("scoring") / "set", request.param)


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> SegmentationDataset:
    return make_data(tmp_path_factory.mktemp("scoring") / "set", "binary")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_torchmetrics(data, batch_size):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    threshold = 0.4
    scores = score(engine, data, batch_size=batch_size, threshold=threshold)
    assert len(scores) == 3
    for found, one in zip(scores, probabilities, strict=True):
        assert found.threshold == threshold
        target = torch.from_numpy(truth.astype(np.int64))
        if data.task.mode == "binary":
            decision = torch.from_numpy(one[0] >= np.float32(threshold)).long()
            iou = binary_jaccard_index(decision, target, ignore_index=IGNORE_INDEX)
            assert found.metrics["iou"] == pytest.approx(iou.item())
            assert found.metrics["iou/roof"] == found.metrics["iou"]
            assert found.metrics["iou_at_half"] == pytest.approx(iou_at(one, truth, 0.5))
            continue
        decision = torch.from_numpy(one.argmax(axis=0))
        options = {"num_classes": 3, "average": None, "ignore_index": IGNORE_INDEX}
        iou = multiclass_jaccard_index(decision, target, **options)
        dice = multiclass_f1_score(decision, target, **options)
        for index, name in enumerate(data.task.class_names):
            assert found.metrics[f"iou/{name}"] == pytest.approx(iou[index].item())
            assert found.metrics[f"dice/{name}"] == pytest.approx(dice[index].item())
        assert found.metrics["iou"] == pytest.approx(iou.mean().item())
        assert found.metrics["dice"] == pytest.approx(dice.mean().item())


def test_log_loss_and_brier_score_are_those_of_the_valid_pixels(data):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    valid = truth != IGNORE_INDEX
    for found, one in zip(score(engine, data), probabilities, strict=True):
        stacked = np.concatenate([1 - one, one]) if data.task.mode == "binary" else one
        chosen = stacked[truth[valid], np.flatnonzero(valid)].astype(np.float64)
        assert found.metrics["nll"] == pytest.approx(-np.log(chosen).mean(), rel=1e-4)
        assert 0 <= found.metrics["ece"] <= 1
        assert set(found.metrics) >= {"iou", "dice", "ece", "nll", "brier"}


def test_cutting_batches_changes_nothing(data, monkeypatch):
    engine = make_engine(data)
    whole = score(engine, data, batch_size=4)
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", 1)
    cut = score(engine, data, batch_size=4)
    for first, second in zip(whole, cut, strict=True):
        assert first.metrics == pytest.approx(second.metrics)


def test_one_member_scores_as_its_ensemble(data):
    member, ensemble = score(make_engine(data, members=1), data)
    assert member.metrics == pytest.approx(ensemble.metrics)


def test_meters_pool_to_the_scores_of_all_pixels_and_stay_as_they_are(data):
    engine = make_engine(data)
    parts = [data.subset([0, 2]), data.subset([1]), data.subset([3])]
    meters = [measure(engine, part, threshold=0.4)[-1] for part in parts]
    alone = [meter.score().metrics for meter in meters]
    whole = score(engine, data, threshold=0.4)[-1]
    for order in (meters, meters[::-1]):
        found = pooled(order)
        assert found.threshold == whole.threshold
        assert found.metrics == pytest.approx(whole.metrics)
    assert [meter.score().metrics for meter in meters] == alone


def test_memory_holds_one_members_probabilities_and_one_sum(binary, monkeypatch):
    seen, alive = [], []

    class WatchedMean(Mean):
        def update(self, probabilities, weight=1.0):
            seen.append(weakref.ref(probabilities))
            super().update(probabilities, weight)

    class Watching(nn.Conv2d):
        def forward(self, images):
            alive.append(sum(one() is not None for one in seen))
            return super().forward(images)

    monkeypatch.setattr("smp_ensemble.ensembling.ensemble.combiner_class", lambda name: WatchedMean)
    engine = Engine(Ensemble([Watching(3, 1, 1) for _ in range(3)], mode="binary"), "cpu", "32")
    score(engine, binary)
    assert len(seen) >= 3
    assert set(alive) == {0}
