"""Where an ensemble is unsure, pixel by pixel, and why: the data is ambiguous, or its members disagree.

References:
    Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", 2011, arXiv:1112.5745 (BALD).
    Gal, "Uncertainty in Deep Learning", PhD thesis, 2016, section 3.3 (variation ratio, mutual information).
    Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017,
    arXiv:1612.01474.
    Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning", ICML 2018, arXiv:1710.07283.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.decision import decide

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode


class Uncertainty(NamedTuple):
    """Maps of uncertainty, each float32 `(N, H, W)`; in multilabel mode means over channels.

    Attributes:
        entropy: Of the prediction, in nats: all uncertainty, whatever its source.
        mutual_information: Between the prediction and which member makes it, in nats: the part of the mean's entropy
            that is there because members disagree, and that more training data could remove.
        variation_ratio: The share of votes that did not go to the class with most votes.
    """

    entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor


def max_entropy(mode: Mode, outputs: int) -> float:
    """The highest entropy that a prediction can have, in nats: log K in multiclass mode, otherwise log 2.

    Example:
        >>> round(max_entropy("binary", 1), 4), round(max_entropy("multiclass", 4), 4)
        (0.6931, 1.3863)
    """
    return math.log(outputs if mode == "multiclass" else 2)


def _entropy(probabilities: Tensor, mode: Mode) -> Tensor:
    """Nats, `(N, H, W)`: of one variable in multiclass mode, else the mean over channels of two-class variables."""
    terms: Tensor = torch.special.entr(probabilities)
    if mode == "multiclass":
        return terms.sum(1)
    terms += torch.special.entr(1 - probabilities)
    return terms.mean(1)


class UncertaintyMaps:
    """Uncertainty from members that come one by one; memory does not grow with their number.

    The scale of weights does not matter, and neither does the members' order. With one member, or members that agree in
    everything, mutual information and variation ratio are 0.

    Args:
        mode: What is predicted. In multilabel mode every channel is a two-class variable of its own.
        threshold: From which probability on a member votes for the foreground; in multiclass mode it votes for its most
            likely class.

    Raises:
        ConfigError: The threshold is outside 0..1.

    Example:
        >>> maps = UncertaintyMaps("binary")
        >>> maps.update(torch.tensor([0.5, 0.0]).view(1, 1, 1, 2))
        >>> maps.update(torch.tensor([0.5, 1.0]).view(1, 1, 1, 2))
        >>> [[round(value, 4) for value in map.flatten().tolist()] for map in maps.compute()]
        [[0.6931, 0.6931], [0.0, 0.6931], [0.0, 0.5]]
    """

    def __init__(self, mode: Mode, threshold: float = 0.5) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ConfigError(f"expected a threshold in 0..1, came {threshold}")
        self._mode: Mode = mode
        self._threshold = threshold
        self._weight: Tensor | None = None
        self._probabilities: Tensor
        self._entropies: Tensor
        self._votes: Tensor

    def update(self, probabilities: Tensor, weight: float = 1.0) -> None:
        """Takes one member's probabilities, `(N, K, H, W)`; with weight 0 it changes nothing.

        Raises:
            ConfigError: The weight is negative or not finite.
            DataError: The shape is not that of the mode, or not that of the members before.
        """
        if not 0 <= weight < math.inf:
            raise ConfigError(f"expected a weight of 0 or more, came {weight}")
        if weight == 0:
            return
        probabilities = self._checked(probabilities)
        if self._weight is None:
            self._weight = probabilities.new_zeros(())
            self._probabilities = torch.zeros_like(probabilities)
            self._entropies = torch.zeros_like(probabilities[:, 0])
            self._votes = torch.zeros_like(probabilities)
        self._weight += weight  # float32 like the votes: where all members agree the two are equal, bit for bit
        self._probabilities.add_(probabilities, alpha=weight)
        self._entropies.add_(_entropy(probabilities, self._mode), alpha=weight)
        decision = decide(probabilities, self._mode, self._threshold)
        if self._mode == "multiclass":
            chosen = decision.unsqueeze(1)
            self._votes.scatter_(1, chosen, self._votes.gather(1, chosen) + weight)
        else:
            self._votes.add_(decision.view_as(self._votes), alpha=weight)

    def compute(self, combined: Tensor | None = None) -> Uncertainty:
        """The maps of the members so far.

        Args:
            combined: The ensemble's own probabilities `(N, K, H, W)`, say calibrated ones, whose entropy is wanted;
                None: the entropy of the members' weighted mean.

        Raises:
            ConfigError: No member was added, or all weights are zero.
            DataError: `combined` has another shape than the members' probabilities.
        """
        if self._weight is None:
            raise ConfigError("expected at least one member with a weight above 0, got none")
        of_mean = _entropy((self._probabilities / self._weight).clamp_(0.0, 1.0), self._mode)
        if self._mode == "multiclass":
            most = self._votes.amax(1, keepdim=True)
        else:
            most = torch.maximum(self._votes, self._weight - self._votes)
        return Uncertainty(
            entropy=of_mean if combined is None else _entropy(self._checked(combined), self._mode),
            mutual_information=(of_mean - self._entropies / self._weight).clamp_min_(0.0),
            variation_ratio=(1 - most / self._weight).clamp_(0.0, 1.0).mean(1),
        )

    def _checked(self, probabilities: Tensor) -> Tensor:
        """Float32, in 0..1: means in half precision leave it by rounding."""
        came = tuple(probabilities.shape)
        if probabilities.ndim != 4 or (self._mode == "binary" and came[1] != 1):
            raise DataError(f"expected {self._mode} probabilities of shape (N, K, H, W), came {came}")
        if self._weight is not None and came != tuple(self._probabilities.shape):
            raise DataError(f"expected probabilities of shape {tuple(self._probabilities.shape)}, came {came}")
        return probabilities.detach().float().clamp(0.0, 1.0)


def image_scores(maps: Uncertainty, valid: Tensor | None = None) -> Tensor:
    """Means over each image's valid pixels: entropy, mutual information and variation ratio.

    Args:
        maps: Uncertainty, each `(N, H, W)`.
        valid: Which pixels count, bool `(N, H, W)`; None: all.

    Returns:
        Float32, shape `(N, 3)`; NaN for an image without a valid pixel.

    Raises:
        DataError: `valid` has another shape than the maps, or is not boolean.
    """
    if valid is None:
        return torch.stack([values.flatten(1).mean(1) for values in maps], 1)
    if valid.shape != maps.entropy.shape or valid.dtype != torch.bool:
        expected, came = tuple(maps.entropy.shape), tuple(valid.shape)
        raise DataError(f"expected a boolean `valid` of shape {expected}, came {valid.dtype} of shape {came}")
    counts = valid.sum((1, 2))
    return torch.stack([torch.where(valid, values, 0.0).sum((1, 2)) / counts for values in maps], 1)
