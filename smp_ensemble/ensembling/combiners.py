"""How the probabilities of members become one, streaming: memory does not grow with the number of members."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from smp_ensemble import registry
from smp_ensemble.ensembling.temperature import EPSILON
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import Combiner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from smp_ensemble.typing import CombinerContext

GROUP = "smp_ensemble.combiners"

TIE = 1e-3
"""How far shares of votes are moved towards the mean probabilities, which so decide ties.

They may also turn leads of less than that: sums of weights are rounded. Among up to 499 equal votes one vote is more.
"""


class Mean(Combiner):
    """Arithmetic mean of probabilities, weighted where weights are given; their scale does not matter.

    Averaging probabilities, not logits, is what Snapshot Ensembles and FGE do.

    References:
        Huang et al., "Snapshot Ensembles: Train 1, get M for free", ICLR 2017, arXiv:1704.00109, section 3.

    Example:
        >>> from smp_ensemble.typing import CombinerContext
        >>> mean = Mean(CombinerContext("binary"))
        >>> mean.update(torch.full((1, 1, 1, 1), 0.25))
        >>> mean.update(torch.full((1, 1, 1, 1), 1.0), weight=2.0)
        >>> mean.compute().item()
        0.75
    """

    additive: ClassVar[bool] = True

    def __init__(self, context: CombinerContext) -> None:
        self.context = context
        self._sum: Tensor | None = None
        self._weight = 0.0

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Adds one member's probabilities, shape `(N, K, H, W)`."""
        self._add(probabilities.float(), weight)

    def _add(self, values: Tensor, weight: float) -> None:
        if self._sum is None:
            self._sum = values * weight
        else:
            self._sum.add_(values, alpha=weight)
        self._weight += weight

    def compute(self) -> Tensor:
        """The mean so far, shape `(N, K, H, W)`, float32.

        Raises:
            ConfigError: No member was added, or all weights are zero.
        """
        return self._mean().clamp_(0, 1)  # sums are rounded, and may lie beyond 1

    def _mean(self) -> Tensor:
        if self._sum is None or self._weight <= 0:
            raise ConfigError("expected at least one member with a weight above 0, got none")
        return self._sum / self._weight


class Weighted(Mean):
    """The mean with weights that are fitted on validation data, where none are given: see `fitting.fit_weights`."""

    fits_weights: ClassVar[bool] = True


class Geometric(Mean):
    """Normalised geometric mean: the mean of log-probabilities (binary and multilabel: of logits), weighted.

    A member that is sure of a class weighs more than in the arithmetic mean, right or wrong: one that gives a class
    nearly no chance is nearly a veto. Probabilities are clamped to 1e-7 from both ends.

    References:
        Hinton, "Products of experts", ICANN 1999; as a pool of opinions: Genest & Zidek, Statistical Science 1986.
    """

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Adds one member's log-probabilities, shape `(N, K, H, W)`."""
        values = probabilities.float()
        if self.context.mode == "multiclass":
            self._add(values.clamp(EPSILON, 1 - EPSILON).log(), weight)
        else:  # from both ends: in float32, 1 - 1e-7 is further from 1 than 1e-7 is from 0
            self._add(values.clamp_min(EPSILON).log() - (1 - values).clamp_min(EPSILON).log(), weight)

    def compute(self) -> Tensor:
        """The geometric mean so far, normalised, shape `(N, K, H, W)`, float32."""
        mean = self._mean()
        return mean.softmax(dim=1) if self.context.mode == "multiclass" else mean.sigmoid()


class Vote(Combiner):
    """Plurality: each member votes for one class (binary, multilabel: for or against), and most votes win.

    A member votes for its most likely class; in binary and multilabel mode for the foreground from the ensemble's
    threshold on. Weights are numbers of votes. **Ties** go to the class with the higher mean probability (binary: to
    the foreground where the mean probability reaches the threshold).

    `compute` gives shares of votes, moved towards the mean probabilities by the share `TIE`, which is what settles
    ties; so the mask is that of the largest share, or of a share from 0.5 on.
    """

    votes: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    def __init__(self, context: CombinerContext) -> None:
        self.context = context
        self._shares = Mean(context)
        self._mean = Mean(context)

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Counts one member's votes, shape `(N, K, H, W)`."""
        probabilities = probabilities.float()
        self._mean.update(probabilities, weight)
        if self.context.mode == "multiclass":
            chosen = probabilities.max(dim=1, keepdim=True).indices
            votes = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
        else:
            votes = (probabilities >= self.context.threshold).float()
        self._shares.update(votes, weight)

    def compute(self) -> Tensor:
        """Shares of votes so far, shape `(N, K, H, W)`, float32."""
        mean = self._mean.compute()
        if self.context.mode != "multiclass":
            mean = _relative_to(mean, self.context.threshold)
        return torch.lerp(self._shares.compute(), mean, TIE)


class Majority(Vote):
    """Absolute majority: a pixel whose class does not get more than half of all votes is rejected."""

    reject: ClassVar[float] = 0.5


def _relative_to(probabilities: Tensor, threshold: float) -> Tensor:
    """Stretched on both sides so that the threshold is at 0.5."""
    below = probabilities / (2 * threshold)
    above = 1 - (1 - probabilities) / (2 * (1 - threshold))
    return torch.where(probabilities < threshold, below, above)


def combiner_class(name: str) -> Callable[[CombinerContext], Combiner]:
    """What makes a fresh combiner from its context, by name.

    Raises:
        ConfigError: Unknown name.
    """
    found: Callable[[CombinerContext], Combiner] = registry.load(GROUP, name)
    return found


def casts_votes(combiner: object) -> bool:
    """Whether it gives shares of votes: cut at 0.5, and not to be calibrated."""
    return bool(getattr(combiner, "votes", False))


def default_reject(combiner: object) -> float:
    """What the decision must get more than, unless the ensemble says otherwise; 0: nothing is rejected."""
    return float(getattr(combiner, "reject", 0.0))


def fits_weights(combiner: object) -> bool:
    """Whether it wants fitted weights where none are given."""
    return bool(getattr(combiner, "fits_weights", False))


def is_additive(combiner: object) -> bool:
    """Whether it adds members up, so that what is still missing can be bounded; false unless it says so."""
    return bool(getattr(combiner, "additive", False))
