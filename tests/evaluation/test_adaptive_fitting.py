"""The rule counts what really changes, its table is a monotone upper bound, and its promise holds on other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from scipy.stats import beta
from sklearn.isotonic import IsotonicRegression

from smp_ensemble.ensembling.adaptive import decision_margins
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.evaluation.adaptive_fitting import (
    BINS,
    WIDTH,
    StageCounts,
    count_changes,
    fit_adaptive,
    fit_limit,
    fit_table,
    folds_of,
)
from smp_ensemble.evaluation.adaptive_measuring import AdaptiveMeter
from smp_ensemble.evaluation.predictions import Batch
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import Task

MEMBERS = 4
NAMES = ("ground", "roof", "road")


class Simulated:
    """What members predict for images whose regions differ in how hard they are; no network runs."""

    def __init__(self, mode: str, images: int, seed: int, combiner: str = "mean", **options) -> None:
        rng = np.random.default_rng(seed)
        outputs = 1 if mode == "binary" else 3
        self.ensemble = Ensemble(
            [torch.nn.Conv2d(3, outputs, 1) for _ in range(MEMBERS)], mode=mode, combiner=combiner, **options
        )
        smooth = (0, 0, 3, 3)
        shared = gaussian_filter(rng.normal(size=(images, outputs, 24, 24)), smooth)
        shared = shared / shared.std() * rng.uniform(0.5, 8, (images, 1, 1, 1))  # from hard images to easy ones
        own = gaussian_filter(rng.normal(size=(MEMBERS, images, outputs, 24, 24)), (0, *smooth))
        logits = torch.from_numpy(1.5 * shared + own / own.std()).float()
        self.members = logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()
        truth = shared.argmax(1) if mode == "multiclass" else shared > 0
        truth = truth[:, 0] if mode == "binary" else truth
        self.truth = torch.from_numpy(truth.astype(np.int64))
        self.task = Task(mode, NAMES[:2] if mode == "binary" else NAMES)
        self.data = self
        self.groups = None

    def __len__(self) -> int:
        return len(self.truth)

    def __iter__(self):
        for number, at in enumerate(range(0, len(self), 7)):
            indices = range(at, min(at + 7, len(self)))
            yield Batch(number, indices, [], self.truth[list(indices)])

    def of_members(self, batch):
        yield from self.members[:, list(batch.indices)]


def measured(simulated: Simulated):
    """What the rule of an ensemble does to simulated images."""
    meter = AdaptiveMeter(simulated.ensemble, simulated.task)
    for batch in simulated:
        stream = meter.batch(len(batch.indices))
        for one in simulated.of_members(batch):
            stream.update(one)
        stopped, used = stream.result()
        whole = simulated.ensemble.combine(simulated.of_members(batch))
        decide = simulated.ensemble.decide
        meter.update(used, decide(stopped), decide(whole), batch.truth)
    return meter.score()


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
@pytest.mark.parametrize("combiner", ["mean", "geometric", "majority"])
def test_the_promise_holds_on_images_that_the_rule_was_not_fitted_on(mode, combiner):
    tolerance = 0.01
    fitted, other = Simulated(mode, 60, 1, combiner), Simulated(mode, 60, 2, combiner)
    rule = fit_adaptive(fitted, tolerance)
    other.ensemble.adaptive = rule
    score = measured(other)
    assert sum(score.stopped) == 60
    assert 1 <= score.members < MEMBERS, "nothing was saved"
    assert 1 - score.agreement <= tolerance
    assert rule.limit > 0


def test_nothing_tolerated_changes_nothing():
    simulated = Simulated("binary", 20, 3, "vote")
    simulated.members[1:3, :15] = simulated.members[:1, :15]  # three votes of four are the same
    simulated.ensemble.adaptive = fit_adaptive(simulated, 0.0)
    score = measured(simulated)
    assert simulated.ensemble.adaptive.limit == 0
    assert score.agreement == 1
    assert score.stopped == (0, 0, 15, 5)


def test_more_tolerance_never_needs_more_members():
    simulated = Simulated("binary", 40, 4)
    used = []
    for tolerance in (0.0, 0.002, 0.01, 0.05):
        simulated.ensemble.adaptive = fit_adaptive(simulated, tolerance)
        used.append(measured(simulated).members)
    assert used == sorted(used, reverse=True)


def test_copies_of_one_member_need_the_first_only():
    simulated = Simulated("binary", 30, 5)
    simulated.members[1:] = simulated.members[:1]
    simulated.ensemble.adaptive = fit_adaptive(simulated, 0.01)
    score = measured(simulated)
    assert score.members < 1.5
    assert score.agreement == 1


def test_changes_are_counted_as_by_hand():
    simulated = Simulated("binary", 9, 6, threshold=0.4, temperature=1.3)
    counts = count_changes(simulated)
    p = simulated.members[:, :, 0].double().numpy()
    full = p.mean(axis=0)
    cut = expit(1.3 * np.log(0.4 / 0.6))  # where the threshold lies before the temperature

    assert counts.sizes.tolist() == [24 * 24] * 9
    for stage in range(MEMBERS - 1):
        mean = p[: stage + 1].mean(axis=0)
        rest = MEMBERS - stage - 1
        low, high = mean * (stage + 1) / MEMBERS, (mean * (stage + 1) + rest) / MEMBERS
        settled = (low >= cut) == (high >= cut)
        changes = ~settled & ((mean >= cut) != (full >= cut))
        assert abs(counts.open[:, stage].sum() - (~settled).sum()) <= 2  # rounding
        assert abs(counts.changed[:, stage].sum() - changes.sum()) <= 2
        mean = mean.clip(1e-7, 1 - 1e-7)
        margins = np.abs(np.log(mean / (1 - mean)) / 1.3 - np.log(0.4 / 0.6))
        places = np.minimum((margins / WIDTH).astype(int), BINS - 1)
        expected = np.bincount(places[~settled], minlength=BINS)
        far = int(6 / WIDTH)  # from there on float32 knows too little of 1 - p to tell bins apart
        assert np.abs(counts.open[:, stage].sum(axis=0) - expected)[:far].sum() <= 12  # edges of bins
    combined = simulated.ensemble.combine(iter(simulated.members))
    assert decision_margins(simulated.ensemble, combined).shape == simulated.truth.shape


@st.composite
def tallies(draw):
    seen = np.array(draw(st.lists(st.sampled_from([0, 1, 7, 400, 10**6]), min_size=1, max_size=8)))
    shares = np.array(draw(st.lists(st.floats(0, 1), min_size=len(seen), max_size=len(seen))))
    return seen, np.floor(seen * shares).astype(np.int64)


@given(tallies())
def test_a_table_never_grows_and_lies_above_what_isotonic_regression_says(tally):
    seen, hits = tally
    (row,) = fit_table(seen[None], hits[None])
    assert (np.diff(row) <= 0).all()
    assert ((row >= 0) & (row <= 1)).all()
    at = np.flatnonzero(seen)
    if not len(at):
        assert (row == 1).all()
        return
    regression = IsotonicRegression(increasing=False).fit(at, hits[at] / seen[at], sample_weight=seen[at])
    pooled = regression.predict(at)
    if len(set(seen[at])) == 1:  # a wide interval of a thin bin may be capped by its better known neighbour
        assert (row[at] >= pooled - 1e-9).all()
    assert (row[: at[0]] == 1).all()


@given(st.sampled_from([1, 10, 300, 10**5]), st.floats(0, 1))
def test_one_bin_gets_about_its_exact_upper_bound(total, share):
    hits = int(total * share)
    found = fit_table(np.array([[total]]), np.array([[hits]]))[0, 0]
    exact = beta.ppf(0.95, hits + 1, total - hits) if hits < total else 1.0  # Clopper & Pearson
    assert hits / total <= found + 1e-12
    assert found == pytest.approx(exact, abs=0.25 / np.sqrt(total) + 0.5 / total)


def test_thin_bins_are_not_called_safe():
    thin, thick = fit_table(np.array([[3], [30_000]]), np.array([[0], [0]]))[:, 0]
    assert thin > 0.4
    assert thick < 1e-4


def test_folds_keep_groups_together():
    assert folds_of(None, 7).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert folds_of(["a", "a", "b", "c", "b"], 5).tolist() == [0, 0, 1, 2, 1]
    assert folds_of(["a"] * 3, 3).tolist() == [0, 1, 2]


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.01, 0.1]))
def test_the_limit_keeps_the_promise_on_the_images_it_was_chosen_on(seed, tolerance):
    rng = np.random.default_rng(seed)
    opened = rng.integers(0, 2000, (25, 3, 4))
    changed = rng.binomial(opened, rng.uniform(0, 0.3, (25, 1, 1)) * [1, 0.1, 0.01, 0])
    counts = StageCounts(opened, changed, opened.sum(axis=-1).max(axis=1))
    folds = folds_of(None, 25)
    limit = fit_limit(counts, folds, tolerance)
    changes = np.zeros(25)
    for image in range(25):
        table = fit_table(opened[folds != folds[image]].sum(axis=0), changed[folds != folds[image]].sum(axis=0))
        for stage in range(3):
            if (opened[image, stage] * table[stage]).sum() / counts.sizes[image] <= limit:
                changes[image] = changed[image, stage].sum()
                break
    assert changes.sum() / counts.sizes.sum() <= tolerance


def test_one_image_promises_nothing():
    counts = StageCounts(np.full((1, 1, 2), 100), np.zeros((1, 1, 2), np.int64), np.array([200]))
    assert fit_limit(counts, folds_of(None, 1), 0.1) == 0


def test_an_ensemble_of_one_has_nothing_to_skip():
    simulated = Simulated("binary", 5, 7)
    simulated.members = simulated.members[:1]
    simulated.ensemble = Ensemble([torch.nn.Conv2d(3, 1, 1)], mode="binary")
    simulated.ensemble.adaptive = fit_adaptive(simulated, 0.01)
    assert measured(simulated).stopped == (5,)


def test_what_no_rule_is_fitted_for():
    simulated = Simulated("binary", 5, 8, weights=[1, 2, 3, 4])
    with pytest.raises(ConfigError, match="heaviest first"):
        fit_adaptive(simulated, 0.01)
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="expected adaptive as a share of pixels from 0 to below 1"):
            fit_adaptive(simulated, tolerance)
