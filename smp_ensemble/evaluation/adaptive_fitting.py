"""The adaptive rule of an ensemble, fitted on what its members predict for validation data.

One pass counts, for every image and stage, how many mask values lie in each bin of margins and how many of those the
members still to come have changed. Everything else is worked out from these counts: see docs/adaptive.md.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from smp_ensemble.ensembling.adaptive import (
    AdaptiveRule,
    check_adaptive,
    check_order,
    check_tolerance,
    decision_margins,
    margin_bins,
    settled,
)
from smp_ensemble.ensembling.combiners import combiner_class
from smp_ensemble.ensembling.temperature import apply_temperature

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.evaluation.predictions import Predictions

WIDTH, BINS = 0.25, 64
"""Of margins: up to 16 in log-odds, which is where probabilities are clamped."""

Z = 1.645
"""One-sided 95 %: of the table's upper bounds, and of what is promised over images."""

FOLDS = 5
FACTORS = 2.0 ** (np.arange(-24, 13) / 2)
"""Limits that are tried, as factors of the tolerance: most images do not stop at the limit, and change nothing."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageCounts:
    """What one pass over validation data counts: T images, S = M - 1 stages, B bins.

    Attributes:
        open: Mask values that can still change, by bin of margin: int64 `(T, S, B)`.
        changed: Those of them that the whole ensemble has changed.
        sizes: Mask values of each image: int64 `(T,)`.
    """

    open: npt.NDArray[np.int64]
    changed: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def fit_adaptive(predictions: Predictions, tolerance: float) -> AdaptiveRule:
    """Fits a rule that keeps what stopping early changes within a tolerance.

    Members' weights, temperature, threshold and rejection are set before; post-processing plays no part.

    Args:
        predictions: Of validation data.
        tolerance: Share of mask values that may differ from the whole ensemble's.

    Raises:
        ConfigError: The tolerance is no share, the combiner does not add members up, or members are not in the order of
            their weights.
    """
    check_tolerance(tolerance)
    ensemble = predictions.ensemble
    check_adaptive(combiner_class(ensemble.combiner), ensemble.combiner)
    check_order(ensemble.weights)
    counts = count_changes(predictions)
    table = fit_table(counts.open.sum(axis=0), counts.changed.sum(axis=0))
    limit = fit_limit(counts, folds_of(predictions.data.groups, len(counts.sizes)), tolerance)
    logger.info("adaptive: tolerance %g, limit %.3g of an image's pixels", tolerance, limit)
    return AdaptiveRule(tolerance, limit, WIDTH, tuple(tuple(row) for row in table.tolist()))


def count_changes(predictions: Predictions) -> StageCounts:
    """Counts margins and changes, image by image; pixels without truth count like all others."""
    ensemble, total = predictions.ensemble, len(predictions.data)
    stages = len(ensemble.weights) - 1
    opened, changed = (np.zeros((total, stages, BINS), dtype=np.int64) for _ in range(2))
    sizes = np.zeros(total, dtype=np.int64)
    for batch in predictions:
        masks, bins = _stages_of(ensemble, predictions.of_members(batch))
        full = masks.pop()
        sizes[batch.indices] = full[0].numel()
        for stage, (mask, places) in enumerate(zip(masks, bins, strict=True)):
            for at, index in enumerate(batch.indices):
                may, place = places[at] < BINS, places[at].long()
                does = may & (mask[at] != full[at])
                opened[index, stage] = torch.bincount(place[may], minlength=BINS).numpy()
                changed[index, stage] = torch.bincount(place[does], minlength=BINS).numpy()
    return StageCounts(opened, changed, sizes)


def _stages_of(ensemble: Ensemble, probabilities: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The mask after each member, and after each but the last every value's bin: `BINS` where it is settled."""
    combiner, weights = ensemble.new_combiner(), ensemble.scaled_weights
    masks, bins = [], []
    for index, one in enumerate(probabilities):
        combiner.update(one, weights[index])
        combined = apply_temperature(combiner.compute(), ensemble.temperature, ensemble.mode)
        masks.append(ensemble.decide(combined))
        if index < len(weights) - 1:
            place = margin_bins(decision_margins(ensemble, combined), WIDTH, BINS)
            final = settled(ensemble, combiner, sum(weights[index + 1 :]))
            bins.append(place.masked_fill(final, BINS).to(torch.uint8))
    return masks, bins


