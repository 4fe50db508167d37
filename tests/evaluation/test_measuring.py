"""One pass measures what plain counting over all pixels gives, for the ensemble and for each member alone."""

from __future__ import annotations

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.noisy import NAMES, collect, make_data, make_engine
from scipy.special import expit, logit
from sklearn.metrics import jaccard_score, log_loss, roc_auc_score
from torch import nn

from smp_ensemble.data.normalization import Normalization
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.evaluation.measurement import Score
from smp_ensemble.evaluation.measuring import choose_examples, measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.typing import IGNORE_INDEX


@pytest.fixture(scope="module", params=sorted(NAMES))
def data(request, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("measuring") / "set", request.param)


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("measuring") / "set", "binary")


def rebuilt(engine: Engine, **options) -> Engine:
    old = engine.ensemble
    given = {"mode": old.mode, "weights": old.weights, "class_names": old.class_names, **options}
    return Engine(Ensemble(list(old.members), **given), "cpu", "32")


def iou_of(decided: np.ndarray, truth: np.ndarray, mode: str) -> float:
    valid = (truth != IGNORE_INDEX) & (decided != IGNORE_INDEX)
    average = "binary" if mode == "binary" else "macro"
    return jaccard_score(truth[valid], decided[valid], average=average)


def test_members_and_ensemble_score_as_counted_by_hand(data):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    found = measure_all(Predictions(engine, data, batch_size=3), split="test", names=["first", "second"])
    assert [one.name for one in found.models] == ["first", "second", "ensemble"]
    valid = truth != IGNORE_INDEX
    for one, p in zip(found.models, probabilities, strict=True):
        decided = p.argmax(axis=0) if data.task.mode == "multiclass" else (p[0] >= np.float32(0.5)).astype(int)
        metrics = one.score.metrics
        assert metrics["iou"] == pytest.approx(iou_of(decided, truth, data.task.mode))
        labels = np.concatenate([1 - p, p]) if data.task.mode == "binary" else p
        exact = labels[:, valid].T.astype(float)
        expected = log_loss(truth[valid], exact / exact.sum(axis=1, keepdims=True))
        assert metrics["nll"] == pytest.approx(expected, rel=1e-4)
        wrong = (decided != truth)[valid]
        assert metrics["error_auroc"] == pytest.approx(roc_auc_score(wrong, 1 - labels.max(axis=0)[valid]), abs=4e-3)
        assert metrics["coverage"] == 1.0
        counts = one.counts.sum(axis=0)
        union = counts.sum(axis=-1)
        assert np.nanmean(counts[:, 0] / union) == pytest.approx(metrics["iou"])
        assert one.reliability.pixels.sum() == valid.sum()
        assert one.risk_coverage.aurc == pytest.approx(metrics["aurc"])
        assert one.risk_coverage.risk[-1] == pytest.approx(wrong.mean())
    assert found.images == data.names
    assert found.data.digest == data.digest
    assert found.uncalibrated is None


def test_counts_are_those_of_each_image(data):
    engine = make_engine(data)
    found = measure_all(Predictions(engine, data), split="test").ensemble.counts
    for index in range(len(data)):
        image, truth = data.read(index)
        (probabilities,) = engine.predict([image])
        mask = make_mask(engine.ensemble, image, probabilities)
        for output in range(data.task.num_outputs):
            label = 1 if data.task.mode == "binary" else output
            predicted, true, valid = mask == label, truth == label, truth != IGNORE_INDEX
            expected = [(predicted & true).sum(), (predicted & ~true & valid).sum(), (~predicted & true).sum()]
            assert found[index, output].tolist() == expected


def test_rejected_pixels_are_not_scored_and_coverage_says_how_many_are_left(data):
    engine = rebuilt(make_engine(data), reject=0.6)
    probabilities, truth = collect(data, engine)
    found = measure_all(Predictions(engine, data), split="test")
    p = probabilities[-1]
    confidence = np.maximum(p[0], 1 - p[0]) if data.task.mode == "binary" else p.max(axis=0)
    decided = (p[0] >= 0.5).astype(int) if data.task.mode == "binary" else p.argmax(axis=0)
    kept, valid = confidence > 0.6, truth != IGNORE_INDEX
    metrics = found.ensemble.score.metrics
    assert 0 < metrics["coverage"] < 1
    assert metrics["coverage"] == pytest.approx((kept & valid).sum() / valid.sum())
    assert metrics["iou"] == pytest.approx(iou_of(np.where(kept, decided, IGNORE_INDEX), truth, data.task.mode))
    whole = measure_all(Predictions(make_engine(data), data), split="test")
    for name in ("ece", "nll", "aurc", "error_auroc"):  # of all valid pixels, rejected or not
        assert metrics[name] == pytest.approx(whole.ensemble.score.metrics[name])
    assert [one.score for one in found.members] == [one.score for one in whole.members]


