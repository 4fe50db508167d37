"""What a measurement says: intervals, paired differences, the best member, and a sentence on how the ensemble did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.metrics.bootstrap import bootstrap_iou, paired_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.metrics.bootstrap import Difference, Interval
    from smp_ensemble.metrics.calibration import Reliability

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Findings:
    """What is worked out from a measurement once, for figures, page and JSON alike.

    Attributes:
        means: Mean IoU of each model with its interval, members first and the ensemble last.
        classes: IoU of each class with its interval, for each model.
        differences: IoU of the ensemble minus that of each member, on the same images.
        best: Index of the member with the highest IoU on this very data; None without members or scores.
        units: What the bootstrap draws: so many images, or groups where there are groups.
        grouped: Whether those units are groups.
        resamples: How often it draws.
    """

    means: Sequence[Interval]
    classes: Sequence[Sequence[Interval]]
    differences: Sequence[Difference]
    best: int | None
    units: int
    grouped: bool
    resamples: int

    @property
    def what(self) -> str:
        """What the units are called."""
        return "groups" if self.grouped else "images"

    def wins(self) -> int:
        """How many members the ensemble is better than: the whole interval is above 0."""
        return sum(difference.low > 0 for difference in self.differences)

    def losses(self) -> int:
        """How many members the ensemble is worse than: the whole interval is below 0."""
        return sum(difference.high < 0 for difference in self.differences)


def find(measurement: Measurement, *, resamples: int = 1000, seed: int = 0) -> Findings:
    """Works out intervals and differences by a bootstrap over images, or over groups where there are groups.

    With fewer than two units there is nothing to resample: intervals and p-values are NaN.

    Args:
        measurement: What was measured.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    groups = measurement.groups
    units = len(set(groups)) if groups is not None else len(measurement.images)
    means, classes = [], []
    for model in measurement.models:
        mean, each = bootstrap_iou(model.counts, groups=groups, resamples=resamples, seed=seed, level=LEVEL)
        means.append(mean)
        classes.append(each)
    differences = [
        paired_difference(
            measurement.ensemble.counts, member.counts, groups=groups, resamples=resamples, seed=seed, level=LEVEL
        )
        for member in measurement.members
    ]
    ious = [model.score.metrics["iou"] for model in measurement.members]
    best = None if not ious or np.isnan(ious).all() else int(np.nanargmax(ious))
    return Findings(means, classes, differences, best, units, groups is not None, resamples)


def image_ious(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU of each image, the mean over the classes that are there: `(n, K, 3)` to `(n,)`; NaN where none is.

    Example:
        >>> image_ious(np.array([[[2, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]))
        array([0.5, nan])
    """
    total = counts.sum(axis=-1)
    iou = np.divide(counts[..., 0], total, out=np.zeros(total.shape), where=total > 0)
    there = (total > 0).sum(axis=-1)
    return np.where(there > 0, iou.sum(axis=-1) / np.maximum(there, 1), np.nan)


def ece(reliability: Reliability) -> float:
    """Expected calibration error: the gap of confidence and accuracy of each bin, weighted by its pixels."""
    gaps = np.abs(reliability.accuracy - reliability.confidence)
    there = reliability.pixels > 0
    return float(np.average(gaps[there], weights=reliability.pixels[there])) if there.any() else math.nan
