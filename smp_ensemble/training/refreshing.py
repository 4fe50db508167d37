"""Batch norm of kept weights: from whole training images, as prediction sees them, or from crops, as training does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from smp_ensemble.architectures import output_stride
from smp_ensemble.data.loading import epochs_loader, evaluation_loader
from smp_ensemble.precision import autocast_dtype
from smp_ensemble.training.batch_norm import has_batch_norm, refresh_batch_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.data.transforms import TrainTransform


SOURCES = ("auto", "images", "crops", "best")
"""What batch norm may be measured on; `best`: what gives the least log-loss on validation data (`choosing`); `auto`:
that for averages of weights, while all else keeps its running statistics."""

CROP_EPOCHS = 2
"""Passes over the training images, each with other crops: their statistics vary more than those of whole images."""


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


def refresh_on_crops(
    network: nn.Module,
    *,
    normalization: Normalization,
    data: SegmentationDataset,
    transform: TrainTransform,
    batch_size: int,
    seed: int,
    precision: str,
    label: str = "batch norm",
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Measures the batch-norm statistics of `network` anew on augmented crops, as training sees them.

    They vary in colour and scale, so the network bears such changes in what it predicts better than with the statistics
    of whole, clean images. Where images are much larger than crops, padded borders weigh more than they do in
    prediction.

    Args:
        network: Changed in place, on its own device; without batch norm nothing is read.
        normalization: What images go through first.
        data: The training images.
        transform: Cuts the crops.
        batch_size: Crops at once.
        seed: Of order and augmentation.
        precision: Lightning's words.
        label: Of the progress bar.
        shard: This process's rank and the number of processes: each reads whole batches, and all get the statistics
            that one process would find.
    """
    if not has_batch_norm(network):
        return
    loader = epochs_loader(data, transform, batch_size=batch_size, seed=seed, epochs=CROP_EPOCHS, shard=shard)
    batches = tqdm(loader, desc=label, unit="batch", leave=False, disable=True if shard[0] else None)
    refresh_on_batches(network, batches, normalization=normalization, precision=precision)


def make_refresh(
    source: str,
    *,
    normalization: Normalization,
    data: SegmentationDataset,
    transform: TrainTransform,
    batch_size: int,
    precision: str,
    seed: int = 0,
    label: str = "batch norm",
    shard: tuple[int, int] = (0, 1),
) -> Callable[[nn.Module], None]:
    """One of the two above, as a function of the network alone.

    Args:
        source: `crops`; all else means images.
        normalization: As above.
        data: As above.
        transform: As above.
        batch_size: Images or crops at once.
        precision: As above.
        seed: As above.
        label: As above.
        shard: As above.
    """
    shared: dict[str, Any] = {
        "normalization": normalization, "data": data, "precision": precision, "label": label, "shard": shard,
    }  # fmt: skip
    if source == "crops":
        return partial(refresh_on_crops, **shared, transform=transform, batch_size=batch_size, seed=seed)
    return partial(refresh_on_images, **shared, batch_size=batch_size)


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
