"""When the members that are still to come need not run: margins of the running combination, and what is left to change.

An ensemble may carry an `AdaptiveRule`, fitted on validation data. It speaks of *stages*: stage m is the combination of
the first m members. See docs/adaptive.md.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.ensembling.combiners import is_additive
from smp_ensemble.ensembling.temperature import EPSILON, apply_temperature
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.decision import certainty, decide
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.typing import Combiner

SLACK = 1e-5
"""By which a decision must be safe from members that are still to come: sums are rounded."""

MAX_BINS = 4096


@dataclass(frozen=True)
class AdaptiveRule:
    """Says with which probability a pixel's mask value still changes, and when an image has seen enough members.

    Attributes:
        tolerance: Share of mask values that may differ from the whole ensemble's, over many images.
        limit: An image stops where the share of its mask values that is expected to change is no more than this.
        width: Of a bin of margins, in log-odds; the last bin has no end.
        changes: Probability of a change by stage and bin of margin: one row for each stage but the last, not growing
            along a row.

    Raises:
        ConfigError: A value of the wrong type or out of range, or a row that grows.

    Example:
        >>> rule = AdaptiveRule(tolerance=0.01, limit=0.01, width=1.0, changes=((0.5, 0.1, 0.001),))
        >>> margins = torch.tensor([[[0.2, 1.5], [7.0, 8.0]]])  # one image of 2 x 2 pixels
        >>> [round(share, 4) for share in rule.expected_changes(1, margins).tolist()]
        [0.1505]
    """

    tolerance: float
    limit: float
    width: float
    changes: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_number("tolerance", self.tolerance, 0, 1)
        _check_number("limit", self.limit, 0, 1)
        _check_number("width", self.width, 1e-3, 100)
        if len({len(row) for row in self.changes}) > 1:
            raise ConfigError(
                f"expected changes with as many bins in each row, got {[len(row) for row in self.changes]}"
            )
        for row in self.changes:
            if not 1 <= len(row) <= MAX_BINS:
                raise ConfigError(f"expected changes with 1 to {MAX_BINS} bins in a row, got {len(row)}")
            for value in row:
                _check_number("changes", value, 0, 1)
            if any(after > before for before, after in itertools.pairwise(row)):
                raise ConfigError("expected changes that do not grow with the margin, got a row that does")

    @property
    def members(self) -> int:
        """M, how many members it is for."""
        return len(self.changes) + 1

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.changes, dtype=torch.float32)

    def expected_changes(self, stage: int, margins: Tensor, settled: Tensor | None = None) -> Tensor:
        """The share of each image's mask values that is expected to change after `stage` members.

        Args:
            stage: From 1 to M - 1.
            margins: As `decision_margins` gives them, `(N, ...)`.
            settled: Where nothing can change any more, bool of the same shape.

        Returns:
            Float32 `(N,)`.
        """
        bins = margin_bins(margins, self.width, self._table.shape[1])
        found = self._table.to(margins.device)[stage - 1][bins]
        if settled is not None:
            found = found.masked_fill(settled, 0.0)
        return found.flatten(1).mean(dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `ensemble.json`."""
        return {
            "tolerance": self.tolerance,
            "limit": self.limit,
            "width": self.width,
            "changes": [list(row) for row in self.changes],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> AdaptiveRule:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: A missing or unknown name, a wrong type or a value out of range.
        """
        known = ("tolerance", "limit", "width", "changes")
        if not isinstance(content, Mapping) or not all(name in content for name in known):
            raise ConfigError(
                f"expected an adaptive rule as a JSON object with {', '.join(known)}, got {content!r:.200}"
            )
        for name in content:
            if name not in known:
                raise ConfigError(f"unknown setting '{name}' of an adaptive rule: {nearest(str(name), known)}")
        rows = content["changes"]
        if not isinstance(rows, list | tuple) or not all(isinstance(row, list | tuple) for row in rows):
            raise ConfigError(f"expected changes as a list of lists of numbers, got {rows!r:.200}")
        return cls(content["tolerance"], content["limit"], content["width"], tuple(tuple(row) for row in rows))


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not least <= value <= most or not math.isfinite(value):
        raise ConfigError(
            f"expected {name} of an adaptive rule as a number from {least:g} to {most:g}, got {value!r:.80}"
        )


def check_tolerance(tolerance: float) -> float:
    """Refuses what is no share of pixels.

    Raises:
        ConfigError: Below 0, or 1 and more.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"expected adaptive as a share of pixels from 0 to below 1, such as 0.001, got {tolerance}")
    return float(tolerance)


