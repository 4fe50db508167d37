"""smp's losses, each with ignored pixels left out exactly: adapters for those that smp computes otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from segmentation_models_pytorch import losses as smp
from torch import Tensor, nn

from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable

    from smp_ensemble.typing import Mode


def _flatten(logits: Tensor, target: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The V valid pixels as one image: `(1, K, 1, V)` and `(1, 1, V)`; in multilabel mode V valid entries and K = 1.

    smp's Lovasz loss reads `(1, K, V)` as K rows of one sigmoid output: the image must have four dimensions.
    """
    valid = target != IGNORE_INDEX
    if mode == "multilabel":
        return logits[valid].view(1, 1, 1, -1), target[valid].view(1, 1, 1, -1)
    return logits.movedim(1, -1)[valid].T[None, :, None], target[valid].view(1, 1, -1)


class Tversky(nn.Module):
    """smp's takes the power of 0 where no class is present, whose gradient is NaN for gamma below 1."""

    def __init__(self, mode: Mode, gamma: float = 1.0, **parameters: Any) -> None:
        super().__init__()
        self.gamma = gamma
        self.loss = smp.TverskyLoss(mode, ignore_index=IGNORE_INDEX, **parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss over valid pixels."""
        loss: Tensor = self.loss(logits, target)
        if self.gamma == 1.0:
            return loss
        positive = loss > 0
        return torch.where(positive, torch.where(positive, loss, 1.0) ** self.gamma, 0.0 * loss)


class Focal(nn.Module):
    """smp's is NaN without valid pixels, and cannot ignore in multilabel mode, where each class ignores its own."""

    def __init__(self, mode: Mode, class_weights: list[float] | None = None, **parameters: Any) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.loss = smp.FocalLoss(mode, class_weights=class_weights, **parameters)
        self.channel_loss = smp.FocalLoss("binary", **parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss over valid pixels."""
        if self.mode != "multilabel":
            logits, target = _flatten(logits, target, self.mode)
            return self.loss(logits, target) if target.numel() else logits.sum()
        losses, weights = [logits.sum() * 0.0], [0.0]
        given = self.loss.class_weights
        for channel in range(logits.shape[1]):
            chosen = target[:, channel] != IGNORE_INDEX
            entries = logits[:, channel][chosen]
            if entries.numel():
                weight = 1.0 if given is None else float(given[channel])
                losses.append(weight * self.channel_loss(entries, target[:, channel][chosen]))
                weights.append(weight)
        return torch.stack(losses).sum() / (sum(weights) or 1.0)


class Lovasz(nn.Module):
    """smp's returns an empty tensor without valid pixels, and `per_image` counts images without any as perfect."""

    def __init__(self, mode: Mode, per_image: bool = False) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.per_image = per_image
        self.loss = smp.LovaszLoss(mode)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss over valid pixels."""
        size = 1 if self.per_image else len(logits)
        images = zip(torch.split(logits, size), torch.split(target, size), strict=True)
        flat = [_flatten(image, mask, self.mode) for image, mask in images]
        losses = [self.loss(image, mask) for image, mask in flat if mask.numel()]
        return torch.stack(losses).mean() if losses else logits.sum() * 0.0


class MCC(nn.Module):
    """smp's takes probabilities and has no ignored pixels."""

    def __init__(self, mode: Mode, **parameters: Any) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.loss = smp.MCCLoss(**parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss over valid pixels."""
        logits, target = _flatten(logits, target, self.mode)
        return self.loss(logits.sigmoid(), target) if target.numel() else logits.sum()


class CrossEntropy(nn.Module):
    """smp's divides by all pixels, ignored ones too: its sum, divided by the number of valid ones.

    With class weights, which smp's does not know, it is torch's: the mean is over the weights of the valid pixels.
    """

    def __init__(
        self,
        mode: Mode,
        num_outputs: int,
        reduction: str = "mean",
        class_weights: list[float] | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.mode: Mode = mode
        self.mean = reduction == "mean"
        self.weighted = class_weights is not None
        self.loss: nn.Module
        if class_weights is not None:
            self.loss = nn.CrossEntropyLoss(
                torch.tensor(class_weights, dtype=torch.float32),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                label_smoothing=float(parameters.get("smooth_factor") or 0.0),
            )
        elif mode == "multiclass":
            parameters = {"smooth_factor": 0.0, **parameters}
            self.loss = smp.SoftCrossEntropyLoss(reduction="sum", ignore_index=IGNORE_INDEX, **parameters)
        else:
            for name in {"weight", "pos_weight"} & parameters.keys():
                value = torch.as_tensor(parameters[name], dtype=torch.float32)
                parameters[name] = value.expand(num_outputs).clone().view(-1, 1, 1)
            self.loss = smp.SoftBCEWithLogitsLoss(reduction="sum", ignore_index=IGNORE_INDEX, **parameters)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss over valid pixels."""
        count = (target != IGNORE_INDEX).sum().clamp_min(1)
        if self.mode == "binary":
            target = target.unsqueeze(1)
        loss: Tensor = self.loss(logits, target if self.mode == "multiclass" else target.to(logits.dtype))
        if not self.mean:
            return loss
        return loss / (self._weight_of(target) if self.weighted else count)

    def _weight_of(self, target: Tensor) -> Tensor:
        """The sum of the weights of the valid pixels."""
        weights: Any = self.loss.weight
        valid = target != IGNORE_INDEX
        total: Tensor = torch.where(valid, weights[torch.where(valid, target, 0)], 0.0).sum()
        return torch.where(total > 0, total, 1.0)


def cross_entropy_parameters(
    reduction: str = "mean", smooth_factor: float | None = None, class_weights: list[float] | None = None
) -> None:
    """The parameters of `ce`: those of smp's, and class weights."""


def region(loss: type[nn.Module]) -> Callable[..., nn.Module]:
    """What makes one of smp's region losses, which ignore pixels by themselves."""

    def make(mode: Mode, **parameters: Any) -> nn.Module:
        return loss(mode, ignore_index=IGNORE_INDEX, **parameters)

    return make
