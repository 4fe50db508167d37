"""Calibration: how far confidence and accuracy are apart, over every valid pixel, in memory for the bins only.

References:
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    Nixon et al., "Measuring Calibration in Deep Learning", CVPR Workshops 2019, arXiv:1904.01685.
    Kull et al., "Beyond temperature scaling", NeurIPS 2019, arXiv:1910.12656 (class by class).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torchmetrics import Metric

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.inputs import check_probabilities, check_target

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.typing import Mode, Task

EPS = torch.finfo(torch.float32).eps
"""The smallest probability that the log-likelihood sees, so that a confident error costs 15.9 nats and not infinity."""

_UNIT = 2**24
"""Sums are int64 in units of 2**-24: exact for confidences of 0.5 and more, and the same in any order on any device."""


class Reliability(NamedTuple):
    """What a reliability diagram shows: pixels by the confidence of their decision, in bins of equal width over 0..1.

    Attributes:
        pixels: Valid pixels in each bin, int64 `(bins,)`.
        confidence: Their mean confidence, float64 `(bins,)`; NaN where a bin is empty.
        accuracy: The share of them that is right, float64 `(bins,)`; NaN where a bin is empty.
    """

    pixels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]


class Sums(NamedTuple):
    """Int64 sums over pixels, those of confidence, log-loss, squared error and surplus in fixed point.

    Per bin of confidence `(bins,)`: pixels, right ones, confidence. Of all pixels `()`: log-loss and squared error. Per
    channel and bin of its probability `(K, bins)`: truth minus probability. Per channel `(K,)`: valid pixels.
    """

    pixels: Tensor
    right: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor
    surplus: Tensor
    seen: Tensor


def _fixed(values: Tensor) -> Tensor:
    return (values * _UNIT).round().long()


def _bin(values: Tensor, bins: int) -> Tensor:
    return (values * bins).long().clamp_max_(bins - 1)


def _classwise(probabilities: Tensor, target: Tensor, valid: Tensor, mode: Mode, bins: int) -> tuple[Tensor, Tensor]:
    """Surplus and seen: channel by channel, because all at once take four times as long on the CPU."""
    channels = probabilities.shape[1]
    surplus = torch.zeros(channels, bins, dtype=torch.int64, device=probabilities.device)
    for channel, forecast in enumerate(probabilities.unbind(1)):
        if mode == "multilabel":
            true, counts = target[:, channel] == 1, valid[:, channel]
        else:
            true, counts = target == (channel if mode == "multiclass" else 1), valid
        excess = torch.where(counts, _fixed(true.to(forecast.dtype) - forecast), 0)
        surplus[channel].scatter_add_(0, _bin(forecast, bins).flatten(), excess.flatten())
    seen = valid.sum((0, 2, 3)) if mode == "multilabel" else valid.sum().expand(channels)
    return surplus, seen


def _update(probabilities: Tensor, target: Tensor, mode: Mode, bins: int) -> Sums:
    valid = check_target(target, probabilities.shape[1] if mode == "multiclass" else 2)
    if mode == "multiclass":
        label = torch.where(valid, target, 0).long().unsqueeze(1)
        confidence, decision = probabilities.max(dim=1)
        chosen = probabilities.gather(1, label)[:, 0]
        squared = probabilities.square().sum(dim=1) - 2 * chosen + 1
        right = decision == label[:, 0]
    else:
        foreground = probabilities[:, 0] if mode == "binary" else probabilities
        confidence = torch.maximum(foreground, 1 - foreground)
        chosen = torch.where(target == 1, foreground, 1 - foreground)
        squared = (1 - chosen).square()
        right = (foreground >= 0.5) == (target == 1)
    place = torch.where(valid, _bin(confidence, bins), bins).flatten()
    fixed = torch.zeros(bins + 1, dtype=torch.int64, device=place.device)
    nll = -chosen.clamp(EPS, 1.0).log()
    surplus, seen = _classwise(probabilities, target, valid, mode, bins)
    return Sums(
        pixels=torch.bincount(place, minlength=bins + 1)[:-1],
        right=torch.bincount(torch.where(right.flatten(), place, bins), minlength=bins + 1)[:-1],
        confidence=fixed.scatter_add_(0, place, _fixed(confidence).flatten())[:-1],
        nll=torch.where(valid, _fixed(nll), 0).sum(),
        brier=torch.where(valid, _fixed(squared), 0).sum(),
        surplus=surplus,
        seen=seen,
    )


def _compute(sums: Sums) -> dict[str, Tensor]:
    """Differences are taken in int64 and only then divided: no cancellation in float32."""
    total = sums.pixels.sum()
    gap = (sums.right * _UNIT - sums.confidence).abs().sum()
    scores = {name: part / _UNIT / total for name, part in (("ece", gap), ("nll", sums.nll), ("brier", sums.brier))}
    return scores | {"classwise_ece": (sums.surplus.abs().sum(1) / _UNIT / sums.seen).nanmean()}


class CalibrationScores(Metric):
    """Expected calibration errors, log-loss and Brier score, pooled over every valid pixel that `update` saw.

    `compute` gives `ece`: the mean over pixels of |accuracy - confidence| per bin of equal width, where confidence is
    the probability of the decision (top label); `classwise_ece`: the mean over classes of |frequency of the class -
    its mean probability|, with pixels in bins by that probability, whatever the decision: it sees a class that rarely
    wins, to which `ece` is blind; `nll`: the mean of `-log p(truth)`, p clamped to `EPS = 2**-23` from
    below; `brier`: the mean of `(p - y)**2`, in multiclass mode summed over classes (0..2), as scikit-learn has it.
    Binary mode counts as two classes with confidence `max(p, 1 - p)`, whose classwise errors are the same: the
    foreground's. In multilabel mode every channel is such a pair; all are pooled, but `classwise_ece` is the mean over
    channels that have a valid pixel. Bins are closed below, the last one also above. Without a valid pixel all are NaN.

    Args:
        task: Mode and class names.
        bins: Number of bins of equal width over 0..1.

    Raises:
        ConfigError: `bins` is not positive.

    Example:
        >>> from smp_ensemble.typing import Task
        >>> scores = CalibrationScores(Task("binary", ("background", "roof")))
        >>> scores.update(torch.full((1, 1, 1, 4), 0.75), torch.tensor([[[1, 1, 0, 0]]]))
        >>> {name: round(float(value), 4) for name, value in scores.compute().items()}
        {'ece': 0.25, 'nll': 0.837, 'brier': 0.3125, 'classwise_ece': 0.25}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    pixels: Tensor
    right: Tensor
    confidence: Tensor
    nll: Tensor
    brier: Tensor
    surplus: Tensor
    seen: Tensor

    def __init__(self, task: Task, bins: int = 15) -> None:
        super().__init__()
        if bins < 1:
            raise ConfigError(f"expected a positive number of bins, came {bins}")
        self.task = task
        self.bins = bins
        channels = task.num_outputs
        shapes = [(bins,), (bins,), (bins,), (), (), (channels, bins), (channels,)]
        for name, shape in zip(Sums._fields, shapes, strict=True):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            probabilities: Shape `(N, K, H, W)`.
            target: Class ids `(N, H, W)`, zeros and ones `(N, K, H, W)` in multilabel mode; 255 where ignored.

        Raises:
            DataError: Shapes do not fit, values are not probabilities, or class ids are out of range.
        """
        probabilities = check_probabilities(probabilities, target, self.task.mode, self.task.num_outputs)
        sums = _update(probabilities, target, self.task.mode, self.bins)
        self.pixels += sums.pixels
        self.right += sums.right
        self.confidence += sums.confidence
        self.nll += sums.nll
        self.brier += sums.brier
        self.surplus += sums.surplus
        self.seen += sums.seen

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything seen so far."""
        return _compute(Sums(self.pixels, self.right, self.confidence, self.nll, self.brier, self.surplus, self.seen))

    def reliability(self) -> Reliability:
        """Confidence and accuracy of everything seen so far, in the bins of `ece`.

        Their mean distance, weighted by pixels, is the `ece`.
        """
        pixels, right, confidence = (state.cpu().numpy() for state in (self.pixels, self.right, self.confidence))
        filled = np.where(pixels > 0, pixels, np.nan)
        return Reliability(pixels.copy(), confidence / _UNIT / filled, right / filled)
