"""The path of a batch through the members in which images that have seen enough of them stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smp_ensemble.ensembling.adaptive import decision_margins, settled
from smp_ensemble.ensembling.temperature import apply_temperature
from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from smp_ensemble.ensembling.adaptive import AdaptiveRule
    from smp_ensemble.ensembling.ensemble import Ensemble


def rule_of(ensemble: Ensemble, views: Sequence[str], passes: int) -> AdaptiveRule:
    """The ensemble's rule, once it is one for how members are run.

    Raises:
        ConfigError: The ensemble has none, or its views or passes are not those that the rule was fitted with.
    """
    if ensemble.adaptive is None:
        raise ConfigError("this ensemble has no adaptive rule: build it with --adaptive 0.001, or leave adaptive off")
    if tuple(views) != ensemble.views or passes != 1:
        raise ConfigError(
            f"the adaptive rule was fitted with views {'+'.join(ensemble.views)} and one pass, "
            f"got views {'+'.join(views)} and passes {passes}: leave adaptive off"
        )
    return ensemble.adaptive


class AdaptiveBatch:
    """One batch on its way: which images go on, and what those that stopped have got.

    Each image has a combiner of its own, so what happens to it does not depend on the others.

    Args:
        ensemble: With a rule.
        images: N, how many there are.

    Attributes:
        active: The images that the next member is to see, ascending.
        used: How many members each image has seen, `(N,)`.
    """

    def __init__(self, ensemble: Ensemble, images: int) -> None:
        if ensemble.adaptive is None:
            raise ConfigError("expected an ensemble with an adaptive rule, got one without")
        self._ensemble = ensemble
        self._rule = ensemble.adaptive
        self._weights = ensemble.scaled_weights
        self._combiners = [ensemble.new_combiner() for _ in range(images)]
        self._found: list[Tensor | None] = [None] * images
        self._stage = 0
        self.active = list(range(images))
        self.used = [0] * images

    def update(self, probabilities: Tensor) -> None:
        """Takes the next member's probabilities of the active images, `(n, K, H, W)`, and stops those that may."""
        weight = self._weights[self._stage]
        self._stage += 1
        for place, image in enumerate(self.active):
            self._combiners[image].update(probabilities[place : place + 1], weight)
            self.used[image] = self._stage
        if self._stage == len(self._weights):
            stops = [True] * len(self.active)
            combined = self._combined()
        else:
            combined = self._combined()
            stops = self._stops(combined)
        for place, image in enumerate(self.active):
            if stops[place]:
                self._found[image] = combined[place : place + 1].clone()
        self.active = [image for place, image in enumerate(self.active) if not stops[place]]

    def _combined(self) -> Tensor:
        pooled = torch.cat([self._combiners[image].compute() for image in self.active])
        return apply_temperature(pooled, self._ensemble.temperature, self._ensemble.mode)

    def _stops(self, combined: Tensor) -> list[bool]:
        """For each active image, whether what may still change is no more than the limit."""
        margins = decision_margins(self._ensemble, combined)
        limit = self._rule.limit
        stops: list[bool] = (self._rule.expected_changes(self._stage, margins) <= limit).tolist()
        unsure = [place for place, stop in enumerate(stops) if not stop]
        if unsure:  # pixels that nothing can change do not count, which costs more to see
            rest = sum(self._weights[self._stage :])
            final = torch.cat([settled(self._ensemble, self._combiners[self.active[place]], rest) for place in unsure])
            some = margins if len(unsure) == len(stops) else margins[unsure]
            shares = self._rule.expected_changes(self._stage, some, final)
            for place, stop in zip(unsure, (shares <= limit).tolist(), strict=True):
                stops[place] = stop
        return stops

    def compute(self) -> Tensor:
        """Probabilities `(N, K, H, W)` after the temperature, of the members that each image has seen.

        Raises:
            ConfigError: Some images have not stopped yet.
        """
        if self.active:
            raise ConfigError(f"expected members until every image has stopped, {len(self.active)} have not")
        return torch.cat([one for one in self._found if one is not None])


@torch.inference_mode()
def run_adaptively(
    ensemble: Ensemble, images: Tensor, run: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, list[int]]:
    """Runs members one after the other on the images that still need them.

    Args:
        ensemble: With a rule.
        images: Raw, `(N, C, H, W)`.
        run: Gives the probabilities `(n, K, H, W)` of the member of that number for some of the images.

    Returns:
        Probabilities `(N, K, H, W)`, and how many members each image has seen.
    """
    batch = AdaptiveBatch(ensemble, len(images))
    for index in range(len(ensemble.weights)):
        if not batch.active:
            break
        chosen = images if len(batch.active) == len(images) else images[batch.active]
        batch.update(run(index, chosen))
    return batch.compute(), batch.used