def fit_table(opened: npt.NDArray[np.int64], changed: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Upper bounds of the probability of a change, by stage and bin, not growing with the margin.

    Neighbouring bins are pooled until rates do not grow (isotonic regression); each pool gets the upper end of its
    Wilson interval; and no bin gets more than one of a smaller margin, which covers bins without a pixel too.

    Args:
        opened: Mask values that could still change, `(S, B)`.
        changed: Those that did.

    References:
        Barlow et al., "Statistical Inference under Order Restrictions", 1972; Wilson, JASA 22, 1927.

    Example:
        >>> fit_table(np.array([[0, 1000, 9000]]), np.array([[0, 100, 9]])).round(4).tolist()
        [[1.0, 0.1167, 0.0017]]
    """
    table = np.ones(opened.shape)
    for row, seen, hits in zip(table, opened, changed, strict=True):
        at = np.flatnonzero(seen)
        if len(at):
            pools = isotonic_regression(hits[at] / seen[at], weights=seen[at], increasing=False).blocks
            for first, last in itertools.pairwise(pools):
                places = at[first:last]
                row[places] = _wilson_upper(int(hits[places].sum()), int(seen[places].sum()))
        np.minimum.accumulate(row, out=row)
    return table


def _wilson_upper(hits: int, total: int) -> float:
    rate, square = hits / total, Z * Z / total
    spread = Z * np.sqrt(rate * (1 - rate) / total + square / (4 * total))
    return float(min(1.0, (rate + square / 2 + spread) / (1 + square)))


def folds_of(groups: Sequence[str] | None, images: int) -> npt.NDArray[np.int64]:
    """Which of at most `FOLDS` folds each image is in; images of one group are in one fold."""
    names = list(range(images)) if groups is None or len(set(groups)) < 2 else list(groups)
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] % FOLDS for name in names], dtype=np.int64)


def fit_limit(counts: StageCounts, folds: npt.NDArray[np.int64], tolerance: float) -> float:
    """The largest limit for an image's expected changes with which changes over images stay within the tolerance.

    Limits are tried in ascending order, and the first that fails ends the search. What an image is expected to change
    comes from a table that was fitted on the other folds; what it changes is counted. A limit passes where the upper
    end of a one-sided 95 % interval of the mean over images is no more than the tolerance.

    Returns:
        0 where none passes: images then stop only where nothing can change any more.

    References:
        Fixed-sequence testing: Angelopoulos et al., "Learn then Test", arXiv:2110.01052.
    """
    if tolerance == 0 or len(np.unique(folds)) < 2 or not counts.open.shape[1]:
        return 0.0
    expected = np.zeros(counts.open.shape[:2])
    for fold in np.unique(folds):
        others, own = folds != fold, folds == fold
        table = fit_table(counts.open[others].sum(axis=0), counts.changed[others].sum(axis=0))
        expected[own] = (counts.open[own] * table).sum(axis=-1)
    expected /= counts.sizes[:, None]
    actual = counts.changed.sum(axis=-1)
    best = 0.0
    for limit in np.minimum(tolerance * FACTORS, 1.0):
        stops = expected <= limit
        first = np.where(stops.any(axis=1), stops.argmax(axis=1), -1)
        changed = np.where(first >= 0, actual[np.arange(len(first)), first], 0)
        if _upper_share(changed, counts.sizes) > tolerance:
            break
        best = float(limit)
    return best


def _upper_share(changed: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> float:
    """Upper end of the interval of the share of changed mask values, images being what is drawn (a ratio estimate)."""
    share, count = changed.sum() / sizes.sum(), len(sizes)
    deviations = changed - share * sizes
    return float(share + Z * np.sqrt(count / (count - 1) * (deviations**2).sum()) / sizes.sum())
