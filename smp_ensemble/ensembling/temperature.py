"""Temperature of probabilities: softens or sharpens them, and never changes which class is the largest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.typing import Mode

EPSILON = 1e-7
MAX_TEMPERATURE = 20.0
MAX_STEPS, TOLERANCE = 30, 1e-5


def apply_temperature(probabilities: Tensor, temperature: float, mode: Mode) -> Tensor:
    """`softmax(log p / T)` over classes; per channel `sigmoid(logit p / T)` in binary and multilabel mode.

    Args:
        probabilities: Shape `(N, K, H, W)`.
        temperature: Above 0; 1 returns the input itself.
        mode: Says whether channels compete.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.
    """
    if temperature == 1.0:
        return probabilities
    clamped = probabilities.clamp(EPSILON, 1 - EPSILON)
    if mode == "multiclass":
        return torch.softmax(clamped.log() / temperature, dim=1)
    return torch.sigmoid(torch.logit(clamped) / temperature)


class TemperatureFit:
    """Finds the temperature with the least log-loss on all valid pixels: Newton's method on `1 / T`, one pass a step.

    The log-loss is convex in `1 / T`, so there is one minimum. Where it lies beyond 1/20 or 20 (nothing is wrong,
    nothing is better than chance), that bound is the answer: the first pass looks at both. In each pass `update` takes
    every batch, then `step` says whether another pass is needed; so several models can share their passes.

    Args:
        mode: Says whether channels compete.

    Attributes:
        temperature: The best so far; stays 1 where there is not a single valid pixel.
        done: Whether further passes would change nothing.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2.
    """

    def __init__(self, mode: Mode) -> None:
        self.done = False
        self._mode = mode
        self._beta = 1.0
        self._low, self._high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
        self._steps = 0
        self._sums: npt.NDArray[np.float64] = np.zeros((3, 2))

    @property
    def temperature(self) -> float:
        """T of the last step."""
        return 1 / self._beta

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Takes probabilities `(N, K, H, W)` at temperature 1, and their truth as metrics do; 255 where ignored."""
        betas = [self._beta] if self._steps else [self._beta, self._low, self._high]
        self._sums[: len(betas)] += _derivatives(probabilities, target, betas, self._mode)

    def step(self) -> bool:
        """Ends a pass: moves to a better temperature, and says whether it is the last one."""
        (slope, curvature), (at_low, _), (at_high, _) = self._sums.tolist()
        self._sums = np.zeros((3, 2))
        self._steps += 1
        beyond = self._steps == 1 and (at_low >= 0 if slope > 0 else at_high <= 0)
        if slope == 0 or beyond:
            self._beta = self._beta if slope == 0 else self._low if slope > 0 else self._high
            self.done = True
            return True
        self._low, self._high = (self._beta, self._high) if slope < 0 else (self._low, self._beta)
        beta = self._beta - slope / curvature if curvature > 0 else math.nan
        if not self._low < beta < self._high:  # beyond what is known: halve the interval, on a logarithmic scale
            beta = math.sqrt(self._low * self._high)
        self.done = abs(beta - self._beta) < TOLERANCE * self._beta or self._steps >= MAX_STEPS
        self._beta = beta
        return self.done


def fit_temperature(batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], mode: Mode) -> float:
    """The temperature with the least log-loss: see `TemperatureFit`.

    Args:
        batches: Gives a fresh stream of probabilities with their truth at each call.
        mode: Says whether channels compete.

    Example:
        >>> sure, truth = torch.full((1, 1, 1, 4), 0.95), torch.tensor([[[1, 1, 1, 0]]])
        >>> round(fit_temperature(lambda: [(sure, truth)], "binary"), 3)  # right in 3 of 4: logit(0.95) / logit(0.75)
        2.68
    """
    fit = TemperatureFit(mode)
    while not fit.done:
        for probabilities, target in batches():
            fit.update(probabilities, target)
        fit.step()
    return fit.temperature


def _derivatives(
    probabilities: Tensor, target: Tensor, betas: Sequence[float], mode: Mode
) -> list[tuple[float, float]]:
    """First and second derivative in `beta = 1 / T` of the log-loss, summed over valid pixels; at each of `betas`."""
    valid = target != IGNORE_INDEX
    clamped = probabilities.float().clamp(EPSILON, 1 - EPSILON)
    found = []
    if mode == "multiclass":
        scores = clamped.log()
        chosen = scores.gather(1, torch.where(valid, target, 0).long().unsqueeze(1))[:, 0]
        for beta in betas:
            softened = (beta * scores).softmax(dim=1)
            mean = (softened * scores).sum(dim=1)
            found.append((mean - chosen, (softened * (scores - mean.unsqueeze(1)).square()).sum(dim=1)))
    else:
        scores = torch.logit(clamped if mode == "multilabel" else clamped[:, 0])
        truth = (target == 1).float()
        for beta in betas:
            softened = torch.sigmoid(beta * scores)
            found.append(((softened - truth) * scores, softened * (1 - softened) * scores.square()))
    return [(_sum(first, valid), _sum(second, valid)) for first, second in found]


def _sum(values: Tensor, valid: Tensor) -> float:
    return float((values * valid).sum(dtype=torch.float64))
