"""Ensembles of the smallest networks that see more than a pixel: traced in a blink, with every combiner and mode."""

from __future__ import annotations

import torch
from torch import nn

from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member

OUTPUTS = {"binary": 1, "multiclass": 3, "multilabel": 2}
VOTES = ("vote", "majority")
COMBINERS = ("mean", "weighted", "geometric", "stacking", *VOTES)


class Halving(nn.Module):
    """The smallest network that is not local: a convolution at half the resolution, and up again."""

    class encoder:  # noqa: N801 (the engine looks for its output_stride)
        output_stride = 2

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, outputs, 3, stride=2, padding=1)

    def forward(self, images):
        return nn.functional.interpolate(self.convolution(images), scale_factor=2.0, mode="bilinear")


def make_ensemble(mode: str, combiner: str = "mean", views: str = "none") -> Ensemble:
    """Two small networks with different normalisations, and all that can be in an ensemble."""
    torch.manual_seed(OUTPUTS[mode])
    outputs = OUTPUTS[mode]
    state = {"weight": 3 * torch.randn(2, outputs, outputs), "bias": torch.randn(outputs)}
    return Ensemble(
        [
            Member(Halving(outputs), imagenet()),
            Member(Halving(outputs), Normalization("per-image", [0.0] * 3, [1.0] * 3)),
        ],
        mode=mode,
        combiner=combiner,
        weights=[1, 2],
        views=views,
        temperature=1.0 if combiner in VOTES else 0.6,
        threshold=0.4,
        state=state if combiner == "stacking" else None,
        class_names=["a", "b", "c"][: max(2, outputs)],
    )
