"""What was measured of an ensemble and its members on one data set: plain values, for tables, figures and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from smp_ensemble.evaluation.adaptive_measuring import AdaptiveScore
    from smp_ensemble.metrics.calibration import Reliability
    from smp_ensemble.metrics.diversity import Diversity
    from smp_ensemble.metrics.selective import RiskCoverage
    from smp_ensemble.typing import DatasetReference, Task


@dataclass(frozen=True)
class Score:
    """What was measured for one model on one data set.

    Attributes:
        threshold: The decision threshold that the scores are for.
        metrics: `iou`, `iou/<class>`, `dice`, `dice/<class>`, `boundary_iou`, `ece`, `classwise_ece`, `nll`, `brier`,
            `aurc`, `error_auroc`, and `coverage` where the model rejects pixels; in binary mode also `iou_at_half`,
            the score at threshold 0.5.
    """

    threshold: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class ModelMeasurement:
    """One model on one data set.

    Attributes:
        name: For people: `m-7a060a0b43 (step 200)`, `ensemble`.
        score: Threshold and metrics.
        counts: True positives, false positives and false negatives of each image and class: int64 `(n, K, 3)`; the
            score's IoU is that of their sum over images.
        reliability: Pixels, confidence and accuracy by bin of confidence.
        risk_coverage: Errors by confidence.
    """

    name: str
    score: Score
    counts: npt.NDArray[np.int64]
    reliability: Reliability
    risk_coverage: RiskCoverage


@dataclass(frozen=True)
class Measurement:
    """An ensemble and its members on one data set.

    Attributes:
        task: Mode and class names.
        data: Which data set.
        split: `val`, `test`, ...
        images: Name of each image.
        groups: Group of each image, or None; the units of the bootstrap.
        members: In the ensemble's order; empty for an ensemble of one, which is its only member.
        ensemble: The whole.
        uncalibrated: The ensemble's reliability before its temperature; None where that is 1.
        diversity: How members differ; None for an ensemble of one.
        uncertainty: Mean predictive entropy, mutual information (nats) and variation ratio of each image: `(n, 3)`.
        adaptive: What the ensemble's adaptive rule saves and costs; None where it has none, or where it does not hold.
    """

    task: Task
    data: DatasetReference
    split: str
    images: Sequence[str]
    groups: Sequence[str] | None
    members: Sequence[ModelMeasurement]
    ensemble: ModelMeasurement
    uncalibrated: Reliability | None
    diversity: Diversity | None
    uncertainty: npt.NDArray[np.float64]
    adaptive: AdaptiveScore | None = None

    @property
    def models(self) -> list[ModelMeasurement]:
        """Members and, last, the ensemble."""
        return [*self.members, self.ensemble]

    @property
    def scores(self) -> list[Score]:
        """Of each member and, last, of the ensemble; an ensemble of one is its own member."""
        members = self.members or [self.ensemble]
        return [one.score for one in (*members, self.ensemble)]

    @property
    def best_member(self) -> int:
        """The member with the best IoU on this very data; the first of equals, and never one without a score."""
        ious = [score.metrics["iou"] for score in self.scores[:-1]]
        return max(range(len(ious)), key=lambda index: (not math.isnan(ious[index]), ious[index], -index))


@dataclass(frozen=True)
class Example:
    """One image to look at.

    Attributes:
        name: Of the image.
        image: Raw, `(H, W, C)`.
        truth: Mask as predictions have it: `(H, W)`, multilabel `(K, H, W)`; 255 where ignored.
        mask: The ensemble's, same shape; 255 where rejected.
        entropy: Predictive entropy in nats, `(H, W)`.
        iou: The ensemble's, on this image: mean over the classes that are there.
    """

    name: str
    image: npt.NDArray[np.generic]
    truth: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    entropy: npt.NDArray[np.float32]
    iou: float
