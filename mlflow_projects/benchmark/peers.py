"""What others offer for the same: an eager loop over members with test-time views of ttach or pytorch-toolbelt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from smp_ensemble import Ensemble

Run: TypeAlias = Callable[[Tensor], Tensor]


class Probabilities(nn.Module):
    """A member as test-time augmentation takes it: raw images to probabilities."""

    def __init__(self, member: nn.Module, mode: str) -> None:
        super().__init__()
        self.member, self.mode = member, mode

    def forward(self, images: Tensor) -> Tensor:
        """Shape `(N, K, H, W)`, float32."""
        logits = self.member(images).float()
        return logits.softmax(dim=1) if self.mode == "multiclass" else logits.sigmoid()


def wrapped(ensemble: Ensemble, device: torch.device) -> list[Probabilities]:
    """Members of their own, so that nothing here profits from what others did to them."""
    return [Probabilities(copy.deepcopy(one), ensemble.mode).to(device).eval() for one in ensemble.members]


def loop(models: list[nn.Module], device: torch.device, dtype: torch.dtype | None = None) -> Run:
    """The mean over models, one after another."""

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        raw = images.to(device).float()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            total = torch.stack([model(raw).float() for model in models]).mean(dim=0)
        return total.cpu()

    return run


def with_ttach(ensemble: Ensemble, device: torch.device) -> tuple[str, Run]:
    """`ttach.SegmentationTTAWrapper` around each member, float32."""
    return "32-true", loop(_ttach(ensemble, device), device)


def with_ttach_in_bf16(ensemble: Ensemble, device: torch.device) -> tuple[str, Run]:
    """The same under autocast."""
    return "bf16-mixed", loop(_ttach(ensemble, device), device, torch.bfloat16)


def _ttach(ensemble: Ensemble, device: torch.device) -> list[nn.Module]:
    import ttach

    transforms = {"d4": ttach.aliases.d4_transform, "flips": ttach.aliases.flip_transform}.get("+".join(ensemble.views))
    if transforms is None:
        return list(wrapped(ensemble, device))
    return [ttach.SegmentationTTAWrapper(one, transforms(), "mean") for one in wrapped(ensemble, device)]


def with_toolbelt(ensemble: Ensemble, device: torch.device) -> tuple[str, Run]:
    """pytorch-toolbelt's `GeneralizedTTA`: all views of an image as one batch."""
    from pytorch_toolbelt.inference import tta

    if ensemble.views != ("d4",):
        return "32-true", loop(list(wrapped(ensemble, device)), device)
    models = [
        tta.GeneralizedTTA(one, tta.d4_image_augment, tta.d4_image_deaugment) for one in wrapped(ensemble, device)
    ]
    return "32-true", loop(models, device)


CONTESTANTS: dict[str, Callable[[Ensemble, torch.device], tuple[str, Run]]] = {
    "eager loop with ttach, fp32": with_ttach,
    "eager loop with ttach, bf16 autocast": with_ttach_in_bf16,
    "eager loop with pytorch-toolbelt, fp32": with_toolbelt,
}
