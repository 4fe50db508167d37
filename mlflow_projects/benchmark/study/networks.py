"""Networks of a study: new ones, and twins of trained ones with batch norm measured anew."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.training.refreshing import make_refresh

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.training.fit_options import FitOptions
    from study.plan import Study


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

    With `crops`, on augmented crops as the training saw them.
    """
    device = choose_device(setting.accelerator)
    normalization = imagenet(splits.task.in_channels).to(device)
    twin = copy.deepcopy(network)
    twin.load_state_dict(dict(weights))
    refresh = make_refresh(
        "crops" if crops else "images",
        normalization=normalization,
        data=splits.train,
        transform=TrainTransform(options.crop_size, fill=normalization.raw_mean(), augment=options.augment),
        batch_size=options.batch_size,
        seed=options.seed,
        precision=resolve_precision(setting.precision, device),
    )
    refresh(twin.to(device).eval())
    return {name: one.detach().cpu() for name, one in twin.state_dict().items()}
