"""Which batch-norm statistics a network keeps: those with the least log-loss on validation data."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from smp_ensemble.architectures import output_stride
from smp_ensemble.data.loading import evaluation_loader
from smp_ensemble.training.batch_norm import has_batch_norm, restore_statistics, running_statistics
from smp_ensemble.training.modes import predicting
from smp_ensemble.training.refreshing import make_refresh
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.data.transforms import TrainTransform
    from smp_ensemble.typing import Mode

logger = logging.getLogger(__name__)

SHARPNESS = tuple(2 ** (step / 3) for step in range(-6, 7))
"""Inverse temperatures at which the log-loss is measured, from 1/4 to 4: what a temperature mends does not count."""


def keep_best_statistics(
    network: nn.Module,
    *,
    sources: Mapping[str, Callable[[nn.Module], object] | None],
    judge: Callable[[nn.Module], float],
) -> str | None:
    """Measures batch norm in several ways, and leaves the statistics that the judge likes best in the network.

    Args:
        network: Changed in place, in its batch-norm statistics alone.
        sources: Ways by name, each of which changes the statistics from what they are now; None: leaves them.
        judge: Loss of a network; the least one wins, the first of several equals; no number never does.

    Returns:
        The name of the way; None for a network without batch norm.
    """
    if not has_batch_norm(network):
        return None
    before = running_statistics(network)
    found: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, measure in sources.items():
        restore_statistics(network, before)
        if measure is not None:
            measure(network)
        found[name] = judge(network), running_statistics(network)
    best = min(found, key=lambda name: math.inf if math.isnan(found[name][0]) else found[name][0])
    restore_statistics(network, found[best][1])
    losses = ", ".join(f"{name} {loss:.4f}" for name, (loss, _) in found.items())
    logger.info("batch norm of %s: validation log-loss %s", best, losses)
    return best


def make_measure(
    source: str,
    *,
    train_data: SegmentationDataset,
    val_data: SegmentationDataset,
    transform: TrainTransform,
    running: bool = False,
    seed: int = 0,
    label: str = "batch norm",
    **shared: Any,
) -> Callable[[nn.Module], str | None]:
    """How batch norm is measured, as a function of the network alone; it names what was chosen, if anything was.

    Args:
        source: `images` or `crops`; all else means the better of them on validation data.
        train_data: What it is measured on.
        val_data: What judges.
        transform: Cuts the crops.
        running: Whether the statistics that are there may stay.
        seed: Of the crops.
        label: Of the progress bar.
        shared: `normalization`, `batch_size`, `precision` and `shard`, as `validation_loss` takes them.
    """
    measured = {
        name: make_refresh(name, data=train_data, transform=transform, seed=seed, label=label, **shared)
        for name in ("images", "crops")
    }
    if source in measured:
        return measured[source]
    sources = {**({"running": None} if running else {}), **measured}
    return partial(keep_best_statistics, sources=sources, judge=partial(validation_loss, data=val_data, **shared))


def validation_loss(
    network: nn.Module,
    *,
    data: SegmentationDataset,
    normalization: Normalization,
    batch_size: int,
    precision: str,
    shard: tuple[int, int] = (0, 1),
) -> float:
    """Mean log-loss over all valid pixels, in nats, at the best of a few temperatures; leaves the mode as it was.

    Args:
        network: Gives logits; runs on its own device.
        data: What to score on, whole.
        normalization: What images go through first.
        batch_size: Images at once.
        precision: Lightning's words.
        shard: This process's rank and the number of processes; all get the loss over all images.
    """
    loader = evaluation_loader(
        data, batch_size=batch_size, workers=0, divisor=output_stride([network]), shard=shard, never_empty=True
    )
    with predicting(network, precision) as device:
        # The last sum counts pixels. MPS has no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(len(SHARPNESS) + 1, dtype=wide, device=device)
        for batch in loader:
            mask = batch["mask"].to(device)
            logits = network(normalization(batch["image"].to(device))).float()
            losses = [_log_loss(sharpness * logits, mask, data.task.mode) for sharpness in SHARPNESS]
            sums += torch.stack([*losses, (mask != IGNORE_INDEX).sum().float()]).to(sums)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[:-1].min() / sums[-1].clamp_min(1))


def _log_loss(logits: Tensor, mask: Tensor, mode: Mode) -> Tensor:
    """Sum over valid pixels; in multilabel mode, over their channels."""
    if mode == "multiclass":
        return F.cross_entropy(logits, mask, ignore_index=IGNORE_INDEX, reduction="sum")
    target = mask.unsqueeze(1) if mode == "binary" else mask
    valid = target != IGNORE_INDEX
    losses = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction="none")
    return losses.where(valid, 0).sum()
