"""Previews: masks of the same few validation images, predicted by the network as it stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.architectures import output_stride
from smp_ensemble.data.loading import evaluation_loader
from smp_ensemble.training.modes import predicting

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import nn

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.normalization import Normalization

PREVIEW_IMAGES = 4


def predict_previews(
    network: nn.Module, *, data: SegmentationDataset, normalization: Normalization, precision: str
) -> Sequence[npt.NDArray[np.uint8]]:
    """Masks of the first few validation images, from the network as it stands; leaves its mode as it was.

    Returns:
        One uint8 mask for each image, `(H, W)` or, multilabel, `(K, H, W)`.
    """
    stride = output_stride([network])
    masks = []
    with predicting(network, precision) as device:
        for batch in evaluation_loader(data.subset(preview_indices(data)), batch_size=1, workers=0, divisor=stride):
            logits = network(normalization(batch["image"].to(device)))[0].float()
            mask = logits.argmax(0) if data.task.mode == "multiclass" else logits >= 0
            masks.append(mask.squeeze(0).to(torch.uint8).cpu().numpy())
    sizes = [data.read(index)[0].shape[:2] for index in preview_indices(data)]
    return [mask[..., :height, :width] for mask, (height, width) in zip(masks, sizes, strict=True)]


def preview_indices(data: SegmentationDataset) -> list[int]:
    """The few images that previews show: evenly spread over those that hold most classes; always the same ones."""
    held = data.class_presence.sum(axis=1)
    richest = np.flatnonzero(held == held.max())
    spread = np.linspace(0, len(richest) - 1, min(PREVIEW_IMAGES, len(richest))).round().astype(int)
    return [int(index) for index in richest[spread]]
