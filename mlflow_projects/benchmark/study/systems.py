"""Systems: what one training, or several, can be made into; each a weighted mean of networks, at its price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.ensembling.greedy import select_greedily
from smp_ensemble.ensembling.pool import CandidatePool
from smp_ensemble.ensembling.tally import Block, quantise
from smp_ensemble.typing import IGNORE_INDEX, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from smp_ensemble.typing import Task

MOST_MEMBERS = 5
CROSS_FITS = 5
AVERAGED = {"swa", "ema"}
"""Trainers whose snapshots are averages already, with batch norm measured anew."""

REPORTED = {"single": "last", "swa": "last", "ema": "last"}
"""What a trainer's method reports; the mean of all snapshots for every other."""


@dataclass(frozen=True)
class System:
    """A weighted mean of networks' probabilities.

    Attributes:
        name: `last`, `all`, `all refreshed`, `greedy`, `greedy refreshed`, `soup`, `soup crops`, `refreshed`, `crops`,
            `flips` or `member I`.
        members: Which networks, by their place.
        weights: Of each.
        views: Test-time views of each network.
    """

    name: str
    members: tuple[int, ...]
    weights: tuple[float, ...]
    views: int = 1

    @property
    def cost(self) -> int:
        """Forward passes for one image: prediction in units of one network."""
        return len(self.members) * self.views

    def combine(self, probabilities: list[Tensor]) -> Tensor:
        """Its probabilities, float16 `(N, K, H, W)`, from those of all networks."""
        if len(self.members) == 1:
            return probabilities[self.members[0]]
        total = probabilities[self.members[0]].float() * self.weights[0]
        for index, weight in zip(self.members[1:], self.weights[1:], strict=True):
            total += probabilities[index].float() * weight
        return (total / sum(self.weights)).half()


def systems_of(snapshots: int, extra: Mapping[str, int], again: Sequence[int] = ()) -> list[System]:
    """All systems of one training but the greedy ones, which need predictions.

    Args:
        snapshots: How many it left: networks 0, 1, ... in the order of their steps.
        extra: Places of further networks: `soup`, the average of all weights; `refreshed`, the last snapshot with its
            batch norm measured anew, which tells apart what averaging and what that measuring is worth; `crops` and
            `soup crops`, averages with batch norm measured on augmented crops and not on whole images; `flips`, the
            last snapshot over four flips.
        again: Places of all snapshots with their batch norm measured anew; `all refreshed` is their mean.
    """
    last = snapshots - 1
    found = [System("last", (last,), (1.0,))]
    if snapshots > 1:
        found.append(System("all", tuple(range(snapshots)), (1.0,) * snapshots))
        found += [System(f"member {index}", (index,), (1.0,)) for index in range(last)]
    if len(again) > 1:
        found.append(System("all refreshed", tuple(again), (1.0,) * len(again)))
    found += [System(name, (place,), (1.0,), views=4 if name == "flips" else 1) for name, place in extra.items()]
    return found


def reported_name(trainer: str, snapshots: int) -> str:
    """The system that a method reports unless something else is said."""
    return REPORTED.get(trainer, "all" if snapshots > 1 else "last")


def greedy_system(
    validation: Sequence[Tensor], truth: Tensor, task: Task, places: Sequence[int], name: str = "greedy"
) -> System:
    """Greedy selection with replacement among the networks at these places, by IoU on validation data."""
    labels = truth.cpu().numpy().reshape(-1)
    order = np.argsort(labels, kind="stable")
    outputs = task.num_outputs if task.mode == "multiclass" else 2
    counts = np.bincount(labels, minlength=IGNORE_INDEX + 1)[:outputs]
    order = order[: int(counts.sum())]
    candidates = [validation[place] for place in places]
    codes = np.stack(
        [
            quantise(one.cpu().float().numpy().transpose(1, 0, 2, 3).reshape(one.shape[1], -1)[:, order])
            for one in candidates
        ]
    )
    references = [Snapshot(f"network:/{place}", "", place) for place in places]
    pool = CandidatePool(references, task, "val_iou", [Block(codes, counts.tolist())])
    chosen = select_greedily(pool, MOST_MEMBERS)
    return System(name, tuple(one.step for one in chosen.members), tuple(chosen.weights))


def cross_fitted(
    validation: Sequence[Tensor], truth: Tensor, groups: Sequence[str], fit: Callable[[list[Tensor], Tensor], System]
) -> Tensor | None:
    """Validation probabilities of a system that is fitted on validation data: of each group, fitted on the others.

    Its score there can be compared with those of systems that are not fitted, which the fitted one's own cannot.

    Args:
        validation: Of each network, `(N, K, H, W)`.
        truth: Masks `(N, H, W)`.
        groups: Of each image; they are dealt into up to `CROSS_FITS` parts.
        fit: From a part of such predictions and masks to a system.

    Returns:
        `(N, K, H, W)`; None where all images are one group.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        return None
    part_of = {name: index % min(CROSS_FITS, len(names)) for index, name in enumerate(names)}
    parts = torch.tensor([part_of[group] for group in groups], device=truth.device)
    found = torch.empty_like(validation[0])
    for part in range(max(part_of.values()) + 1):
        held = parts == part
        system = fit([one[~held] for one in validation], truth[~held])
        found[held] = system.combine([one[held] for one in validation])
    return found
