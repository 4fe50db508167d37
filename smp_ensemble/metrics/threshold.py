"""IoU of the foreground at every threshold, from two streaming histograms: exact, in memory for the bins only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torchmetrics import Metric

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.inputs import check_probabilities, check_target

if TYPE_CHECKING:
    from torch import Tensor


class Histograms(NamedTuple):
    """Int64 pixel counts `(bins,)` by the highest threshold that the probability reaches: true and false foreground."""

    positives: Tensor
    negatives: Tensor


def _update(probabilities: Tensor, target: Tensor, bins: int) -> Histograms:
    """A pixel falls into bin j when `t_j <= p < t_(j+1)`, compared in p's own type: then p >= t_j <=> bin >= j."""
    valid = check_target(target, 2)
    edges = torch.tensor([j / bins for j in range(1, bins)], dtype=probabilities.dtype, device=probabilities.device)
    place = torch.bucketize(probabilities[:, 0].contiguous(), edges, right=True)
    cell = torch.where(valid, target.long() * bins + place, 2 * bins)
    negatives, positives = torch.bincount(cell.flatten(), minlength=2 * bins + 1)[:-1].view(2, bins)
    return Histograms(positives, negatives)


def _compute(histograms: Histograms) -> Tensor:
    """IoU at t_j = tp / (positives + fp), where both count the bins from j on."""
    positives, negatives = (counts.cpu().double() for counts in histograms)
    tp, fp = (counts.flip(0).cumsum(0).flip(0) for counts in (positives, negatives))
    return tp / (positives.sum() + fp)


class ThresholdCurve(Metric):
    """The foreground's pooled IoU at the thresholds `t_j = j / bins`, in binary mode.

    Decisions are `p >= t_j`, exactly as a mask at that threshold would be: the curve equals brute force bit for bit.

    Args:
        bins: Number of thresholds; 256 makes them exact in every floating-point type.

    Raises:
        ConfigError: There are fewer than two bins.

    Example:
        >>> curve = ThresholdCurve(bins=4)
        >>> curve.update(torch.tensor([[[[0.1, 0.3, 0.6, 0.9]]]]), torch.tensor([[[0, 0, 1, 1]]]))
        >>> curve.iou().tolist()
        [0.5, 0.6666666666666666, 1.0, 0.5]
        >>> curve.best()
        (0.5, 1.0)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    positives: Tensor
    negatives: Tensor

    def __init__(self, bins: int = 256) -> None:
        super().__init__()
        if bins < 2:
            raise ConfigError(f"expected two or more bins, came {bins}: 256 is the default")
        self.bins = bins
        for name in ("positives", "negatives"):
            self.add_state(name, torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            probabilities: The foreground's, shape `(N, 1, H, W)`.
            target: Zeros and ones `(N, H, W)`; 255 where ignored.

        Raises:
            DataError: Shapes do not fit, values are not probabilities, or class ids are out of range.
        """
        probabilities = check_probabilities(probabilities, target, "binary", 1)
        histograms = _update(probabilities, target, self.bins)
        self.positives += histograms.positives
        self.negatives += histograms.negatives

    def compute(self) -> Tensor:
        """IoU at each threshold: float64 `(bins,)` on the CPU; NaN where nothing is true and nothing predicted."""
        return _compute(Histograms(self.positives, self.negatives))

    def iou(self) -> Tensor:
        """The same as `compute`: IoU at each threshold `j / bins`, shape `(bins,)`."""
        curve: Tensor = self.compute()
        return curve

    def best(self) -> tuple[float, float]:
        """The threshold with the highest IoU, and that IoU; threshold 0, which predicts foreground everywhere, is out.

        Among equals the one nearest to 0.5 wins, then the lower one.

        Raises:
            DataError: No foreground pixel was seen: every threshold would score 0 or nothing.
        """
        curve = self.iou().tolist()
        if not curve[0] > 0:
            raise DataError("expected foreground pixels to choose a threshold by, came none: use more images")
        best = max(range(1, self.bins), key=lambda j: (curve[j], -abs(2 * j - self.bins), -j))
        return best / self.bins, curve[best]
