"""Selective scores: against scikit-learn, torchmetrics, and brute force over random orders of ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from smp_ensemble.exceptions import DataError
from smp_ensemble.metrics.selective import BINS, POINTS, SelectiveScores

LEVELS = (0.0, 2.0**-20, 0.125, 0.25, 0.5, 0.75, 1.0, 3.0)
"""Uncertainties that bfloat16 holds exactly."""

pixels = st.lists(st.tuples(st.sampled_from(LEVELS), st.booleans()), min_size=1, max_size=40)


def metric_of(uncertainty, wrong, valid=None) -> SelectiveScores:
    uncertainty, wrong = torch.as_tensor(uncertainty, dtype=torch.float32), torch.as_tensor(wrong)
    metric = SelectiveScores()
    metric.update(uncertainty, wrong, torch.ones_like(wrong) if valid is None else torch.as_tensor(valid))
    return metric


def scores_of(*batch) -> dict[str, float]:
    return {name: float(value) for name, value in metric_of(*batch).compute().items()}


def random_batch(seed: int, size: int = 4000):
    """Uncertainties of which the higher ones are wrong more often."""
    generator = torch.Generator().manual_seed(seed)
    uncertainty = torch.rand(size, generator=generator).square()
    return uncertainty, torch.rand(size, generator=generator) < 0.6 * uncertainty


def mean_risk(wrong: np.ndarray) -> float:
    """AURC by its definition, of errors from the most certain pixel on, all in one order."""
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


@pytest.mark.parametrize("seed", range(3))
def test_error_auroc_is_that_of_scikit_learn_and_torchmetrics(seed: int) -> None:
    uncertainty, wrong = random_batch(seed)
    exact = uncertainty.bfloat16().float()
    found = scores_of(exact, wrong)["error_auroc"]
    assert found == pytest.approx(roc_auc_score(wrong, exact), abs=1e-12)
    assert found == pytest.approx(float(binary_auroc(exact, wrong.long())), abs=1e-6)
    assert scores_of(uncertainty, wrong)["error_auroc"] == pytest.approx(roc_auc_score(wrong, uncertainty), abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_without_ties_aurc_is_its_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    uncertainty = (1 + torch.randperm(512, generator=generator)).to(torch.int32) << 16  # bits: one pixel for each bin
    wrong = torch.rand(512, generator=generator) < 0.3
    uncertainty = uncertainty.view(torch.float32)
    expected = mean_risk(wrong[uncertainty.argsort()].numpy())
    assert scores_of(uncertainty, wrong)["aurc"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fine_bins_hardly_change_aurc(seed: int) -> None:
    uncertainty, wrong = random_batch(seed)
    expected = mean_risk(wrong[uncertainty.argsort()].numpy())
    assert scores_of(uncertainty, wrong)["aurc"] == pytest.approx(expected, abs=2e-3)


@given(st.lists(st.tuples(st.sampled_from(LEVELS[:3]), st.booleans()), min_size=1, max_size=6))
def test_with_ties_aurc_is_the_mean_over_all_orders(sample) -> None:
    orders = [order for order in itertools.permutations(sample) if list(order) == sorted(order, key=lambda p: p[0])]
    expected = np.mean([mean_risk(np.array([wrong for _, wrong in order])) for order in orders])
    assert scores_of(*zip(*sample, strict=True))["aurc"] == pytest.approx(expected, abs=1e-12)


def test_many_ties_are_the_mean_over_random_orders() -> None:
    uncertainty, wrong = random_batch(5, 300)
    uncertainty = (uncertainty * 4).floor() / 4
    generator = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        order = generator.permutation(300)
        order = order[np.argsort(uncertainty.numpy()[order], kind="stable")]
        found.append(mean_risk(wrong.numpy()[order]))
    tolerance = 5 * np.std(found) / math.sqrt(len(found))
    assert scores_of(uncertainty, wrong)["aurc"] == pytest.approx(np.mean(found), abs=tolerance)


@given(pixels)
def test_nothing_ranks_better_than_errors_last(sample) -> None:
    uncertainty, wrong = zip(*sample, strict=True)
    found = scores_of(uncertainty, wrong)
    best, worst = (mean_risk(np.array(sorted(wrong, reverse=reverse))) for reverse in (False, True))
    assert best - 1e-12 <= found["aurc"] <= worst + 1e-12
    perfect = scores_of(np.where(wrong, 2.0, 1.0), wrong)
    if len(set(wrong)) == 2:
        assert perfect["error_auroc"] == 1.0
        assert 0.0 <= found["error_auroc"] <= 1.0
    assert perfect["aurc"] == pytest.approx(best, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.sampled_from(LEVELS))
def test_an_uncertainty_that_says_nothing_scores_the_error_rate(wrong, level) -> None:
    found = scores_of([level] * len(wrong), wrong)
    assert found["aurc"] == pytest.approx(np.mean(wrong), abs=1e-12)
    if len(set(wrong)) == 2:
        assert found["error_auroc"] == 0.5


@given(pixels)
def test_only_the_order_matters(sample) -> None:
    uncertainty, wrong = (np.array(values) for values in zip(*sample, strict=True))
    assert scores_of(uncertainty / 2, wrong) == pytest.approx(scores_of(uncertainty, wrong), nan_ok=True)


@given(pixels, st.randoms(use_true_random=False), st.integers(0, 40))
def test_merged_parts_equal_one_pass(sample, random, cut) -> None:
    whole = metric_of(*zip(*sample, strict=True))
    random.shuffle(sample)
    first, second = SelectiveScores(), SelectiveScores()
    first.compute_with_cache = False
    for metric, part in ((first, sample[:cut]), (second, sample[cut:])):
        uncertainty = torch.tensor([level for level, _ in part])
        wrong = torch.tensor([wrong for _, wrong in part], dtype=torch.bool)
        metric.update(uncertainty, wrong, torch.ones_like(wrong))
    first.compute()
    first.merge_state(second)
    assert torch.equal(first.pixels, whole.pixels)
    assert torch.equal(first.errors, whole.errors)
    for name, value in whole.compute().items():
        assert torch.equal(first.compute()[name].nan_to_num(-1), value.nan_to_num(-1))


def test_pixels_that_do_not_count_may_hold_anything() -> None:
    uncertainty, wrong = random_batch(1)
    valid = torch.rand(len(wrong), generator=torch.Generator().manual_seed(0)) < 0.7
    expected = scores_of(uncertainty[valid], wrong[valid])
    assert scores_of(torch.where(valid, uncertainty, math.nan), wrong ^ ~valid, valid) == expected


def test_the_curve_is_the_risk_at_each_coverage() -> None:
    uncertainty, wrong = random_batch(2)
    uncertainty = uncertainty.bfloat16().float()
    metric = metric_of(uncertainty, wrong)
    curve = metric.curve()
    assert len(curve.coverage) == len(curve.risk) == POINTS
    np.testing.assert_allclose(curve.coverage, np.arange(1, POINTS + 1) / POINTS)
    assert curve.risk[-1] == pytest.approx(float(wrong.double().mean()), abs=1e-15)
    assert {"aurc": curve.aurc, "error_auroc": curve.error_auroc} == pytest.approx(scores_of(uncertainty, wrong))
    assert curve.aurc == pytest.approx(curve.risk.mean(), abs=2e-3)  # the points are its thinned form
    generator = np.random.default_rng(0)
    risks = []
    for _ in range(400):
        order = generator.permutation(len(wrong))
        order = order[np.argsort(uncertainty.numpy()[order], kind="stable")]
        reached = np.cumsum(wrong.numpy()[order])
        risks.append(reached[19::20] / np.arange(20, len(wrong) + 1, 20))
    np.testing.assert_allclose(curve.risk, np.mean(risks, axis=0), atol=2e-3)


def test_few_pixels_have_a_short_curve() -> None:
    curve = metric_of([0.0, 0.5, 1.0], [False, True, False]).curve()
    np.testing.assert_allclose(curve.coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert curve.error_auroc == 0.5


def test_nothing_to_rank_is_nan() -> None:
    curve = SelectiveScores().curve()
    assert math.isnan(curve.aurc)
    assert math.isnan(curve.error_auroc)
    assert curve.coverage.shape == curve.risk.shape == (0,)
    right, wrong = scores_of([0.1, 0.2], [False, False]), scores_of([0.1, 0.2], [True, True])
    assert math.isnan(right["error_auroc"])
    assert math.isnan(wrong["error_auroc"])
    assert (right["aurc"], wrong["aurc"]) == (0.0, 1.0)


def test_every_float_from_zero_on_has_a_place_in_order() -> None:
    """The smallest, the largest and the negative zero among them; half and double precision count as float32."""
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([-0.0, 1e-45, 1e-38, 1e-3, 1.0, 1e30, largest])
    place = metric_of(values, torch.zeros(7, dtype=torch.bool)).pixels.nonzero()[:, 0]
    assert place[0] == 0
    assert place[-1] < BINS
    assert len(place) == 6  # 1e-45 rounds down to 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        metric = SelectiveScores()
        metric.update(values[3:5].to(dtype), torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
        assert int(metric.pixels.sum()) == 2


def test_a_billion_pixels_do_not_wear_out_the_sums() -> None:
    """No errors at level 0, every other pixel at level 0.5, all at level 1: by hand, in closed form."""
    metric = metric_of([0.0, 0.5, 0.5, 1.0], [False, True, False, True])
    for name in ("pixels", "errors"):
        setattr(metric, name, getattr(metric, name) * 10**9)
    n = 10**9
    first = n - n * math.log(3) / 2  # sum over j = 1..2n of (j / 2) / (n + j)
    second = n - 2 * n * math.log(4 / 3)  # sum over j = 1..n of (n + j) / (3n + j)
    expected = (first + second) / (4 * n)
    assert float(metric.compute()["aurc"]) == pytest.approx(expected, abs=1e-8)
    assert float(metric.compute()["error_auroc"]) == 0.875


def test_input_that_cannot_be_ranked_is_refused() -> None:
    metric = SelectiveScores()
    four, flags = torch.rand(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(DataError, match=r"of one shape, came \(4,\), \(3,\), \(4,\)"):
        metric.update(four, flags[:3], flags)
    with pytest.raises(DataError, match="boolean wrong and valid, came torch.float32, torch.int64 and torch.bool"):
        metric.update(four, flags.long(), flags)
    with pytest.raises(DataError, match="floating-point uncertainty"):
        metric.update(four.long(), flags, flags)
    for value in (-0.5, math.inf, math.nan):
        with pytest.raises(DataError, match="finite uncertainties of 0 or more"):
            metric.update(torch.tensor([0.5, value, 0.5, 0.5]), flags, flags)
    assert int(metric.pixels.sum()) == 0
