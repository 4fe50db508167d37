"""What is fitted on validation data is what a search over everything at once finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation.noisy import collect, iou_at, make_data, make_engine
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from smp_ensemble.data.forms import load_data
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.evaluation import fitting
from smp_ensemble.evaluation.fitting import (
    fit_temperatures,
    sample_pixels,
    tune_postprocessing,
    tune_thresholds,
)
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.inference.engine import Engine
from smp_ensemble.typing import IGNORE_INDEX


@pytest.fixture(scope="module", params=["binary", "multiclass"])
def data(request, tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("fitting") / "set", request.param)


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("fitting") / "set", "binary")


def with_combiner(engine: Engine, combiner: str) -> Engine:
    old = engine.ensemble
    ensemble = Ensemble(
        list(old.members), mode=old.mode, combiner=combiner, weights=old.weights, class_names=old.class_names
    )
    return Engine(ensemble, "cpu", "32")


def test_a_sample_of_all_pixels_is_all_valid_pixels(data):
    engine = make_engine(data, members=3)
    sample = sample_pixels(Predictions(engine, data))
    probabilities, truth = collect(data, engine)
    valid = truth != IGNORE_INDEX
    assert sample.probabilities.shape == (valid.sum(), 3, data.task.num_outputs)
    assert sample.mode == data.task.mode
    for member in range(3):
        for output in range(data.task.num_outputs):
            found = np.sort(sample.probabilities[:, member, output].numpy())
            np.testing.assert_allclose(found, np.sort(probabilities[member][output][valid]), rtol=0, atol=1e-6)
    assert np.array_equal(np.bincount(sample.truth), np.bincount(truth[valid]))


def test_a_sample_is_limited_and_always_the_same(data, monkeypatch):
    monkeypatch.setattr(fitting, "SAMPLE_PIXELS", 500)
    predictions = Predictions(make_engine(data), data)
    first, second = sample_pixels(predictions), sample_pixels(predictions)
    assert 200 < len(first.truth) <= 600
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.equal(first.truth, second.truth)


def test_temperatures_are_those_of_least_log_loss(data):
    engine = make_engine(data)
    probabilities, truth = collect(data, engine)
    valid = truth != IGNORE_INDEX
    label = truth[valid].astype(int)

    def loss(t: float, p: np.ndarray) -> float:
        if data.task.mode == "binary":
            softened = expit(logit(p[0]) / np.exp(t))
            return -np.log(np.where(label == 1, softened, 1 - softened)).mean()
        scores = np.log(p) / np.exp(t)
        scores -= scores.max(axis=0)
        return -(scores[label, np.arange(len(label))] - np.log(np.exp(scores).sum(axis=0))).mean()

    found = fit_temperatures(Predictions(engine, data, batch_size=2))
    assert len(found) == 3
    for temperature, one in zip(found, probabilities, strict=True):
        p = one[:, valid].astype(np.float64)
        best = minimize_scalar(loss, bounds=(np.log(1 / 20), np.log(20)), args=(p,), method="bounded")
        assert temperature == pytest.approx(np.exp(best.x), rel=1e-3)


def test_shares_of_votes_get_no_temperature_but_members_do(binary):
    predictions = Predictions(with_combiner(make_engine(binary), "vote"), binary)
    *members, ensemble = fit_temperatures(predictions)
    assert ensemble == 1.0
    assert members == pytest.approx(fit_temperatures(Predictions(make_engine(binary), binary))[:2])


def test_thresholds_are_the_best_of_all(binary):
    engine = make_engine(binary)
    probabilities, truth = collect(binary, engine)
    temperatures = [1.0, 2.0, 0.5]
    found = tune_thresholds(Predictions(engine, binary), temperatures)
    for threshold, temperature, one in zip(found, temperatures, probabilities, strict=True):
        calibrated = expit(logit(one.astype(np.float64)) / temperature)
        every = {step / 256: iou_at(calibrated, truth, step / 256) for step in range(1, 256)}
        assert every[threshold] == pytest.approx(max(every.values()), abs=2e-4)  # float32 against float64


def test_voters_get_the_threshold_with_which_their_vote_is_best(binary, monkeypatch):
    monkeypatch.setattr(fitting, "VOTES_AT_ONCE", 5)
    engine = with_combiner(make_engine(binary, members=3), "vote")
    probabilities, truth = collect(binary, make_engine(binary, members=3))
    weights, valid = np.array(engine.ensemble.weights), truth != IGNORE_INDEX
    scores = {}
    for step in range(1, 32):
        threshold = step / 32
        share = sum(w * (p[0] >= np.float32(threshold)) for w, p in zip(weights, probabilities[:3], strict=True))
        mean = sum(w * p[0] for w, p in zip(weights, probabilities[:3], strict=True)) / weights.sum()
        tie = np.isclose(share / weights.sum(), 0.5)
        decided = np.where(tie, mean >= threshold, share / weights.sum() > 0.5)
        true = truth == 1
        scores[threshold] = (decided & true).sum() / ((decided | true) & valid).sum()
    found = tune_thresholds(Predictions(engine, binary), [1.0] * 4)[-1]
    assert scores[found] == pytest.approx(max(scores.values()), abs=1e-9)


def test_no_foreground_leaves_the_threshold(binary, tmp_path, caplog):
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for index in range(3):
        Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(tmp_path / "set" / "images" / f"{index}.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "set" / "masks" / f"{index}.png")
    classes = {"names": ["ground", "roof"], "task": "binary"}
    (tmp_path / "set" / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "set" / "splits.csv").write_text(
        "image,mask,split\n"
        + "".join(
            f"images/{index}.png,masks/{index}.png,{split}\n" for index, split in enumerate(("train", "val", "test"))
        )
    )
    data = load_data(str(tmp_path / "set")).val
    assert tune_thresholds(Predictions(make_engine(data), data), [1.0] * 3) == [0.5] * 3
    assert "no foreground to tune a threshold on" in caplog.text


def test_post_processing_is_judged_by_the_score_that_is_measured(binary):
    predictions = Predictions(make_engine(binary), binary)
    nothing = tune_postprocessing(predictions, {"min_area": (100_000,)})  # would remove everything
    assert not nothing.settings.active
    measured = measure_all(predictions, split="val").ensemble.score.metrics["iou"]
    assert nothing.score_before == nothing.score_after == pytest.approx(measured)
    with_hole = PostProcessing(max_hole=3)
    predictions.ensemble.postprocess = with_hole
    try:
        cleaned = measure_all(predictions, split="val").ensemble.score.metrics["iou"]
    finally:
        predictions.ensemble.postprocess = PostProcessing()
    tried = tune_postprocessing(predictions, {"max_hole": (3,)})
    assert tried.settings == (with_hole if cleaned > measured + 1e-4 else PostProcessing())
    assert tried.score_after == pytest.approx(max(cleaned, measured), abs=1e-4)
