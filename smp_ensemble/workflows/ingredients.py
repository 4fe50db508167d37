"""Ingredients of a soup: tracked snapshots whose weights may be averaged and scored on this data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.architectures import network_config
from smp_ensemble.evaluation.guards import check_leaks
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.tracking.candidates import find_candidates
from smp_ensemble.workflows.loading import load_snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.options import SoupOptions

SOUP = "soup"
"""What a soup's param `trainer` says."""


@dataclass(frozen=True)
class Ingredient:
    """A snapshot that may go into a soup; no weights.

    Attributes:
        snapshot: Where it is tracked.
        training_images: Digests of the images that it was trained on; None: unknown.
        encoder: SHA-256 of the encoder's weights and statistics; None: it has none that smp could freeze.
    """

    snapshot: Snapshot
    training_images: frozenset[str] | None
    encoder: str | None


def share_encoder(ingredients: Sequence[Ingredient]) -> bool:
    """Whether all have one encoder, as after training with a frozen one: then its statistics fit the average too."""
    return ingredients[0].encoder is not None and len({one.encoder for one in ingredients}) == 1


def find_ingredients(options: SoupOptions, splits: DataSplits) -> list[Ingredient]:
    """The best snapshots that the options find; earlier soups are among them only if somebody asks for them.

    Each is loaded once, so that whatever does not fit is known before anything is computed.

    Raises:
        ConfigError: Fewer than two.
        NothingFoundError: None.
        LeakError: One was trained on validation or test images.
        NetworkError: They differ in architecture or normalisation, or do not fit the data.
    """
    asked = bool(options.where.strip() or options.pick.strip())
    found = find_candidates(
        where=options.where,
        pick=options.pick,
        experiment=options.experiment,
        metric=options.metric,
        dataset_digest=splits.val.digest,
    )
    snapshots = [one for one in found if asked or one.params.get("trainer") != SOUP][: options.max_members]
    if len(snapshots) < 2:
        raise ConfigError(
            f"expected at least two snapshots to average, found {len(snapshots)}"
            + (f" ({snapshots[0].uri})" if snapshots else "")
            + ": loosen where, pick more, or raise max-members; smp-ensemble snapshots lists what is tracked"
        )
    ingredients = []
    first: dict[str, dict[str, Any]] = {}
    for snapshot in snapshots:
        design, ingredient = _inspect(snapshot, splits)
        ingredients.append(ingredient)
        first = first or design
        _check_agree(snapshots[0].uri, first, snapshot.uri, design)
    return ingredients


def _inspect(snapshot: Snapshot, splits: DataSplits) -> tuple[dict[str, dict[str, Any]], Ingredient]:
    """What must agree between ingredients, and what is known of this one; its weights are let go."""
    member = load_snapshot(snapshot.uri, splits.task)
    for what, data in (("validation", splits.val), ("test", splits.test)):
        if data is not None:
            check_leaks([member], data, what)
    design = {"architecture": network_config(member.network), "normalization": member.normalization.to_dict()}
    return design, Ingredient(snapshot, member.training_images, _encoder_digest(member.network))


def _encoder_digest(network: nn.Module) -> str | None:
    encoder = getattr(network, "encoder", None)
    if encoder is None or not hasattr(network, "freeze_encoder"):
        return None
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point():
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_agree(first_uri: str, first: dict[str, dict[str, Any]], uri: str, design: dict[str, dict[str, Any]]) -> None:
    for what, expected in first.items():
        found = design[what]
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise NetworkError(
                    f"only snapshots of one {what} average: {first_uri} has {name.strip('_')}={expected.get(name)}, "
                    f"{uri} has {found.get(name)}: choose with where, such as \"params.arch = 'unet' and "
                    "params.encoder_name = 'resnet18'\", or with pick"
                )
