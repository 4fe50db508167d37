"""Which images train and which judge: pure functions of class presence, groups and a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Indices = npt.NDArray[np.int64]


def holdout_split(
    presence: npt.NDArray[np.bool_], groups: Sequence[str] | None, fractions: Sequence[float], seed: int
) -> tuple[Indices, ...]:
    """Sets parts of a data set apart, stratified by class presence; a group never falls into two parts.

    Args:
        presence: Which image holds which class, shape `(n, num_classes)`.
        groups: The group of each image, or None.
        fractions: The share of each part; 0 gives an empty part. With groups the shares are met as near as they allow.
        seed: Of the shuffle; use the same one whatever the training seed.

    Returns:
        Ascending indices of what is left, then of each part: `(train, val, test)` for two fractions.

    Raises:
        ConfigError: The fractions leave nothing, or there are fewer images or groups than parts.
    """
    if any(not 0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        raise ConfigError(f"holdout: expected fractions of at least 0 with a sum below 1, found {_listed(fractions)}")
    wanted = 1 + sum(fraction > 0 for fraction in fractions)
    _check_enough(len(presence), groups, wanted, f"a split into {wanted} parts")
    rest = np.arange(len(presence))
    parts: list[Indices] = []
    left, needed = 1.0, wanted
    for fraction in reversed(fractions):  # the last part (test) first: it is the same whatever is set apart after it
        chosen = np.zeros(0, dtype=np.int64)
        if fraction > 0:
            needed -= 1
            chosen = _set_apart(presence[rest], _taken(groups, rest), fraction / left, needed, seed)
        parts.insert(0, rest[chosen])
        rest = np.delete(rest, chosen)
        left -= fraction
    return (rest, *parts)


def fold_split(
    presence: npt.NDArray[np.bool_], groups: Sequence[str] | None, folds: int, seed: int
) -> list[tuple[Indices, Indices]]:
    """Cross-validation folds, stratified by class presence; a group never falls on both sides.

    Args:
        presence: Which image holds which class, shape `(n, num_classes)`.
        groups: The group of each image, or None.
        folds: How many; each image is left out in exactly one.
        seed: Of the shuffle; use the same one whatever the training seed.

    Returns:
        Ascending indices `(train, left out)` for each fold.

    Raises:
        ConfigError: Fewer than 2 folds, or fewer images or groups than folds.
    """
    if folds < 2:
        raise ConfigError(f"folds: expected at least 2, found {folds}")
    _check_enough(len(presence), groups, folds, f"{folds} folds")
    labels = _labels(presence, least=folds)
    if groups is None:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return _sorted(splitter.split(labels, labels))
    grouped = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    split = _sorted(grouped.split(labels, labels, np.asarray(groups)))
    if all(len(val) and len(train) for train, val in split):
        return split
    return _sorted(GroupKFold(folds).split(labels, labels, np.asarray(groups)))  # never empty


def bootstrap_split(images: int, groups: Sequence[str] | None, sample: int, seed: int) -> tuple[Indices, Indices]:
    """A bootstrap sample, drawn with replacement, and the images that it left out (out of bag).

    As many images are drawn as there are; with groups, as many groups, each with all of its images. A sample that
    leaves nothing out, which only a handful of images can give, is drawn again.

    Args:
        images: How many there are.
        groups: The group of each image, or None.
        sample: Which sample, from 0.
        seed: Of all samples; use the same one whatever the training seed.

    Returns:
        Ascending indices `(drawn, left out)`; an index that was drawn more than once comes more than once.

    Raises:
        ConfigError: Fewer than 2 images or groups.

    References:
        Breiman, "Bagging Predictors", Machine Learning 24, 1996.

    Example:
        >>> drawn, left_out = bootstrap_split(6, None, sample=0, seed=0)
        >>> drawn.tolist(), left_out.tolist()
        ([0, 1, 1, 3, 3, 5], [2, 4])
    """
    _check_enough(images, groups, 2, "a bootstrap sample")
    unit = np.arange(images) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(unit.max()) + 1
    generator = np.random.default_rng([seed, sample])
    drawn = np.zeros(units, dtype=np.int64)
    while drawn.sum() == 0 or drawn.all():
        drawn = np.bincount(generator.integers(units, size=units), minlength=units)
    times = drawn[unit]
    return np.repeat(np.arange(images), times), np.flatnonzero(times == 0)


def check_part(folds: int | None, bootstrap: int | None, fold: int | None) -> None:
    """Refuses numbers of folds or bootstrap samples, and of one of them, that make no sense.

    Raises:
        ConfigError: Both are given, or neither but a `fold`, or too few, or `fold` is not one of them.
    """
    if folds is not None and bootstrap is not None:
        raise ConfigError(f"folds={folds} and bootstrap={bootstrap} both divide the training images: leave one out")
    if folds is not None and folds < 2:
        raise ConfigError(f"folds: expected at least 2, found {folds}")
    if bootstrap is not None and bootstrap < 1:
        raise ConfigError(f"bootstrap: expected at least 1 sample, found {bootstrap}")
    if fold is None:
        return
    parts = folds if folds is not None else bootstrap
    if parts is None:
        raise ConfigError(f"fold={fold} is one of what: pass folds=N or bootstrap=N too")
    if not 0 <= fold < parts:
        what = "folds" if folds is not None else "bootstrap samples"
        raise ConfigError(f"fold: expected 0..{parts - 1} for {parts} {what}, found {fold}")


def _set_apart(
    presence: npt.NDArray[np.bool_], groups: Sequence[str] | None, fraction: float, parts_left: int, seed: int
) -> Indices:
    """Indices of about `fraction` of the images, leaving at least `parts_left` images or groups."""
    count = len(presence)
    if groups is None:
        size = min(max(1, round(fraction * count)), count - parts_left)
        labels = _labels(presence, least=2, most_kinds=min(size, count - size))
        splitter = StratifiedShuffleSplit(1, test_size=size, train_size=count - size, random_state=seed)
        return np.sort(next(splitter.split(labels, labels))[1])
    spare = len(set(groups)) - parts_left
    folds = min(len(set(groups)), max(2, round(1 / min(fraction, 1 - fraction))))
    candidates = [side for pair in fold_split(presence, groups, folds, seed) for side in pair]
    groups_of = np.asarray(groups)
    fitting = [side for side in candidates if len(np.unique(groups_of[side])) <= spare]
    return min(fitting, key=lambda side: abs(len(side) - fraction * count))


def _labels(presence: npt.NDArray[np.bool_], least: int, most_kinds: int | None = None) -> Indices:
    """One label for each image: the class it holds that the fewest images hold.

    The rarest labels are merged until each has `least` images and there are at most `most_kinds`.
    """
    images_with = presence.sum(axis=0)
    rank = np.argsort(np.argsort(images_with, kind="stable"), kind="stable")
    nothing = presence.shape[1]
    labels: Indices = np.where(presence, rank, nothing).min(axis=1, initial=nothing)
    while True:
        kinds, counts = np.unique(labels, return_counts=True)
        if len(kinds) == 1 or (counts.min() >= least and len(kinds) <= (most_kinds or len(kinds))):
            return labels
        rarest, next_rarest = kinds[np.argsort(counts, kind="stable")[:2]]
        labels[labels == rarest] = next_rarest


def _check_enough(images: int, groups: Sequence[str] | None, needed: int, what: str) -> None:
    found, unit = (images, "images") if groups is None else (len(set(groups)), "groups")
    if found < needed:
        raise ConfigError(f"{what} needs at least {needed} {unit}, found {found}: use fewer parts, or bring more data")


def _taken(groups: Sequence[str] | None, indices: Indices) -> Sequence[str] | None:
    return None if groups is None else [groups[index] for index in indices]


def _sorted(pairs: Iterable[tuple[Indices, Indices]]) -> list[tuple[Indices, Indices]]:
    return [(np.sort(train), np.sort(val)) for train, val in pairs]


def _listed(fractions: Sequence[float]) -> str:
    return ", ".join(f"{fraction:g}" for fraction in fractions)
