"""Batch norm of averaged weights, from the training images as validation and prediction see them: whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from smp_ensemble.architectures import output_stride
from smp_ensemble.data.loading import evaluation_loader
from smp_ensemble.precision import autocast_dtype
from smp_ensemble.training.batch_norm import has_batch_norm, refresh_batch_norm

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.normalization import Normalization


def refresh_on_images(
    network: nn.Module,
    *,
    normalization: Normalization,
    data: SegmentationDataset,
    batch_size: int,
    precision: str,
    label: str = "batch norm",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Measures the batch-norm statistics of `network` anew on whole images, in the number format of prediction.

    In small crops much of what a deep layer sees lies near the padded border. Where whole images are predicted, their
    statistics fit better than those of crops, which the running statistics of a training are.

    Args:
        network: Changed in place, on its own device; without batch norm nothing is read.
        normalization: What images go through first.
        data: The training images.
        batch_size: Images at once.
        precision: Lightning's words.
        label: Of the progress bar.
        shard: This process's rank and the number of processes: each reads whole batches, and all get the statistics
            that one process would find.
    """
    if not has_batch_norm(network):
        return
    whole = evaluation_loader(data, batch_size=batch_size, workers=0, divisor=output_stride([network]), shard=shard)
    batches = tqdm(whole, desc=label, unit="batch", leave=False, disable=True if shard[0] else None)
    refresh_on_batches(network, batches, normalization=normalization, precision=precision)


def refresh_on_batches(
    network: nn.Module, batches: Iterable[Any], *, normalization: Normalization, precision: str
) -> None:
    """Measures the batch-norm statistics of `network` anew on any batches of raw images, in a number format.

    Args:
        network: Changed in place, on its own device.
        batches: As `refresh_batch_norm` takes them.
        normalization: What images go through first.
        precision: Lightning's words.

    Raises:
        ConfigError: There is no batch, or one has no form that is known.
    """
    dtype = autocast_dtype(precision)
    device = next(network.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        refresh_batch_norm(nn.Sequential(normalization, network), batches)