def check_adaptive(combiner: object, name: str) -> None:
    """Refuses combiners whose running combination says nothing about the whole.

    Raises:
        ConfigError: The combiner does not say that it is additive.
    """
    if not is_additive(combiner):
        raise ConfigError(
            f"adaptive needs a combiner that adds members up (mean, weighted, geometric, vote, majority); '{name}' "
            "does not say that it does: leave adaptive empty, or choose another combiner"
        )


def check_order(weights: Sequence[float]) -> None:
    """Refuses members that are not in the order of their weights.

    Raises:
        ConfigError: A member weighs more than the one before it.
    """
    if any(after > before for before, after in itertools.pairwise(weights)):
        raise ConfigError(f"adaptive needs members in the order of their weights, heaviest first, got {list(weights)}")


def margin_bins(margins: Tensor, width: float, bins: int) -> Tensor:
    """The bin of each margin, int64."""
    return (margins / width).long().clamp_(0, bins - 1)


def decision_margins(ensemble: Ensemble, probabilities: Tensor) -> Tensor:
    """How far each mask value is from becoming another, in log-odds.

    The lead of the most likely class over the next, or the distance from the threshold; where the ensemble rejects
    pixels, no more than the distance from that limit.

    Args:
        ensemble: Says how it decides.
        probabilities: Combined ones after the temperature, `(N, K, H, W)`.

    Returns:
        Float32 from 0, shape `(N, H, W)`; in multilabel mode `(N, K, H, W)`.
    """
    if ensemble.mode == "multiclass":
        first, place = probabilities.max(dim=1, keepdim=True)
        second = probabilities.scatter(1, place, -1.0).amax(dim=1)
        margins = (first[:, 0].clamp_min(EPSILON) / second.clamp_min(EPSILON)).log()
    else:
        foreground = probabilities[:, 0] if ensemble.mode == "binary" else probabilities
        margins = (_logit(foreground) - _logit_of(0.5 if ensemble.votes else ensemble.threshold)).abs()
    if ensemble.reject:
        decision = decide(probabilities, ensemble.mode, 0.5 if ensemble.votes else ensemble.threshold)
        sure = certainty(probabilities, decision, ensemble.mode)
        margins = torch.minimum(margins, (_logit(sure) - _logit_of(ensemble.reject)).abs())
    return margins


def _logit(probabilities: Tensor) -> Tensor:
    return torch.logit(probabilities.clamp(EPSILON, 1 - EPSILON))


def _logit_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


def settled(ensemble: Ensemble, combiner: Combiner, rest: float) -> Tensor:
    """Where no member that is still to come can change the mask any more, whatever it says.

    Members are added up, so those still to come count as one of their weight. In binary and multilabel mode the mask
    follows the probability, and is looked at for all of them at 0 and all at 1. In multiclass mode they do most harm
    where all are sure of the runner-up; where a pixel may also be rejected that is the whole truth for votes only, so
    for other combiners nothing is called settled then.

    Args:
        ensemble: Says how it decides.
        combiner: Has seen the members so far; is left as it is.
        rest: The weight of the others, on the scale of the combiner's weights.

    Returns:
        Bool, shape of the mask.
    """
    now = combiner.compute()
    if rest <= 0:
        return torch.ones_like(ensemble.decide(now), dtype=torch.bool)
    if ensemble.mode != "multiclass":
        low = _as_if(combiner, torch.zeros_like(now), rest).sub_(SLACK).clamp_(0, 1)
        high = _as_if(combiner, torch.ones_like(now), rest).add_(SLACK).clamp_(0, 1)
        masks = [ensemble.decide(apply_temperature(one, ensemble.temperature, ensemble.mode)) for one in (low, high)]
        return masks[0] == masks[1]
    if ensemble.reject and not ensemble.votes:
        return torch.zeros_like(ensemble.decide(now), dtype=torch.bool)
    place = now.max(dim=1, keepdim=True).indices
    runner_up = now.scatter(1, place, -1.0).max(dim=1, keepdim=True).indices
    worst = _as_if(combiner, torch.zeros_like(now).scatter_(1, runner_up, 1.0), rest)
    lead = worst.gather(1, place) - worst.gather(1, runner_up)
    safe = (lead > SLACK)[:, 0]
    if ensemble.reject:
        safe &= ensemble.decide(worst - SLACK) == place[:, 0]
    return safe


def _as_if(combiner: Combiner, probabilities: Tensor, weight: float) -> Tensor:
    """What the combiner would give after one more member."""
    after = copy.deepcopy(combiner)
    after.update(probabilities, weight)
    return after.compute()
