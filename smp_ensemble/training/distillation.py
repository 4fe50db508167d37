"""Distillation: one network learns what a teacher says about each pixel, beside what the masks say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.training.module import SegmentationModule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smp_ensemble.data.soft_targets import SoftTargets
    from smp_ensemble.training.module import Batch
    from smp_ensemble.typing import Mode

LEAST_PROBABILITY = 1e-6
"""What logarithms see at least: a teacher that is sure of itself asks for log-odds of 13.8 and not of infinity."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about the training images, and how much it counts.

    Attributes:
        soft_targets: Its probabilities for each training image.
        alpha: Share of the masks in the loss, 0 to 1; the teacher has the rest.
        soften: Temperature T at which teacher and student are compared; 1: as they are.
        seen: Digests of the images that the teacher was trained on, for the leak guard; None: unknown.
        params: Further params of the training and its snapshots.

    Raises:
        ConfigError: Out of range.
    """

    soft_targets: SoftTargets
    alpha: float = 0.5
    soften: float = 1.0
    seen: frozenset[str] | None = frozenset()
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shares(self.alpha, self.soften)


def check_shares(alpha: float, soften: float) -> None:
    """Refuses shares and temperatures that mean nothing.

    Raises:
        ConfigError: Out of range.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"expected alpha, the share of the masks in the loss, from 0 to 1, got {alpha}")
    if not 0 < soften < math.inf:
        raise ConfigError(f"expected soften, a temperature, as a finite number above 0, got {soften}")


class DistillationLoss(nn.Module):
    """How far a student is from its teacher: the mean Kullback-Leibler divergence of a pixel, in nats.

    In multiclass mode it is that of the two distributions over classes; in binary and multilabel mode that of each
    output's Bernoulli distribution, averaged over the outputs, too. Both are softened by a temperature T first, the
    teacher's probabilities by way of their logarithms or log-odds, and the divergence is multiplied by T squared, so
    that its gradient keeps its size. The gradient is that of the cross-entropy with soft targets.

    Args:
        mode: What is predicted.
        soften: T.

    References:
        Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.

    Example:
        >>> loss = DistillationLoss("binary")
        >>> round(loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.75, torch.nan]]]])).item(), 4)
        0.1308
    """

    def __init__(self, mode: Mode, soften: float = 1.0) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.soften = soften

    def forward(self, logits: Tensor, soft: Tensor) -> Tensor:
        """The loss as a float32 scalar, computed in float32 under autocast, too; 0 where the teacher says nothing.

        Args:
            logits: Of the student, `(N, K, H, W)`.
            soft: Probabilities of the teacher, same shape; NaN where it says nothing.

        Raises:
            DataError: The shapes differ.
        """
        if logits.shape != soft.shape:
            raise DataError(f"expected soft targets of shape {tuple(logits.shape)}, came {tuple(soft.shape)}")
        with torch.autocast(logits.device.type, enabled=False):
            known = soft.isfinite()
            if self.mode == "multiclass":
                known = known.all(dim=1, keepdim=True)
            logits = torch.where(known, logits.float(), 0.0)
            soft = torch.where(known, soft.float(), 0.5).clamp(LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
            divergence = self._of_classes(logits, soft) if self.mode == "multiclass" else self._of_each(logits, soft)
            count = known.sum().clamp_min(1)
            return self.soften**2 * torch.where(known, divergence, 0.0).sum() / count

    def _of_classes(self, logits: Tensor, soft: Tensor) -> Tensor:
        wanted = (soft.log() / self.soften).log_softmax(dim=1)
        found = (logits / self.soften).log_softmax(dim=1)
        return (wanted.exp() * (wanted - found)).sum(dim=1, keepdim=True)

    def _of_each(self, logits: Tensor, soft: Tensor) -> Tensor:
        wanted, found = soft.logit() / self.soften, logits / self.soften
        share = wanted.sigmoid()
        inside = share * (F.logsigmoid(wanted) - F.logsigmoid(found))
        return inside + (1 - share) * (F.logsigmoid(-wanted) - F.logsigmoid(-found))


class DistillationModule(SegmentationModule):
    """A `SegmentationModule` that learns from soft targets in its batches, beside the masks.

    The training loss is `alpha * loss + (1 - alpha) * DistillationLoss`; with `alpha=1` it is the loss of the masks,
    and nothing else is computed. Validation is that of any other training.

    Args:
        *args: As for `SegmentationModule`.
        lesson: How much the teacher counts.
        **options: As for `SegmentationModule`.
    """

    def __init__(self, *args: Any, lesson: Lesson, **options: Any) -> None:
        super().__init__(*args, **options)
        self.alpha = lesson.alpha
        self.teacher_loss = DistillationLoss(self.task.mode, lesson.soften)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        logits = self(batch["image"])
        loss: Tensor = self.mixed_loss(logits, batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def mixed_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of logits `(N, K, H, W)` against a batch's masks and soft targets."""
        if self.alpha == 1:
            loss: Tensor = self.loss(logits, batch["mask"])
            return loss
        taught: Tensor = self.teacher_loss(logits, batch["soft"])
        return taught if self.alpha == 0 else self.alpha * self.loss(logits, batch["mask"]) + (1 - self.alpha) * taught
