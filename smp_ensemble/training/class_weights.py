"""Weights of classes in the loss, from how many pixels the training data has of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset

LARGEST = 100.0
"""A class that hardly occurs would otherwise drown all others."""


def class_weights(spec: str, data: SegmentationDataset) -> tuple[float, ...] | None:
    """One weight for each of the K output channels, for cross-entropy; None: all alike.

    In multiclass mode they weigh classes, with a mean of 1 over the data's pixels. In binary and multilabel mode they
    weigh the foreground against the background of the same channel (torch's `pos_weight`). None exceeds 100.

    Args:
        spec: `none`; `balanced`: inverse to the pixels of each class; `sqrt`: the root of that; or K numbers separated
            by commas.
        data: The training images.

    Raises:
        ConfigError: Another word, another number of numbers, or one that is not above 0.
    """
    spec = spec.strip().lower()
    if spec in {"", "none"}:
        return None
    outputs = data.task.num_outputs
    if spec not in {"balanced", "sqrt"}:
        return _given(spec, outputs)
    counts = data.class_pixels.astype(np.float64)
    if data.task.mode == "multiclass":
        weights = counts.sum() / (len(counts) * np.maximum(counts, 1.0))
    else:
        positive = counts[-outputs:]  # in binary mode the counts are background and foreground
        pixels = counts.sum() if data.task.mode == "binary" else float(sum(scan.pixels for scan in data.scans))
        weights = (pixels - positive) / np.maximum(positive, 1.0)
    if spec == "sqrt":
        weights = np.sqrt(weights)
    if data.task.mode == "multiclass":
        weights *= counts.sum() / (weights * counts).sum()
    return tuple(np.minimum(weights, LARGEST).tolist())


def _given(spec: str, outputs: int) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in spec.split(","))
    except ValueError:
        weights = ()
    if len(weights) != outputs or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ConfigError(
            f"class-weights: expected none, balanced, sqrt, or {outputs} numbers above 0 separated by commas, got "
            f"'{spec}'"
        )
    return weights
