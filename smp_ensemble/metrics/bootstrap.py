"""How far to trust a pooled score: intervals from drawing whole images, or whole groups of them, again and again.

Pixels of one image depend on each other, and so do images of one group (tiles of a scene, slices of a patient); images
or groups do not. So they are the units that are drawn, and a score is computed anew from the counts of those drawn.

References:
    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals, section 13.3.
    Davison & Hinkley, "Bootstrap Methods and their Application", 1997: data in groups, section 3.8; the +1 of
    p-values, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.exceptions import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Counts = npt.NDArray[np.integer]

_MAX_DRAWS = 2**22
"""How many weights are in memory at once: resamples are drawn in parts of about 32 MiB."""


@dataclass(frozen=True)
class Interval:
    """A score and where it may lie.

    Attributes:
        estimate: The score on the data as they are; NaN if it has none.
        low: Lower end of the interval; NaN if there are fewer than 2 units to draw.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same images.

    Attributes:
        estimate: Mean IoU of the first minus that of the second.
        low: Lower end of its interval; NaN if there are fewer than 2 units to draw.
        high: Upper end.
        p_value: Twice the share of resamples in which the difference is on the other side of 0, or 0, at most 1; 1 is
            added to both numbers of the share, so that it is never 0. NaN with the interval.
    """

    estimate: float
    low: float
    high: float
    p_value: float


def bootstrap_iou(
    counts: Counts,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Interval, list[Interval]]:
    """Percentile intervals of the pooled IoU: of its mean over classes, and of each class.

    As many images are drawn as there are, with replacement; with groups, as many groups, each with all of its images.
    The IoU is that of the sum of their counts. The mean is over the classes that occur, in the truth or in predictions,
    as `SegmentationScores` has it: over those of the whole data set for the estimate, over those of a resample for its
    score. Resamples without a score take no part.

    Args:
        counts: True positives, false positives and false negatives of each image and class, integers `(n, K, 3)`.
        groups: The group of each image; None: each image is one of its own.
        resamples: How often to draw.
        seed: Of the draws. The same number of units gives the same draws.
        level: Share of the resamples' scores inside the interval.

    Returns:
        The interval of the mean, and one for each class, all NaN for a class that never occurs. With fewer than 2
        images or groups nothing varies: the ends are NaN.

    Raises:
        DataError: Counts are not as described, or there is not one group for each image.
        ConfigError: `resamples` is not positive, or `level` is not inside 0..1.

    Example:
        >>> counts = np.array([[[9, 1, 0]], [[5, 5, 0]], [[8, 1, 1]], [[2, 4, 2]]])
        >>> mean, (roof,) = bootstrap_iou(counts)
        >>> mean == roof
        True
        >>> [round(value, 2) for value in (mean.estimate, mean.low, mean.high)]
        [0.63, 0.39, 0.85]
    """
    _check(counts, groups, resamples, level)
    units = _units(counts, groups)
    scores = _iou(units.sum(axis=0, keepdims=True))
    drawn = _iou(_resampled(units, resamples, seed))
    mean = _interval(float(_mean(scores)[0]), _mean(drawn), level)
    return mean, [_interval(float(scores[0, k]), drawn[:, k], level) for k in range(scores.shape[1])]


def paired_difference(
    a: Counts,
    b: Counts,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Whether model `a` has a better mean IoU than model `b`: percentile interval and p-value of the difference.

    Both are scored on the same draws. What makes an image hard for one makes it hard for the other and cancels, so the
    interval is much narrower than those of the two scores suggest. The difference is significant at `1 - level` where
    the interval leaves 0 out, which is where the p-value is below it, but for the +1.

    Args:
        a: Counts of one model, integers `(n, K, 3)`; see `bootstrap_iou`.
        b: Those of the other, for the same images in the same order.
        groups: The group of each image; None: each image is one of its own.
        resamples: How often to draw; the p-value is at least `2 / (resamples + 1)`.
        seed: Of the draws.
        level: Share of the resamples' differences inside the interval.

    Raises:
        DataError: Counts are not as described, or differ in shape, or there is not one group for each image.
        ConfigError: `resamples` is not positive, or `level` is not inside 0..1.

    Example:
        >>> a = np.array([[[9, 1, 0]], [[5, 5, 0]], [[8, 1, 1]], [[2, 4, 2]]])
        >>> b = a + [[[-1, 1, 1]]]
        >>> better = paired_difference(a, b)
        >>> better.low > 0, round(better.p_value, 3)
        (True, 0.002)
    """
    for counts in (a, b):
        _check(counts, groups, resamples, level)
    if a.shape != b.shape:
        raise DataError(f"expected counts of the same images and classes, came {a.shape} and {b.shape}")
    classes = a.shape[1]
    units = _units(np.concatenate([a, b], axis=1), groups)
    estimate, drawn = (
        _mean(iou[:, :classes]) - _mean(iou[:, classes:])
        for iou in (_iou(units.sum(axis=0, keepdims=True)), _iou(_resampled(units, resamples, seed)))
    )
    interval = _interval(float(estimate[0]), drawn, level)
    return Difference(interval.estimate, interval.low, interval.high, _p_value(drawn))


