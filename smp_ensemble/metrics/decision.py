"""From probabilities to decisions, in one place; without torchmetrics, which a served model does not need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode


def decide(probabilities: Tensor, mode: Mode, threshold: float = 0.5) -> Tensor:
    """Hard decisions: the most likely class in multiclass mode, `p >= threshold` otherwise.

    Args:
        probabilities: Shape `(N, K, H, W)`.
        mode: What is predicted.
        threshold: From which probability on a pixel is foreground; nothing to multiclass mode.

    Returns:
        int64, shape `(N, H, W)`; `(N, K, H, W)` with zeros and ones in multilabel mode.

    Example:
        >>> decide(torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3), "binary").tolist()
        [[[0, 1, 1]]]
    """
    if mode == "multiclass":
        return probabilities.max(dim=1).indices  # argmax takes ten times as long on the CPU
    decision = (probabilities >= threshold).long()
    return decision[:, 0] if mode == "binary" else decision


def certainty(probabilities: Tensor, decision: Tensor, mode: Mode) -> Tensor:
    """The probability of what was decided.

    Args:
        probabilities: Shape `(N, K, H, W)`.
        decision: As `decide` gives it, at any threshold.
        mode: What is predicted.

    Returns:
        Shape `(N, H, W)`; `(N, K, H, W)` in multilabel mode.

    Example:
        >>> p = torch.tensor([0.2, 0.4, 0.9]).view(1, 1, 1, 3)
        >>> [round(float(value), 1) for value in certainty(p, decide(p, "binary", 0.3), "binary").flatten()]
        [0.8, 0.4, 0.9]
    """
    if mode == "multiclass":
        return probabilities.amax(dim=1)
    foreground = probabilities[:, 0] if mode == "binary" else probabilities
    return torch.where(decision == 1, foreground, 1 - foreground)
