"""Calibration: against torchmetrics, scikit-learn and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.calibration import EPS, CalibrationScores
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode, Task


def task(mode: Mode) -> Task:
    return Task(mode, ("background", "roof") if mode == "binary" else ("water", "grass", "road", "tree"))


def random_batch(mode: Mode, seed: int, size: tuple[int, int, int] = (2, 16, 16)):
    generator = torch.Generator().manual_seed(seed)
    n, h, w = size
    logits = 2 * torch.randn(n, 1 if mode == "binary" else 4, h, w, generator=generator)
    probabilities = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
    shape = logits.shape if mode == "multilabel" else (n, h, w)
    target = torch.randint(0, 4 if mode == "multiclass" else 2, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.25] = IGNORE_INDEX
    return probabilities, target


def scores_of(mode: Mode, *batches) -> dict[str, float]:
    metric = CalibrationScores(task(mode))
    for probabilities, target in batches:
        metric.update(probabilities, target)
    return {name: float(value) for name, value in metric.compute().items()}


def valid_rows(mode: Mode, probabilities: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities `(V, C)` and labels `(V,)` of valid pixels, two classes where decisions are binary."""
    if mode == "binary":
        target = target.unsqueeze(1)
    if mode != "multiclass":
        probabilities = torch.stack([1 - probabilities, probabilities], 1)
    probabilities = probabilities.movedim(1, -1).flatten(0, -2)
    labels = target.flatten()
    return probabilities[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics_and_scikit_learn(mode: Mode, seed: int) -> None:
    batch = random_batch(mode, seed)
    scores = scores_of(mode, batch)
    rows, labels = valid_rows(mode, *batch)
    classes = rows.shape[1]
    ece = multiclass_calibration_error(rows, labels, num_classes=classes, n_bins=15, norm="l1")
    assert scores["ece"] == pytest.approx(float(ece), abs=1e-6)
    exact = rows.double().numpy() / rows.double().numpy().sum(1, keepdims=True)
    assert scores["nll"] == pytest.approx(log_loss(labels, exact, labels=range(classes)), abs=1e-6)
    if mode == "multiclass":
        brier = np.square(exact - np.eye(classes)[labels]).sum(1).mean()
    else:
        brier = brier_score_loss(labels, exact[:, 1])
    assert scores["brier"] == pytest.approx(brier, abs=1e-6)


def by_hand(probabilities: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """Calibration error of one class: its probabilities and truth, both `(V,)`, in bins closed below."""
    places = np.digitize(probabilities, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = [abs(truth[places == b].mean() - probabilities[places == b].mean()) for b in np.unique(places)]
    weights = [(places == b).mean() for b in np.unique(places)]
    return float(np.dot(gaps, weights))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_classwise_is_the_mean_of_each_class_by_hand(mode: Mode, seed: int) -> None:
    probabilities, target = random_batch(mode, seed)
    if mode == "multilabel":
        target[:, 1, :, ::2] = IGNORE_INDEX  # channels weigh the same, whatever their share of valid pixels
        rows = [(probabilities[:, k], target[:, k]) for k in range(4)]
    else:
        rows = [(probabilities[:, k], target) for k in range(probabilities.shape[1])]
    expected = []
    for k, (forecast, labels) in enumerate(rows):
        counts = labels != IGNORE_INDEX
        truth = labels[counts] == (k if mode == "multiclass" else 1)
        expected.append(by_hand(forecast[counts].double().numpy(), truth.numpy()))
    found = scores_of(mode, (probabilities, target))["classwise_ece"]
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_classwise_in_binary_mode_is_that_of_torchmetrics_and_scikit_learn() -> None:
    """Both classes have the same error, so the mean over them is the foreground's."""
    batch = random_batch("binary", 4, size=(4, 32, 32))
    rows, labels = valid_rows("binary", *batch)
    found = scores_of("binary", batch)["classwise_ece"]
    background, foreground = rows.T.contiguous()
    assert found == pytest.approx(float(binary_calibration_error(foreground, labels, n_bins=15)), abs=1e-6)
    assert found == pytest.approx(float(binary_calibration_error(background, 1 - labels, n_bins=15)), abs=1e-6)
    frequency, mean = calibration_curve(labels, foreground.double(), n_bins=15)
    shares = np.histogram(foreground.double(), bins=15, range=(0, 1))[0] / len(labels)
    assert found == pytest.approx(np.dot(abs(frequency - mean), shares[shares > 0]), abs=1e-6)


def test_classwise_sees_what_the_decisions_hide() -> None:
    """Half of the pixels are roads, forecast with 0.1: no decision is for them, and top labels are calibrated."""
    forecast = torch.tensor([0.5, 0.4, 0.1, 0.0]).view(1, 4, 1, 1).expand(1, 4, 1, 10)
    target = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 2, 2]).view(1, 1, 10)
    scores = scores_of("multiclass", (forecast, target))
    assert scores["ece"] == 0.0
    assert scores["classwise_ece"] == pytest.approx((0 + 0.4 + 0.4 + 0) / 4)


def test_a_channel_without_valid_pixels_is_left_out() -> None:
    probabilities, target = random_batch("multilabel", 5)
    target[:, 2] = IGNORE_INDEX
    rest = [0, 1, 3]
    metric = CalibrationScores(Task("multilabel", ("water", "grass", "tree")))
    metric.update(probabilities[:, rest], target[:, rest])
    found = scores_of("multilabel", (probabilities, target))
    assert found == {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("mode", MODES)
def test_reliability_is_that_of_scikit_learn_and_gives_the_ece(mode: Mode) -> None:
    batch = random_batch(mode, 6)
    metric = CalibrationScores(task(mode), bins=12)
    metric.update(*batch)
    pixels, confidence, accuracy = metric.reliability()
    rows, labels = valid_rows(mode, *batch)
    top, decision = rows.max(1)
    expected = calibration_curve(decision == labels, top.double(), n_bins=12)
    filled = pixels > 0
    np.testing.assert_allclose(accuracy[filled], expected[0], rtol=1e-12)
    np.testing.assert_allclose(confidence[filled], expected[1], atol=1e-7)
    assert np.isnan(accuracy[~filled]).all()
    assert np.isnan(confidence[~filled]).all()
    assert (pixels.dtype, confidence.dtype, accuracy.dtype) == (np.int64, np.float64, np.float64)
    assert pixels.sum() == len(labels)
    ece = (pixels[filled] * abs(accuracy - confidence)[filled]).sum() / pixels.sum()
    assert float(metric.compute()["ece"]) == pytest.approx(ece, abs=1e-7)


def test_reliability_is_a_copy() -> None:
    metric = CalibrationScores(task("binary"))
    empty = metric.reliability()
    metric.update(*random_batch("binary", 0))
    assert empty.pixels.sum() == 0
    assert np.isnan(empty.accuracy).all()


@pytest.mark.parametrize("mode", MODES)
def test_merged_parts_equal_one_pass_in_any_order(mode: Mode) -> None:
    batches = [random_batch(mode, seed, size=(1, 8, 8)) for seed in range(4)]
    parts = [CalibrationScores(task(mode)) for _ in range(2)]
    parts[0].compute_with_cache = False
    for index in (3, 1, 0, 2):
        parts[index % 2].update(*batches[index])
    parts[0].compute()
    parts[0].merge_state(parts[1])
    assert {name: float(value) for name, value in parts[0].compute().items()} == scores_of(mode, *batches)


@pytest.mark.parametrize("mode", MODES)
def test_batches_and_ignored_pixels_do_not_matter(mode: Mode) -> None:
    """Sums are integers: any split gives the same bits."""
    probabilities, target = random_batch(mode, 7, size=(5, 8, 8))
    whole = scores_of(mode, (probabilities, target))
    assert scores_of(mode, *zip(probabilities.split(2), target.split(2), strict=True)) == whole
    ignored = target == IGNORE_INDEX if mode == "multilabel" else (target == IGNORE_INDEX).unsqueeze(1)
    other = random_batch(mode, 8, size=(5, 8, 8))[0]
    assert scores_of(mode, (torch.where(ignored, other, probabilities), target)) == whole
    blank = torch.full_like(target, IGNORE_INDEX)
    assert scores_of(mode, (probabilities, blank), (probabilities, target)) == whole


@pytest.mark.parametrize("mode", MODES)
def test_nothing_valid_is_nan(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 0)
    scores = scores_of(mode, (probabilities, torch.full_like(target, IGNORE_INDEX)))
    assert all(math.isnan(value) for value in scores.values())


def test_certain_and_right_is_perfect_certain_and_wrong_is_finite() -> None:
    target = torch.tensor([[[1, 0]]])
    certain = target.float().unsqueeze(1)
    assert scores_of("binary", (certain, target)) == dict.fromkeys(("ece", "nll", "brier", "classwise_ece"), 0.0)
    wrong = scores_of("binary", (1 - certain, target))
    assert wrong == pytest.approx({"ece": 1.0, "nll": -math.log(EPS), "brier": 1.0, "classwise_ece": 1.0})


@pytest.mark.parametrize("mode", MODES)
def test_bf16_counts_as_its_float32_values(mode: Mode) -> None:
    probabilities, target = random_batch(mode, 3)
    low = probabilities.bfloat16()
    assert scores_of(mode, (low, target)) == scores_of(mode, (low.float(), target))


def test_many_pixels_do_not_wear_out_the_sums() -> None:
    """Sums in float32 stop growing at 2**24 pixels and drift before; integer sums do not."""
    metric = CalibrationScores(task("binary"))
    probabilities, target = torch.full((1, 1, 512, 512), 0.7), torch.ones(1, 512, 512, dtype=torch.int64)
    metric.update(probabilities, target)
    for name in metric._defaults:  # as 128 such updates would
        setattr(metric, name, 128 * getattr(metric, name))
    scores = metric.compute()
    assert int(metric.pixels.sum()) == 2**25
    assert float(scores["ece"]) == pytest.approx(0.3, abs=1e-7)
    assert float(scores["nll"]) == pytest.approx(-math.log(0.7), abs=1e-6)


def test_bins_are_positive() -> None:
    with pytest.raises(ConfigError, match="positive number of bins, came 0"):
        CalibrationScores(task("binary"), bins=0)
