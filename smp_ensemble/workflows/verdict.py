"""Whether a difference is large and certain enough for an alias to move: numbers in, a decision with its reason out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

if TYPE_CHECKING:
    from smp_ensemble.metrics.bootstrap import Difference

BETTER, ALWAYS = "better", "always"

MAX_CONFIDENCE = 0.999
RESAMPLES = 1000
BEYOND = 20
"""So many resamples at least lie below the interval: with fewer, its lower end would be a matter of luck."""


@dataclass(frozen=True)
class Verdict:
    """Whether an alias moves.

    Attributes:
        promote: It does.
        reason: In one line, with the numbers.
    """

    promote: bool
    reason: str


@dataclass(frozen=True)
class Rule:
    """When an alias moves, as options say it.

    Attributes:
        promote: `better` or `always`.
        min_gain: The difference of mean IoU must exceed it.
        confidence: Of the two-sided interval whose lower end must exceed it.

    Raises:
        ConfigError: Out of range.
    """

    promote: str = BETTER
    min_gain: float = 0.0
    confidence: float = 0.95
    resamples: int = field(init=False, default=RESAMPLES)

    def __post_init__(self) -> None:
        if self.promote not in {BETTER, ALWAYS}:
            raise ConfigError(f"unknown promote '{self.promote}': {nearest(self.promote, (BETTER, ALWAYS))}")
        if not -1 < self.min_gain < 1:
            raise ConfigError(f"expected min-gain as a difference of IoU between -1 and 1, got {self.min_gain}")
        if not 0.5 <= self.confidence <= MAX_CONFIDENCE:
            raise ConfigError(f"expected confidence between 0.5 and {MAX_CONFIDENCE}, got {self.confidence}")
        object.__setattr__(self, "resamples", max(RESAMPLES, math.ceil(2 * BEYOND / (1 - self.confidence))))


def decide_promotion(difference: Difference, min_gain: float = 0.0, confidence: float = 0.95) -> Verdict:
    """Whether a difference is large and certain enough: the lower end of its interval exceeds `min_gain`.

    Args:
        difference: New minus champion, with its two-sided interval at level `confidence`.
        min_gain: What it must exceed.
        confidence: Level of the interval; a model that gains no more than `min_gain` gets through in about
            `(1 - confidence) / 2` of comparisons.

    Example:
        >>> from smp_ensemble.metrics.bootstrap import Difference
        >>> decide_promotion(Difference(0.02, 0.005, 0.035, 0.01)).promote
        True
        >>> decide_promotion(Difference(0.02, -0.001, 0.041, 0.06)).reason
        'IoU +0.0200 against the champion, 95 % interval -0.0010 to +0.0410, p 0.060: not above +0.0000 for certain'
    """
    if not math.isfinite(difference.estimate):
        return Verdict(False, "one of the two has no IoU on this test data")
    gain = f"IoU {difference.estimate:+.4f} against the champion"
    if not math.isfinite(difference.low):
        return Verdict(False, f"{gain}, of one image or group of images: with fewer than 2 there is no interval")
    numbers = (
        f"{gain}, {confidence * 100:g} % interval {difference.low:+.4f} to {difference.high:+.4f}, "
        f"p {difference.p_value:.3f}"
    )
    if difference.low > min_gain:
        return Verdict(True, f"{numbers}: above {min_gain:+.4f}")
    return Verdict(False, f"{numbers}: not above {min_gain:+.4f} for certain")
