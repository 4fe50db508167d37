"""Bootstrap intervals of pooled IoU: against SciPy, by simulation, and laws."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics import bootstrap as module
from smp_ensemble.metrics.bootstrap import Difference, Interval, bootstrap_iou, paired_difference
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.typing import Task


def random_counts(seed: int, images: int = 40, classes: int = 3) -> np.ndarray:
    """Images that differ in size of objects and in difficulty."""
    generator = np.random.default_rng(seed)
    size = generator.integers(50, 2000, (images, classes))
    rate = generator.beta(8, 2, (images, classes))
    tp = generator.binomial(size, rate)
    return np.stack([tp, generator.binomial(size, 0.1), size - tp], axis=-1)


def mean_iou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, axis: int) -> np.ndarray:
    """Of counts whose classes come first: `(K, ..., n)`."""
    tp, fp, fn = (part.sum(axis=axis) for part in (tp, fp, fn))
    return (tp / (tp + fp + fn)).mean(axis=0)


def test_equals_scipy_within_monte_carlo_error() -> None:
    counts = random_counts(0)
    mean, classes = bootstrap_iou(counts, resamples=4000)

    def statistic(index: np.ndarray, axis: int) -> np.ndarray:
        return mean_iou(*np.moveaxis(counts[index.astype(int)], (-1, -2), (0, 1)), axis=axis)

    index = np.arange(len(counts))
    expected = bootstrap(
        (index,), statistic, n_resamples=4000, method="percentile", rng=np.random.default_rng(1), vectorized=True
    )
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert mean.estimate == pytest.approx(statistic(index, -1))
    assert mean.low == pytest.approx(expected.confidence_interval.low, abs=0.08 * width)
    assert mean.high == pytest.approx(expected.confidence_interval.high, abs=0.08 * width)
    one = bootstrap(
        tuple(counts[:, 1].T),
        lambda tp, fp, fn, axis: tp.sum(axis) / (tp + fp + fn).sum(axis),
        n_resamples=4000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert classes[1].low == pytest.approx(one.low, abs=0.08 * (one.high - one.low))
    assert classes[1].high == pytest.approx(one.high, abs=0.08 * (one.high - one.low))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(level: float) -> None:
    """400 data sets of 60 images from one distribution, whose pooled IoU is known."""
    generator = np.random.default_rng(3)
    rate = generator.beta(6, 2, (400, 60))
    size = generator.integers(100, 400, (400, 60))
    tp = generator.binomial(size, rate)
    counts = np.stack([tp, np.zeros_like(tp), size - tp], axis=-1)[:, :, None]
    truth = 6 / 8
    intervals = [bootstrap_iou(one, resamples=200, level=level)[0] for one in counts]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert level - 0.06 < covered < level + 0.04


def test_estimates_are_those_of_segmentation_scores() -> None:
    """Counts of each image, pooled, give the score of all of them; absent classes are left out alike."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(5, 4, 8, 8, generator=generator).softmax(1)
    probabilities[:, 3] = 0
    target = torch.randint(0, 3, (5, 8, 8), generator=generator)
    metric = SegmentationScores(Task("multiclass", ("a", "b", "c", "d")))
    counts = []
    for i in range(5):
        one = SegmentationScores(metric.task)
        for scores in (one, metric):
            scores.update(probabilities[i : i + 1], target[i : i + 1])
        counts.append(torch.stack([one.tp, one.fp, one.fn], 1).numpy())
    mean, classes = bootstrap_iou(np.stack(counts), resamples=20)
    expected = {name: float(value) for name, value in metric.compute().items()}
    assert mean.estimate == pytest.approx(expected["iou"])
    assert [interval.estimate for interval in classes[:3]] == pytest.approx([expected[f"iou/{name}"] for name in "abc"])
    assert all(math.isnan(value) for value in astuple(classes[3]))
    assert mean.low < mean.estimate < mean.high


def test_copies_in_a_group_tell_nothing_new() -> None:
    counts = random_counts(4)
    names = [f"scene-{i:02}" for i in range(len(counts))]
    copies = np.repeat(counts, 5, axis=0)
    groups = [name for name in names for _ in range(5)]
    assert bootstrap_iou(copies, groups=groups) == bootstrap_iou(counts) == bootstrap_iou(counts, groups=names)
    grouped, loose = bootstrap_iou(copies, groups=groups)[0], bootstrap_iou(copies)[0]
    assert grouped.estimate == loose.estimate
    ratio = (grouped.high - grouped.low) / (loose.high - loose.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_groups_are_drawn_whole() -> None:
    """Two groups of unequal size: resamples are twice the one, twice the other, or both."""
    counts = np.array([[[1, 0, 1]], [[1, 0, 1]], [[4, 1, 0]]])
    mean, _ = bootstrap_iou(counts, groups=["a", "a", "b"], level=0.9)
    assert mean == Interval(estimate=6 / 9, low=2 / 4, high=4 / 5)


def test_order_of_images_does_not_matter() -> None:
    counts = random_counts(5)
    order = np.random.default_rng(0).permutation(len(counts))
    groups = [f"{i % 9}" for i in range(len(counts))]
    shuffled = [groups[i] for i in order]
    assert bootstrap_iou(counts, groups=groups) == bootstrap_iou(counts[order], groups=shuffled)
    first, second = (bootstrap_iou(each, resamples=4000)[0] for each in (counts, counts[order]))
    assert first.estimate == second.estimate
    width = first.high - first.low
    assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.08 * width)


