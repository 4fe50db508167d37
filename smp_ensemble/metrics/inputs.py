"""What every score checks before it counts: shapes, probabilities in 0..1, class ids in range."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode

_ROUNDING = 1e-3
"""How far a probability may leave 0..1: weighted means in half precision do so by rounding."""


def check_target(target: Tensor, num_classes: int) -> Tensor:
    """Which entries of `target` count: True where the pixel is not ignored.

    Args:
        target: Class ids `0..num_classes-1`, or 255 where ignored; integers of any shape.
        num_classes: How many ids there are; 2 for the zeros and ones of binary and multilabel masks.

    Raises:
        DataError: The dtype is no integer, or an id is out of range.
    """
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise DataError(f"expected integer class ids in the target, came {target.dtype}: convert it with target.long()")
    valid = target != IGNORE_INDEX
    wrong = valid & ((target < 0) | (target >= num_classes))
    if bool(wrong.any()):
        raise DataError(
            f"expected class ids 0..{num_classes - 1} or {IGNORE_INDEX} (ignored) in the target, "
            f"came {int(target[wrong][0])}: check the class names against the masks"
        )
    return valid


def check_probabilities(probabilities: Tensor, target: Tensor, mode: Mode, num_outputs: int) -> Tensor:
    """The probabilities in float32 (float64 stays), clamped to 0..1, once their shape and range are right.

    Args:
        probabilities: Shape `(N, K, H, W)`.
        target: Shape `(N, H, W)`; `(N, K, H, W)` in multilabel mode.
        mode: What is predicted.
        num_outputs: K, the number of output channels.

    Raises:
        DataError: Shapes do not fit, or values are not probabilities (logits, NaN).
    """
    came = tuple(probabilities.shape)
    if probabilities.ndim != 4 or came[1] != num_outputs:
        raise DataError(f"expected probabilities of shape (N, {num_outputs}, H, W), came {came}: check the classes")
    expected = came if mode == "multilabel" else (came[0], *came[2:])
    if tuple(target.shape) != expected:
        raise DataError(f"expected a {mode} target of shape {expected}, came {tuple(target.shape)}")
    if not probabilities.is_floating_point():
        raise DataError(f"expected probabilities in floating point, came {probabilities.dtype}: pass no decisions")
    probabilities = probabilities.detach()
    if probabilities.dtype != torch.float64:
        probabilities = probabilities.float()
    if probabilities.numel() == 0:
        return probabilities
    low, high = (float(bound) for bound in probabilities.aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        remedy = "lower the learning rate, it diverged" if math.isnan(low) else "apply sigmoid or softmax to logits"
        raise DataError(f"expected probabilities in 0..1, came {low:.4g}..{high:.4g}: {remedy}")
    return probabilities if low >= 0 and high <= 1 else probabilities.clamp(0.0, 1.0)
