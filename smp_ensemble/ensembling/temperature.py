"""Temperature of probabilities: softens or sharpens them, and never changes which class is the largest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def fit_temperature(batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], mode: Mode) -> float:
    """The temperature with the least log-loss on all valid pixels, by Newton's method on `1 / T`, one pass a step.

    The log-loss is convex in `1 / T`, so there is one minimum; it is sought between 1/20 and 20.

    Args:
        batches: Gives a fresh stream of probabilities `(N, K, H, W)` at temperature 1 with their truth `(N, H, W)`,
            in multilabel mode `(N, K, H, W)`; 255 where ignored.
        mode: Says whether channels compete.

    Returns:
        1 where there is not a single valid pixel, or where no temperature makes a difference.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599, section 4.2.
    """
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    beta = 1.0
    for _ in range(MAX_STEPS):
        slope = curvature = 0.0
        for probabilities, target in batches():
            first, second = _derivatives(probabilities, target, beta, mode)
            slope, curvature = slope + first, curvature + second
        if curvature <= 0 or slope == 0:
            break
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curvature
        if not low < step < high:  # beyond what is known: halve the interval, on the scale of temperatures
            step = math.sqrt(low * high)
        done = abs(step - beta) < TOLERANCE * beta
        beta = step
        if done:
            break
    return 1 / beta


def _derivatives(probabilities: Tensor, target: Tensor, beta: float, mode: Mode) -> tuple[float, float]:
    """First and second derivative in `beta = 1 / T` of the log-loss, summed over valid pixels."""
    valid = target != IGNORE_INDEX
    clamped = probabilities.double().clamp(EPSILON, 1 - EPSILON)
    if mode == "multiclass":
        scores = clamped.log()
        softened = (beta * scores).softmax(dim=1)
        mean = (softened * scores).sum(dim=1)
        chosen = scores.gather(1, torch.where(valid, target, 0).long().unsqueeze(1))[:, 0]
        first = mean - chosen
        second = (softened * scores.square()).sum(dim=1) - mean.square()
    else:
        scores = torch.logit(clamped if mode == "multilabel" else clamped[:, 0])
        softened = torch.sigmoid(beta * scores)
        first = (softened - (target == 1).double()) * scores
        second = softened * (1 - softened) * scores.square()
    return float((first * valid).sum()), float((second * valid).sum())