def test_the_temperature_is_the_ensembles_and_the_page_can_show_both(binary):
    plain, warm = make_engine(binary), rebuilt(make_engine(binary), temperature=2.0)
    before = measure_all(Predictions(plain, binary), split="test")
    after = measure_all(Predictions(warm, binary), split="test")
    assert after.uncalibrated is not None
    for name in ("pixels", "confidence", "accuracy"):
        expected, found = getattr(before.ensemble.reliability, name), getattr(after.uncalibrated, name)
        np.testing.assert_allclose(found, expected)
    probabilities, truth = collect(binary, plain)
    valid = truth != IGNORE_INDEX
    softened = expit(logit(probabilities[-1][0][valid].astype(float)) / 2)
    assert after.ensemble.score.metrics["nll"] == pytest.approx(log_loss(truth[valid], softened), rel=1e-4)


def test_members_are_measured_with_what_they_would_use_alone(binary):
    engine = make_engine(binary)
    members = []
    for network in engine.ensemble.members:
        member = Member(network, Normalization("none", [0.0] * 3, [1.0] * 3, 1.0))
        member.threshold, member.temperature = 0.3, 1.7
        members.append(member)
    ensemble = Ensemble(members, mode="binary", class_names=binary.task.class_names, threshold=0.6)
    found = measure_all(Predictions(Engine(ensemble, "cpu", "32"), binary), split="test")
    probabilities, truth = collect(binary, engine)
    for one, p in zip(found.members, probabilities, strict=False):
        softened = expit(logit(p[0].astype(float)) / 1.7)
        assert one.score.threshold == 0.3
        assert one.score.metrics["iou"] == pytest.approx(
            iou_of((softened >= 0.3).astype(int), truth, "binary"), abs=2e-3
        )
    assert found.ensemble.score.threshold == 0.6


def test_post_processing_changes_masks_and_not_probabilities(binary):
    plain, cleaning = make_engine(binary), rebuilt(make_engine(binary), postprocess=PostProcessing(min_area=4))
    before = measure_all(Predictions(plain, binary), split="test").ensemble
    after = measure_all(Predictions(cleaning, binary), split="test").ensemble
    assert after.score.metrics["iou"] != before.score.metrics["iou"]
    assert after.score.metrics["nll"] == before.score.metrics["nll"]
    assert after.counts[..., :2].sum() < before.counts[..., :2].sum()  # small components are gone


def test_an_ensemble_of_one_is_its_own_member(data):
    found = measure_all(Predictions(make_engine(data, members=1), data), split="test", names=["alone"])
    assert found.members == []
    assert found.diversity is None
    assert found.ensemble.name == "alone"
    assert found.scores == [found.ensemble.score] * 2
    assert found.best_member == 0
    assert np.allclose(found.uncertainty[:, 1:], 0, atol=1e-6)  # members that are one agree


def test_the_best_member_has_a_score(binary):
    found = measure_all(Predictions(make_engine(binary, members=3), binary), split="test")
    ious = [float("nan"), 0.4, 0.4]
    members = [
        replace(one, score=Score(0.5, {**one.score.metrics, "iou": iou}))
        for one, iou in zip(found.members, ious, strict=True)
    ]
    assert replace(found, members=members).best_member == 1
    assert replace(found, members=members[:1] * 2).best_member == 0


def test_uncertainty_is_the_mean_over_the_valid_pixels_of_each_image(binary):
    engine = make_engine(binary, members=3)
    found = measure_all(Predictions(engine, binary), split="test").uncertainty
    for index in range(len(binary)):
        image, truth = binary.read(index)
        (maps,) = engine.uncertainty([image])
        np.testing.assert_allclose(found[index], maps[:, truth != IGNORE_INDEX].mean(axis=1), rtol=0, atol=1e-5)


def test_examples_are_the_best_and_the_worst_images(binary):
    engine = make_engine(binary)
    found = measure_all(Predictions(engine, binary), split="test")
    examples = choose_examples(found, binary, engine)
    assert len(examples) == len(binary)  # there are fewer than six
    counts = found.ensemble.counts[:, 0]
    ious = [row[0] / sum(row) for row in counts.tolist()]
    assert [one.iou for one in examples] == pytest.approx(sorted(ious, reverse=True))
    for one in examples:
        index = binary.names.index(one.name)
        image, truth = binary.read(index)
        assert np.array_equal(one.image, image)
        assert np.array_equal(one.truth, truth)
        assert one.entropy.shape == truth.shape == one.mask.shape


def test_memory_holds_one_members_probabilities_at_a_time(binary):
    seen, alive = [], []

    class Watching(nn.Conv2d):
        def forward(self, images):
            alive.append(sum(one() is not None for one in seen))
            return super().forward(images)

    engine = Engine(Ensemble([Watching(3, 1, 1) for _ in range(4)], mode="binary"), "cpu", "32")
    original = engine.ensemble.probabilities_of

    def watched(member, images):
        found = original(member, images)
        seen.append(weakref.ref(found))
        return found

    engine.ensemble.probabilities_of = watched
    with torch.no_grad():
        measure_all(Predictions(engine, binary, batch_size=1), split="test")
    assert len(alive) == 4 * len(binary)
    assert max(alive) == 0
