"""Greedy selection with replacement: the mean that grows by the candidate that makes it best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.ensembling.selection import Selection, Step
from smp_ensemble.ensembling.tally import MOST_ADDITIONS

if TYPE_CHECKING:
    from smp_ensemble.ensembling.pool import CandidatePool

ADDITIONS_PER_MEMBER = 4


def select_greedily(pool: CandidatePool, max_members: int) -> Selection:
    """Starts with nothing and adds the candidate whose addition scores best, again and again, the same ones too.

    There are up to `4 max_members` additions; once `max_members` different ones are in, only those are added. The
    shortest of the best beginnings is kept: a member's weight is how often it is in there, over how many there are. So
    the result is never worse than the best single candidate on these data. Among equals those that are in already come
    first, then the lower log-loss, then the better rank.

    References:
        Caruana et al., "Ensemble Selection from Libraries of Models", ICML 2004.
    """
    counts = [0] * len(pool.candidates)
    path: list[Step] = []
    chosen: list[int] = []
    for _ in range(min(ADDITIONS_PER_MEMBER * max_members, MOST_ADDITIONS)):
        full = sum(count > 0 for count in counts) == max_members
        add = [index for index, count in enumerate(counts) if count or not full]
        best, score = _best_addition(pool, counts, add)
        counts[best] += 1
        chosen.append(best)
        path.append(Step(pool.candidates[best], score))
    size = 1 + max(range(len(path)), key=lambda step: (pool.sign * path[step].score, -step))
    kept = chosen[:size]
    members = sorted(set(kept), key=lambda index: (-kept.count(index), index))
    return Selection(
        [pool.candidates[index] for index in members], [kept.count(index) / size for index in members], path, size
    )


select_greedily.needs_predictions = True  # type: ignore[attr-defined]


def _best_addition(pool: CandidatePool, counts: list[int], add: list[int]) -> tuple[int, float]:
    scores = pool.sign * (found := pool.singles[add] if not any(counts) else pool.scores_with(counts, add))
    tied = [place for place, score in enumerate(scores) if score == scores.max()]
    if any(counts[add[place]] for place in tied):
        tied = [place for place in tied if counts[add[place]]]
    if len(tied) > 1:
        losses = pool.losses_with(counts, [add[place] for place in tied])
        tied = [place for place, loss in zip(tied, losses, strict=True) if loss == losses.min()]
    return add[tied[0]], float(found[tied[0]])
