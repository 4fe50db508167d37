"""What a selector is worth on validation data that had no say in what it chose.

A selector that looks at predictions finds the mean that is best on those very pixels: part of that is luck, the more so
the more candidates there are and the fewer images. So each part of the data is scored by what the selector chooses on
the others, and the counts of all parts are put together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.ensembling.tally import MOST_ADDITIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.ensembling.pool import CandidatePool
    from smp_ensemble.ensembling.selection import PredictionSelector

PARTS = 3
"""Into how many parts validation data are divided. Three take twice the time of the selection itself."""


@dataclass(frozen=True)
class CrossFit:
    """Scores by the pool's metric, each on all of the data.

    Attributes:
        parts: How many there were.
        selected: Of the mean of what the selector chooses on the other parts.
        best: Of the candidate that is best alone on the other parts.
        everyone: Of the mean of all candidates, which takes no choice; None where there are too many to add up.
        lower_is_better: Of the metric.
    """

    parts: int
    selected: float
    best: float
    everyone: float | None
    lower_is_better: bool = False

    @property
    def mean_beats_best(self) -> bool:
        """Whether, without selection, the mean of all is at least as good as the best one alone."""
        if self.everyone is None:
            return False
        return self.everyone <= self.best if self.lower_is_better else self.everyone >= self.best

    @property
    def pays(self) -> bool:
        """Whether the selection is better than the better of the two that cost none."""
        other = self.best if self.everyone is None or not self.mean_beats_best else self.everyone
        return self.selected < other if self.lower_is_better else self.selected > other

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """Plain values."""
        return {**asdict(self), "pays": self.pays}


def cross_fit(pool: CandidatePool, selector: PredictionSelector, max_members: int) -> CrossFit | None:
    """Scores a selector on each part of a pool by what it chooses on the others.

    Args:
        pool: Its `parts` are what is left out, one at a time.
        selector: Called once for each.
        max_members: For it.

    Returns:
        None for a pool that is not divided.

    References:
        Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", JRSS B 36, 1974.
    """
    if len(pool.parts) < 2:
        return None
    everybody = range(len(pool.candidates))
    place = {candidate.uri: index for index, candidate in enumerate(pool.candidates)}
    none = [0] * len(place)
    alone = [pool.counted(none, everybody, part) for part in pool.parts]
    selected, best = [], []
    for index, part in enumerate(pool.parts):
        rest = pool.without(index)
        found = selector(rest, max_members)
        counts = list(none)
        for member, count in zip(found.members, contributions(found.weights), strict=True):
            counts[place[member.uri]] = count
        first = next(one for one in everybody if counts[one])
        counts[first] -= 1
        selected.append(pool.counted(counts, [first], part))
        others = pool.sign * pool.scored(np.sum([one for at, one in enumerate(alone) if at != index], axis=0))
        best.append(alone[index][[int(others.argmax())]])
    return CrossFit(
        len(pool.parts),
        float(pool.scored(np.sum(selected, axis=0))[0]),
        float(pool.scored(np.sum(best, axis=0))[0]),
        pool.score([1] * len(place)) if len(place) <= MOST_ADDITIONS else None,
        pool.sign < 0,
    )


def contributions(weights: Sequence[float]) -> list[int]:
    """How often each member is added in the shortest sum with these weights, or nearly these where that is too long.

    Example:
        >>> contributions([0.5, 0.25, 0.25]), contributions([1 / 3, 2 / 3])
        ([2, 1, 1], [1, 2])
    """
    for size in range(1, MOST_ADDITIONS + 1):
        counts = [round(weight * size) for weight in weights]
        if all(count and abs(count - weight * size) < 1e-6 for count, weight in zip(counts, weights, strict=True)):
            return counts
    return [max(1, int(weight * (MOST_ADDITIONS - len(weights)))) for weight in weights]
