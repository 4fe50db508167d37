"""Where a training starts: the network with new or trained weights, its normalisation, and what it has seen before."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.architectures import architecture_of, create_network, network_config
from smp_ensemble.data.normalization import make_normalization
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.spec import ENSEMBLE_FILE
from smp_ensemble.evaluation.guards import check_leaks
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.workflows.checkpoints import find_checkpoints, load_checkpoint
from smp_ensemble.workflows.loading import load_snapshot

if TYPE_CHECKING:
    from torch import nn

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import Task
    from smp_ensemble.workflows.options import TrainOptions

TRACKED = ("models:/", "runs:/")
"""How the address of a tracked snapshot begins."""

_NOT_OPTIONS = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Trained weights that trainings start from; they copy them.

    Attributes:
        network: With the weights.
        normalization: What the network was trained with; None where nobody knows, and the options say.
        trained_on: Digests of the images that it was trained on; None: unknown.
        params: What it says about itself: `arch`, `encoder_name`, ...
    """

    network: nn.Module
    normalization: Normalization | None
    trained_on: frozenset[str] | None
    params: dict[str, Any]


def find_start(options: TrainOptions, splits: DataSplits) -> Start | None:
    """The trained weights that the options name, or None where training starts from new ones.

    A tracked snapshot brings its network and its normalisation; a file brings weights for the network of the options.

    Raises:
        ConfigError: There is nothing of that name, or another option contradicts it.
        NetworkError: It does not fit the data, or the architecture.
        LeakError: It was trained on validation or test images.
    """
    if not options.init:
        return None
    if options.encoder_weights is not None:
        raise ConfigError(
            f"init={options.init} brings the encoder's weights too: leave encoder-weights={options.encoder_weights} out"
        )
    member, normalization = _load(options, splits)
    return start_from(member, normalization, options, splits)


def start_from(member: Member, normalization: Normalization | None, options: TrainOptions, splits: DataSplits) -> Start:
    """Trained weights to start from, which fit the options and have seen nothing that is scored.

    Args:
        member: With its lineage.
        normalization: What it was trained with; None where nobody knows.
        options: `init` is how errors call it.
        splits: The data.

    Raises:
        ConfigError: Another option contradicts it.
        LeakError: It was trained on validation or test images.
    """
    found = describe_network(member.network)
    if normalization is not None:
        found["normalization"] = normalization.kind
    _check_agrees(options, found)
    for what, data in (("validation", splits.val), ("test", splits.test)):
        if data is not None:
            check_leaks([member], data, what)
    logger.info("training starts from the weights of %s; the optimizer has no momentum from there", options.init)
    return Start(member.network, normalization, member.training_images, {**found, "encoder_weights": None})


def _load(options: TrainOptions, splits: DataSplits) -> tuple[Member, Normalization | None]:
    """The network with its lineage; and its normalisation, where that is known."""
    task = splits.task
    if options.init.startswith(TRACKED) or (Path(options.init) / ENSEMBLE_FILE).is_file():
        member = load_snapshot(options.init, task)
        known = member.training_images
        return Member(member.network, member.normalization, source=options.init, training_images=known), (
            member.normalization
        )
    files = find_checkpoints(options.init)
    if len(files) != 1:
        raise ConfigError(f"init={options.init} names {len(files)} checkpoints, expected one: name it alone")
    network = load_checkpoint(
        files[0],
        task,
        arch=options.arch,
        encoder_name=options.encoder_name,
        model_options=options.model_options,
    )
    return Member(network, normalization_for(options.normalization, splits.train), source=options.init), None


def describe_network(network: nn.Module) -> dict[str, Any]:
    """`arch`, `encoder_name` and `model_options` of a network, in the words of the options that build it.

    Raises:
        NetworkError: Nobody could build it from options.
    """
    config = network_config(network)
    options = {name: value for name, value in config.items() if name not in _NOT_OPTIONS and not name.startswith("_")}
    if "_dropout" in config:
        options["dropout"] = config["_dropout"]
    return {
        "arch": architecture_of(network),
        "encoder_name": str(config.get("encoder_name", "")),
        "model_options": options,
    }


def _check_agrees(options: TrainOptions, found: dict[str, Any]) -> None:
    """Refuses options that say something else than the weights do; defaults say nothing."""
    defaults = {known.name: known.default for known in fields(options)}
    for name in ("arch", "encoder_name", "normalization"):
        asked = getattr(options, name)
        if name in found and asked not in (defaults[name], found[name]):
            raise ConfigError(
                f"{name.replace('_', '-')}={asked}, but init={options.init} has {found[name]}: leave it out"
            )
    for name, asked in options.model_options.items():
        if found["model_options"].get(name, asked) != asked:
            raise ConfigError(
                f"model-options has {name}={asked}, but init={options.init} has {found['model_options'][name]}: "
                "leave it out"
            )


def new_network(options: TrainOptions, task: Task, start: Start | None) -> nn.Module:
    """A network of its own for one training, in training mode: trained weights, or new ones that follow the seed.

    Raises:
        ConfigError: Unknown architecture, encoder or model option.
        NetworkError: The options add an activation or an auxiliary head.
    """
    torch.manual_seed(options.seed)
    if start is not None:
        return copy.deepcopy(start.network).train()
    return create_network(
        options.arch,
        encoder_name=options.encoder_name,
        encoder_weights=options.encoder_weights,
        in_channels=task.in_channels,
        num_outputs=task.num_outputs,
        model_options=options.model_options,
    )


def normalization_for(kind: str, data: SegmentationDataset) -> Normalization:
    """A normalisation by name, from the training data's statistics."""
    found = data.statistics()
    return make_normalization(
        kind,
        data.task.in_channels,
        mean=found.mean.tolist(),
        std=found.std.tolist(),
        minimum=found.minimum.tolist(),
        maximum=found.maximum.tolist(),
    )
