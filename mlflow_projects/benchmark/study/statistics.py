"""What rows show: pooled scores of each system, and paired differences with intervals over seeds and groups.

A group is test data in exactly one fold, so one seed of a method scores every group once. IoU is that of the counts
summed over all groups, and the mean over seeds. Intervals are percentiles of a bootstrap that draws seeds and, within
the same draw, groups, both with replacement; the two systems of a difference are scored on the same draws.

References:
    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3 (percentile intervals).
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007 (drawing both ways of a crossed design).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from study.plan import REFERENCE, RUN, STUDENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

RESAMPLES = 4000
BEST = {
    "best": ("last", "refreshed"),
    "best of crops": ("last", "crops"),
    "all best": ("all", "all refreshed"),
    "soup best": ("soup", "soup crops"),
}
"""Systems that follow from two others: in each cell the one with the smaller log-loss on validation data."""
Key = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """Sums of one system over the whole data set, for each seed that has all folds.

    Attributes:
        seeds: Which ones; -1 for a reference, which has one set of trainings.
        groups: Names of all groups, sorted.
        counts: True positives, false positives, false negatives: `(seeds, groups, K, 3)`.
        losses: Sum of log-losses and pixels: `(seeds, groups, 2)`.
        systems: The systems' own values in the rows, by (seed, fold).
    """

    seeds: tuple[int, ...]
    groups: tuple[str, ...]
    counts: Floats
    losses: Floats
    systems: Mapping[tuple[int, int], dict[str, Any]]

    def mean(self, name: str) -> float:
        """Mean over cells of a value of the clean test data, or of the system itself."""
        values = [
            system["test"]["clean"][name] if name in system["test"]["clean"] else system[name]
            for system in self.systems.values()
        ]
        return float(np.mean(values))


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0

    def text(self, factor: float = 100.0, digits: int = 2) -> str:
        """Value and interval in units of 1 / `factor`, as Markdown; bold where 0 is outside."""
        value, low, high = (factor * one for one in (self.value, self.low, self.high))
        found = f"{value:+.{digits}f} ({low:+.{digits}f} .. {high:+.{digits}f})"
        return f"**{found}**" if self.certain else found


def table_of(picked: Mapping[tuple[int, int], dict[str, Any]], folds: int, kind: str = "clean") -> Table | None:
    """The table of a system, from its values by (seed, fold); None while no seed has all folds."""
    by_seed = defaultdict(set)
    for seed, fold in picked:
        by_seed[seed].add(fold)
    seeds = tuple(sorted(seed for seed, there in by_seed.items() if len(there) == folds))
    if not seeds:
        return None
    chosen = {cell: system for cell, system in picked.items() if cell[0] in seeds}
    groups = tuple(sorted({name for system in chosen.values() for name in system["test"][kind]["groups"]}))
    place = {name: index for index, name in enumerate(groups)}
    first = next(iter(next(iter(chosen.values()))["test"][kind]["groups"].values()))
    counts = np.zeros((len(seeds), len(groups), len(first["counts"]), 3))
    losses = np.zeros((len(seeds), len(groups), 2))
    for (seed, _), system in chosen.items():
        for name, values in system["test"][kind]["groups"].items():
            counts[seeds.index(seed), place[name]] += values["counts"]
            losses[seeds.index(seed), place[name]] += values["nll"]
    return Table(seeds, groups, counts, losses, chosen)


def collect(rows: Iterable[dict[str, Any]], epochs: int) -> dict[Key, dict[tuple[int, int], dict[str, Any]]]:
    """Values of every system, by method and system, and then by seed and fold; those of `BEST` too."""
    found: dict[Key, dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["stage"] not in {RUN, REFERENCE, STUDENT} or row["epochs"] != epochs:
            continue
        for name, system in row["systems"].items():
            found[row["method"], name][row["seed"], row["fold"]] = {**system, "seconds": row.get("seconds")}
    for (method, one), (name, other) in product(list(found), BEST.items()):
        if one == other[0] and (method, other[1]) in found:
            ways = [found[method, system] for system in other]
            shared = ways[0].keys() & ways[1].keys()
            found[method, name] = {
                cell: min((way[cell] for way in ways), key=lambda system: system["val_nll"]) for cell in sorted(shared)
            }
    return dict(found)


def choose(
    systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]],
    candidates: Sequence[Key],
    folds: int,
    *,
    wide: bool = False,
    own: bool = False,
) -> tuple[dict[tuple[int, int], dict[str, Any]], dict[int, Key]]:
    """For each fold the candidate with the best validation IoU, its mean over seeds; and which one that was.

    What was selected on validation data is judged by its cross-fitted score where there is one, or, if `own`, by the
    score on the very images it was selected on, which is too good.

    Test data have no say: the validation data of fold f are the test data of fold f + 1, so for fold f the choice asks
    the trainings of fold f alone or, if `wide`, those of all folds but f - 1, which are validated on its test data.
    """
    picked: dict[tuple[int, int], dict[str, Any]] = {}
    names: dict[int, Key] = {}
    for fold in range(folds):
        judges = [one for one in range(folds) if (one + 1) % folds != fold] if wide and folds > 1 else [fold]
        scores = {
            key: np.mean([by_fold[one] for one in judges])
            for key in candidates
            if (by_fold := _validation_by_fold(systems[key], own=own)).keys() >= {*judges, fold}
        }
        if not scores:
            continue
        names[fold] = max(scores, key=lambda key: scores[key])
        picked |= {cell: system for cell, system in systems[names[fold]].items() if cell[1] == fold}
    return picked, names


def _validation_by_fold(system: Mapping[tuple[int, int], dict[str, Any]], *, own: bool) -> dict[int, float]:
    """Validation IoU in each fold, mean over seeds."""
    by_fold: dict[int, list[float]] = defaultdict(list)
    for (_, fold), values in system.items():
        by_fold[fold].append(values["val_iou"] if own else values.get("cross_iou", values["val_iou"]))
    return {fold: float(np.mean(values)) for fold, values in by_fold.items()}


def iou(counts: Floats) -> Floats:
    """Mean IoU over classes that occur, `(...)`, of counts `(..., K, 3)`."""
    union = counts.sum(axis=-1)
    each = np.divide(counts[..., 0], union, out=np.full(union.shape, np.nan), where=union > 0)
    found: Floats = np.nanmean(each, axis=-1)
    return found


def dice(counts: Floats) -> Floats:
    """Mean Dice over classes that occur."""
    both = 2 * counts[..., 0] + counts[..., 1] + counts[..., 2]
    each = np.divide(2 * counts[..., 0], both, out=np.full(both.shape, np.nan), where=both > 0)
    found: Floats = np.nanmean(each, axis=-1)
    return found


def nll(losses: Floats) -> Floats:
    """Mean log-loss, `(...)`, of sums and pixels `(..., 2)`."""
    found: Floats = losses[..., 0] / losses[..., 1]
    return found


def _pooled(values: Floats, score: Callable[[Floats], Floats]) -> float:
    """Mean over seeds of the score of what is summed over groups."""
    return float(score(values.sum(axis=1)).mean())


def difference(
    a: Table, b: Table, what: str = "iou", *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Score of `a` minus that of `b`, with its interval; on the seeds that both have, or on all where one has none.

    Raises:
        ValueError: Their groups differ.
    """
    if a.groups != b.groups:
        raise ValueError(f"systems were tested on other groups: {len(a.groups)} and {len(b.groups)}")
    first, second = _values(a, what), _values(b, what)
    score = {"iou": iou, "dice": dice, "nll": nll}[what]
    shared = [one for one in a.seeds if one in b.seeds]
    if shared:
        first = first[[a.seeds.index(one) for one in shared]]
        second = second[[b.seeds.index(one) for one in shared]]
    generator = np.random.default_rng(seed)
    groups = _times(generator, len(a.groups), resamples)
    one = _times(generator, len(first), resamples)
    other = one if shared else _times(generator, len(second), resamples)
    drawn = _resampled(first, groups, one, score) - _resampled(second, groups, other, score)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(_pooled(first, score) - _pooled(second, score), float(low), float(high))


def _times(generator: np.random.Generator, units: int, resamples: int) -> Floats:
    """How often each unit is drawn in each resample, `(resamples, units)`."""
    return generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def _resampled(values: Floats, groups: Floats, seeds: Floats, score: Callable[[Floats], Floats]) -> Floats:
    """Score of each resample, `(resamples,)`: of what is summed over the drawn groups, mean over the drawn seeds."""
    sums = np.einsum("rg,sg...->rs...", groups, values)
    found: Floats = (score(sums) * seeds).sum(axis=1) / seeds.sum(axis=1)
    return found


def pooled(table: Table, what: str = "iou") -> float:
    """The score over all groups, mean over seeds."""
    return _pooled(_values(table, what), {"iou": iou, "dice": dice, "nll": nll}[what])


def _values(table: Table, what: str) -> Floats:
    return table.losses if what == "nll" else table.counts
