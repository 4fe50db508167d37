"""Networks of a study: new ones, and twins of trained ones with batch norm measured anew."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.architectures import create_network
from smp_ensemble.data.loading import training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.training.refreshing import refresh_on_batches, refresh_on_images

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.training.fit import FitOptions
    from study.plan import Study

CROP_EPOCHS = 2
"""Epochs of augmented crops that batch norm is measured on, where it is not measured on whole images."""


@dataclass(frozen=True)
class Setting:
    """Where a cell runs.

    Attributes:
        accelerator: As for `smp-ensemble train`.
        precision: Lightning's words, or `auto`.
        scratch: Folder for weights that references need.
    """

    accelerator: str
    precision: str
    scratch: Path


def new_network(study: Study, splits: DataSplits) -> nn.Module:
    """The study's network for its data, from scratch."""
    task = splits.task
    return create_network(
        study.arch, encoder_name=study.encoder_name, in_channels=task.in_channels, num_outputs=task.num_outputs,
        model_options=study.model_options,
    )  # fmt: skip


def refreshed(
    weights: Mapping[str, Tensor],
    network: nn.Module,
    splits: DataSplits,
    setting: Setting,
    options: FitOptions,
    *,
    crops: bool = False,
) -> dict[str, Tensor]:
    """The same weights with batch norm measured anew on the whole training images, as averages have it.

    With `crops`, on two epochs of augmented crops as the training saw them.
    """
    device = choose_device(setting.accelerator)
    precision = resolve_precision(setting.precision, device)
    normalization = imagenet(splits.task.in_channels).to(device)
    twin = copy.deepcopy(network)
    twin.load_state_dict(dict(weights))
    twin.to(device).eval()
    if crops:
        transform = TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment=options.augment)
        batches = (
            batch
            for epoch in range(CROP_EPOCHS)
            for batch in training_loader(
                splits.train, transform, batch_size=options.batch_size, seed=options.seed, workers=0,
                epoch_of=lambda epoch=epoch: epoch,
            )
        )  # fmt: skip
        refresh_on_batches(twin, batches, normalization=normalization, precision=precision)
    else:
        refresh_on_images(
            twin, normalization=normalization, data=splits.train, batch_size=options.batch_size, precision=precision
        )
    return {name: one.detach().cpu() for name, one in twin.state_dict().items()}