def test_a_seed_gives_the_same_draws_in_any_number_of_parts(monkeypatch) -> None:
    counts = random_counts(6)
    first = bootstrap_iou(counts, resamples=300, seed=7)
    assert first == bootstrap_iou(counts, resamples=300, seed=7)
    assert first != bootstrap_iou(counts, resamples=300, seed=8)
    monkeypatch.setattr(module, "_MAX_DRAWS", 7 * len(counts))
    assert first == bootstrap_iou(counts, resamples=300, seed=7)


def test_paired_difference_of_a_model_with_itself() -> None:
    counts = random_counts(7)
    assert paired_difference(counts, counts) == Difference(0.0, 0.0, 0.0, 1.0)


def test_paired_difference_is_antisymmetric() -> None:
    a, b = random_counts(8), random_counts(9)
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert astuple(one)[:3] == pytest.approx((-other.estimate, -other.high, -other.low))
    assert one.p_value == other.p_value


def test_paired_difference_by_hand() -> None:
    """Every draw is done again here, image by image, with the same weights."""
    a, b = random_counts(10, images=6), random_counts(10, images=6)
    b[::2, :, 0] -= 20
    b[::2, :, 2] += 20
    a[1, :, 0] -= 40
    a[1, :, 2] += 40
    weights = np.random.default_rng(5).multinomial(6, [1 / 6] * 6, size=500)
    drawn = []
    for row in weights:
        images = [i for i in range(6) for _ in range(row[i])]
        scores = [(model[images, :, 0].sum(0) / model[images].sum((0, 2))).mean() for model in (a, b)]
        drawn.append(scores[0] - scores[1])
    drawn = np.array(drawn)
    found = paired_difference(a, b, resamples=500, seed=5, level=0.9)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(drawn, [5, 95])))
    assert 0 < (drawn <= 0).sum() < (drawn >= 0).sum()
    assert found.p_value == pytest.approx(2 * ((drawn <= 0).sum() + 1) / 501)


def test_pairing_finds_what_single_intervals_do_not() -> None:
    """A model that is a little better on every image, by less than images differ from each other."""
    b = random_counts(11)
    a = b + np.array([5, 0, -5]) * (b[..., 2:] >= 5)
    difference = paired_difference(a, b)
    assert 0 < difference.low < difference.estimate < difference.high
    assert difference.p_value == pytest.approx(2 / 1001)
    assert bootstrap_iou(a)[0].low < bootstrap_iou(b)[0].high


def test_equal_models_are_seldom_called_different() -> None:
    """P-values of models that are equally good are about uniform."""
    generator = np.random.default_rng(12)
    rate = generator.beta(8, 2, (300, 50))
    tp = generator.binomial(200, rate[None], (2, 300, 50))
    counts = np.stack([tp, np.zeros_like(tp), 200 - tp], axis=-1)[:, :, :, None]
    p = np.array([paired_difference(a, b, resamples=200).p_value for a, b in zip(*counts, strict=True)])
    assert 0.02 < (p < 0.05).mean() < 0.1
    assert 0.4 < (p < 0.5).mean() < 0.6


@pytest.mark.parametrize("images", [0, 1])
def test_fewer_than_two_units_have_no_interval(images: int) -> None:
    counts = random_counts(13, images=3)[:images]
    for groups in (None, ["one"] * images):
        mean, classes = bootstrap_iou(counts, groups=groups)
        assert math.isnan(mean.estimate) == (images == 0)
        assert all(math.isnan(end) for interval in (mean, *classes) for end in (interval.low, interval.high))
        difference = paired_difference(counts, counts, groups=groups)
        assert all(math.isnan(value) for value in (difference.low, difference.high, difference.p_value))
    assert math.isnan(bootstrap_iou(random_counts(13, images=3), groups=["a"] * 3)[0].low)


def test_resamples_without_a_score_take_no_part() -> None:
    """The class is on one image of two: a quarter of the resamples has none of it, the others all say 1/2."""
    counts = np.array([[[1, 1, 0]], [[0, 0, 0]]])
    assert bootstrap_iou(counts)[0] == Interval(0.5, 0.5, 0.5)
    assert all(math.isnan(value) for value in astuple(bootstrap_iou(0 * counts)[0]))
    assert math.isnan(paired_difference(0 * counts, 0 * counts).p_value)


def test_errors_say_what_came() -> None:
    counts = random_counts(14, images=4)
    with pytest.raises(DataError, match=r"shape \(images, classes, 3\), came int64 \(4, 3\)"):
        bootstrap_iou(counts[:, :, 0])
    with pytest.raises(DataError, match=r"integer counts .* came float64"):
        bootstrap_iou(counts / 2)
    with pytest.raises(DataError, match="counts of 0 and more, came -1"):
        bootstrap_iou(-np.ones((2, 1, 3), dtype=np.int64))
    with pytest.raises(DataError, match="a group for each of 4 images, came 3"):
        bootstrap_iou(counts, groups=["a", "b", "c"])
    with pytest.raises(DataError, match=r"same images and classes, came \(4, 3, 3\) and \(3, 3, 3\)"):
        paired_difference(counts, counts[1:])
    with pytest.raises(ConfigError, match="number of resamples, came 0"):
        bootstrap_iou(counts, resamples=0)
    with pytest.raises(ConfigError, match=r"level between 0 and 1, came 95"):
        bootstrap_iou(counts, level=95)
