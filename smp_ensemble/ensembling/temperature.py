"""Temperature of probabilities: softens or sharpens them, and never changes which class is the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode

EPSILON = 1e-7


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
