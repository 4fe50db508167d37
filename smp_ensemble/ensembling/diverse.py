"""Selection of good candidates that differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.ensembling.selection import Selection, Step

if TYPE_CHECKING:
    from smp_ensemble.ensembling.pool import CandidatePool

SHARE = 0.5
"""lambda: what disagreement counts, against a candidate's own score."""


def select_diverse(pool: CandidatePool, max_members: int) -> Selection:
    """Starts with the best candidate, then adds the one with the largest `(1 - lambda) s + lambda d`; equal weights.

    `s` is its own score from 0, the worst candidate's, to 1, the best one's. `d` is its mean disagreement with those
    chosen so far, over the largest disagreement of any two candidates. `lambda` is 0.5. Among equals the better score
    comes first, then the better rank. How many join is `max_members`: nothing says when to stop, which greedy does.

    References:
        Carbonell & Goldstein, "The Use of MMR, Diversity-Based Reranking", SIGIR 1998, for the form of the trade-off.
        Kuncheva & Whitaker, Machine Learning 51, 2003, for the disagreement.
    """
    own = pool.sign * pool.singles
    own = (own - own.min()) / (np.ptp(own) or 1.0)
    apart = pool.disagreement / (pool.disagreement.max() or 1.0)
    chosen = [int(own.argmax())]
    while len(chosen) < min(max_members, len(own)):
        worth = (1 - SHARE) * own + SHARE * apart[:, chosen].mean(axis=1)
        left = [index for index in range(len(own)) if index not in chosen]
        chosen.append(max(left, key=lambda index: (round(float(worth[index]), 12), own[index], -index)))
    path = []
    for size in range(1, len(chosen) + 1):
        counts = [int(index in chosen[:size]) for index in range(len(own))]
        path.append(Step(pool.candidates[chosen[size - 1]], pool.score(counts)))
    return Selection([pool.candidates[index] for index in chosen], [1 / len(chosen)] * len(chosen), path, len(path))


select_diverse.needs_predictions = True  # type: ignore[attr-defined]
