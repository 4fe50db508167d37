"""How well an uncertainty finds the errors, over every valid pixel, in memory for the bins only.

References:
    Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017, arXiv:1705.08500.
    Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019, arXiv:1805.08206
    (AURC).
    Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017,
    arXiv:1610.02136 (AUROC of the errors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torchmetrics import Metric

from smp_ensemble.exceptions import DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

BINS = 2**15
"""As many as there are bfloat16 numbers from 0 to infinity: a bin holds what rounds down to the same one."""

POINTS = 200
"""Of a risk-coverage curve, at most: enough to draw it."""


class Counts(NamedTuple):
    """Int64 pixel counts `(BINS,)` by ascending uncertainty: all valid ones, and those decided wrongly."""

    pixels: Tensor
    errors: Tensor


@dataclass(frozen=True)
class RiskCoverage:
    """The error rate that is left when only the most certain pixels are decided.

    Attributes:
        coverage: Shares of pixels that are decided, the most certain ones first: float64 `(points,)`, ascending, up to
            1; empty without pixels.
        risk: Error rate among them, float64 `(points,)`; the last one is the error rate of all pixels.
        aurc: Mean risk over coverages of 1, 2, ... all pixels, not only those at the points.
        error_auroc: The probability that a wrong pixel is more uncertain than a right one.
    """

    coverage: npt.NDArray[np.float64]
    risk: npt.NDArray[np.float64]
    aurc: float
    error_auroc: float


def _check(uncertainty: Tensor, wrong: Tensor, valid: Tensor) -> Tensor:
    """The uncertainty in float32, 0 where not valid."""
    if not uncertainty.shape == wrong.shape == valid.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (uncertainty, wrong, valid))
        raise DataError(f"expected uncertainty, wrong and valid of one shape, came {shapes}")
    if not (uncertainty.is_floating_point() and wrong.dtype == valid.dtype == torch.bool):
        raise DataError(
            "expected a floating-point uncertainty and boolean wrong and valid, "
            f"came {uncertainty.dtype}, {wrong.dtype} and {valid.dtype}"
        )
    values = torch.where(valid, uncertainty.detach().float(), 0.0)
    if values.numel() > 0:
        low, high = (float(bound) for bound in values.aminmax())
        if not (low >= 0 and high < float("inf")):
            raise DataError(f"expected finite uncertainties of 0 or more, came {low:.4g}..{high:.4g}: rank by 1 - p")
    return values


def _update(uncertainty: Tensor, wrong: Tensor, valid: Tensor) -> Counts:
    """The bits of floats from 0 on, read as integers, are in the order of the floats; the upper 16 are a bfloat16."""
    place = uncertainty.abs().view(torch.int32) >> 16  # -0.0 becomes 0.0
    cell = torch.where(valid, place + wrong * BINS, 2 * BINS)
    right, errors = torch.bincount(cell.flatten(), minlength=2 * BINS + 1)[:-1].view(2, BINS)
    return Counts(right + errors, errors)


def _aurc(pixels: Tensor, errors: Tensor) -> Tensor:
    """The expectation over random orders inside bins.

    With N pixels and E errors before a bin of n pixels and e errors, the risk after its j-th pixel is in expectation
    `(E + j * e/n) / (N + j)`, which is `e/n + (E - N * e/n) / (N + j)`: the sum over j is a difference of digammas.
    """
    here = pixels > 0
    n, e = pixels[here].double(), errors[here].double()
    before, wrong = n.cumsum(0) - n, e.cumsum(0) - e
    harmonic = torch.digamma(before + n + 1) - torch.digamma(before + 1)
    return (e + (wrong - before * e / n) * harmonic).sum() / n.sum()


def _error_auroc(pixels: Tensor, errors: Tensor) -> Tensor:
    wrong, right = errors.double(), (pixels - errors).double()
    below = right.cumsum(0) - right
    return (wrong * (below + right / 2)).sum() / (wrong.sum() * right.sum())


def _curve(pixels: Tensor, errors: Tensor) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Coverage and expected risk at evenly spaced numbers of pixels: inside a bin errors grow linearly."""
    reached = np.concatenate([[0], pixels.cumsum(0).numpy()])
    wrong = np.concatenate([[0], errors.cumsum(0).numpy()])
    total = int(reached[-1])
    points = min(POINTS, total)
    counts = np.array([-(-total * point // points) for point in range(1, points + 1)], dtype=np.float64)
    return counts / total, np.interp(counts, reached, wrong) / counts


class SelectiveScores(Metric):
    """How well an uncertainty ranks errors, pooled over every valid pixel that `update` saw.

    `compute` gives `aurc`, the area under the risk-coverage curve: the mean over k of the error rate among the k most
    certain pixels; lower is better, and it is the error rate itself where the uncertainty says nothing. And
    `error_auroc`: the probability that a wrong pixel is more uncertain than a right one, ties count half; 0.5 where the
    uncertainty says nothing, 1 where it finds all errors. Without a valid pixel both are NaN; without errors, or with
    nothing else, `error_auroc` is.

    Uncertainties are rounded down to bfloat16, which keeps their order: two that differ by less than 0.8 % may tie.
    Tied pixels come in random order, and the scores are their expectation, exactly.

    Example:
        >>> scores = SelectiveScores()
        >>> wrong = torch.tensor([False, True, False, True])
        >>> scores.update(torch.tensor([0.0, 0.1, 0.2, 0.4]), wrong, torch.ones(4, dtype=torch.bool))
        >>> {name: round(float(value), 4) for name, value in scores.compute().items()}
        {'aurc': 0.3333, 'error_auroc': 0.75}
    """

    is_differentiable = False
    full_state_update = False
    pixels: Tensor
    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("pixels", "errors"):
            self.add_state(name, torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, uncertainty: Tensor, wrong: Tensor, valid: Tensor) -> None:
        """Counts a batch.

        Args:
            uncertainty: Of the decisions, 0 or more, any shape: `1 - confidence`, entropy, ...
            wrong: Where the decision is not the truth, bool, the same shape.
            valid: Which entries count, bool, the same shape.

        Raises:
            DataError: Shapes differ, a dtype is wrong, or an uncertainty that counts is negative or not finite.
        """
        counts = _update(_check(uncertainty, wrong, valid), wrong, valid)
        self.pixels += counts.pixels
        self.errors += counts.errors

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything seen so far: float64 on the CPU."""
        pixels, errors = self.pixels.cpu(), self.errors.cpu()
        return {"aurc": _aurc(pixels, errors), "error_auroc": _error_auroc(pixels, errors)}

    def curve(self) -> RiskCoverage:
        """The risk at up to `POINTS` evenly spaced coverages, with the scores."""
        pixels, errors = self.pixels.cpu(), self.errors.cpu()
        coverage, risk = _curve(pixels, errors)
        return RiskCoverage(coverage, risk, float(_aurc(pixels, errors)), float(_error_auroc(pixels, errors)))