def _check(counts: Counts, groups: Sequence[str] | None, resamples: int, level: float) -> None:
    if counts.ndim != 3 or counts.shape[2] != 3 or not np.issubdtype(counts.dtype, np.integer):
        raise DataError(
            f"expected integer counts of shape (images, classes, 3), came {counts.dtype} {counts.shape}: "
            "true positives, false positives and false negatives of each image and class"
        )
    if counts.size and counts.min() < 0:
        raise DataError(f"expected counts of 0 and more, came {counts.min()}")
    if groups is not None and len(groups) != len(counts):
        raise DataError(f"expected a group for each of {len(counts)} images, came {len(groups)}")
    if resamples < 1:
        raise ConfigError(f"expected a positive number of resamples, came {resamples}: 1000 is the default")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"expected a level between 0 and 1, came {level}: 0.95 is the default")


def _units(counts: Counts, groups: Sequence[str] | None) -> Floats:
    """Counts `(units, K, 3)` of what is drawn whole, groups in the order of their names; exact below 2**53."""
    if groups is None:
        return counts.astype(np.float64)
    names, unit = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), *counts.shape[1:]))
    np.add.at(sums, unit, counts)
    return sums


def _resampled(units: Floats, resamples: int, seed: int) -> Floats:
    """Summed counts `(resamples, K, 3)`; none at all with fewer than 2 units, where nothing varies.

    How often each unit is drawn is multinomial, so a resample is a row of weights and its counts are a product. They
    are whole numbers: exact, and the same on every machine.
    """
    n, classes, _ = units.shape
    if n < 2:
        return np.empty((0, classes, 3))
    generator = np.random.default_rng(seed)
    flat, shares = units.reshape(n, classes * 3), np.full(n, 1 / n)
    step = max(1, _MAX_DRAWS // n)
    parts = [
        generator.multinomial(n, shares, size=min(step, resamples - start)).astype(np.float64) @ flat
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts).reshape(resamples, classes, 3)


def _iou(counts: Floats) -> Floats:
    """IoU `(..., K)` of counts `(..., K, 3)`; NaN where a class does not occur."""
    union = counts.sum(axis=-1)
    iou: Floats = np.divide(counts[..., 0], union, out=np.full(union.shape, np.nan), where=union > 0)
    return iou


def _mean(iou: Floats) -> Floats:
    """Mean `(n,)` over the classes that occur of `(n, K)`; NaN where none does."""
    occurs = np.isfinite(iou)
    number = occurs.sum(axis=1)
    total = np.where(occurs, iou, 0.0).sum(axis=1)
    mean: Floats = np.divide(total, number, out=np.full(len(iou), np.nan), where=number > 0)
    return mean


def _interval(estimate: float, drawn: Floats, level: float) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def _p_value(drawn: Floats) -> float:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
