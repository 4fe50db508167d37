"""Masks cleaned: opening and closing with a disc, small components removed, holes filled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy.typing as npt

    from smp_ensemble.ensembling.postprocessing import PostProcessing
    from smp_ensemble.typing import Mode

    Plane = npt.NDArray[np.bool_]
    Mask = npt.NDArray[np.uint8]

_EIGHT = np.ones((3, 3), dtype=bool)
_FOUR = ndimage.generate_binary_structure(2, 1)


def check(settings: PostProcessing, mode: Mode) -> None:
    """Refuses settings that mean nothing in a mode.

    Raises:
        ConfigError: Opening or closing in multiclass mode, where classes would overlap or leave pixels without any.
    """
    if mode == "multiclass" and (settings.opening or settings.closing):
        raise ConfigError(
            f"expected no opening or closing in multiclass mode, got opening={settings.opening}, "
            f"closing={settings.closing}: use min_area and max_hole, or a CRF"
        )


def clean(mask: Mask, mode: Mode, settings: PostProcessing) -> Mask:
    """Opening, closing, minimum area, holes, in this order; the CRF is `inference.crf.refine`, before there is a mask.

    Binary mode cleans the foreground, multilabel mode each plane like a binary mask:

    - Opening keeps what a disc fits into; closing fills what no disc fits into outside. The disc of radius r holds the
      pixels at most r from its centre; it may stick out of the image.
    - A component of the foreground (8-connected) of fewer than `min_area` pixels becomes background.
    - A hole is a component of the background (4-connected) that does not touch the image's border; one of at most
      `max_hole` pixels becomes foreground.

    Multiclass mode refuses opening and closing, and treats all classes alike, background too:

    - A component of any class (8-connected) of fewer than `min_area` pixels takes the class that is most frequent
      among the pixels around it (8 neighbours, each pixel once; the lower class where two are equal). Pixels of other
      small components have no vote: a component without voters waits until those around it have their class, and
      stays as it is if there are none.
    - For each class, lower ones first, the other classes are the background whose holes are filled. So a small island
      of one class within one other class goes to that other class.

    Rejected pixels (255) stay 255, belong to no component, and are like the outside of the image: they are no reason to
    change a pixel. A disc may stick out into them, and background that touches one (4 neighbours) is no hole.

    Done again, each step alone does nothing more, and neither do minimum area and holes together, save in multiclass
    mode. There, and with all four steps, a second time may change more.

    Args:
        mask: Class ids, uint8 `(H, W)`; zeros and ones `(K, H, W)` in multilabel mode; 255 where rejected.
        mode: Says how to read the mask.
        settings: What to do; its CRF is not looked at.

    Returns:
        A new mask of the same shape and type.

    Raises:
        ConfigError: As `check`.

    Example:
        >>> from smp_ensemble.ensembling.postprocessing import PostProcessing
        >>> clean(np.array([[1, 0, 1], [1, 0, 0]], dtype=np.uint8), "binary", PostProcessing(min_area=2)).tolist()
        [[1, 0, 0], [1, 0, 0]]
    """
    check(settings, mode)
    if mode == "multiclass":
        return _clean_classes(mask, settings)
    if mode == "multilabel":
        return np.stack([_clean_plane(plane, settings) for plane in mask])
    return _clean_plane(mask, settings)


def _clean_plane(mask: Mask, settings: PostProcessing) -> Mask:
    rejected = mask == IGNORE_INDEX
    foreground = mask == 1
    if settings.opening:
        foreground = _open(foreground | rejected, settings.opening) & ~rejected
    if settings.closing:
        foreground = ~_open(~foreground, settings.closing) & ~rejected
    if settings.min_area > 1:
        labels, areas = _components(foreground, _EIGHT)
        foreground = (areas >= settings.min_area)[labels] & foreground
    if settings.max_hole:
        foreground |= _holes(foreground, rejected, settings.max_hole)
    cleaned: Mask = foreground.astype(np.uint8)
    cleaned[rejected] = IGNORE_INDEX
    return cleaned


def _clean_classes(mask: Mask, settings: PostProcessing) -> Mask:
    cleaned = mask.copy()
    rejected = mask == IGNORE_INDEX
    if settings.min_area > 1:
        _give_away_small(cleaned, settings.min_area)
    if settings.max_hole:
        for index in np.unique(cleaned[~rejected]):
            cleaned[_holes(cleaned == index, rejected, settings.max_hole)] = index
    return cleaned


def _erode(plane: Plane, radius: int) -> Plane:
    """Where the whole disc, as far as it lies in the image, lies in the plane.

    The disc is a stack of rows, longest in the middle: rows are shortened once for all, then laid over each other.
    """
    height = len(plane)
    eroded, rows, reach = np.ones_like(plane), plane.copy(), 0
    for up in range(radius, -1, -1):
        while reach < math.isqrt(radius**2 - up**2):
            reach += 1
            rows[:, reach:] &= plane[:, :-reach]
            rows[:, :-reach] &= plane[:, reach:]
        inside = max(height - up, 0)
        eroded[up:] &= rows[:inside]
        eroded[:inside] &= rows[up:]
    return eroded


def _open(plane: Plane, radius: int) -> Plane:
    """The union of all discs that lie in the plane."""
    opened: Plane = ~_erode(~_erode(plane, radius), radius)
    return opened


def _components(plane: Plane, structure: Plane) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Components from 1 on `(H, W)`, and the area of each; 0 is what lies outside the plane."""
    labels, _ = ndimage.label(plane, structure)
    return labels, np.bincount(labels.ravel())


def _holes(plane: Plane, rejected: Plane, max_hole: int) -> Plane:
    """Holes of at most `max_hole` pixels, apart from those that touch the border or a rejected pixel."""
    labels, areas = _components(~(plane | rejected), _FOUR)
    small: Plane = np.asarray(areas <= max_hole)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[edge] = False
    if rejected.any():
        small[labels[ndimage.binary_dilation(rejected, _FOUR)]] = False
    small[0] = False
    holes: Plane = small[labels]
    return holes


def _give_away_small(mask: Mask, min_area: int) -> None:
    """Gives components of fewer than `min_area` pixels to the classes around them, in place; rule as in `clean`."""
    # A frame of rejected pixels, so that every pixel has eight neighbours, as steps in the flat array.
    framed = np.pad(mask, 1, constant_values=IGNORE_INDEX)
    labels = np.zeros(framed.shape, dtype=np.int64)
    count = 0
    for index in np.unique(mask[mask != IGNORE_INDEX]):
        found, number = ndimage.label(framed == index, _EIGHT)
        labels += np.where(found > 0, found + count, 0)
        count += number
    steps = [y * framed.shape[1] + x for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    values, owners = framed.ravel(), labels.ravel()
    areas = np.bincount(owners)
    pending = areas < min_area
    pending[0] = False
    # Pixels of small components, one component after the other.
    places = np.flatnonzero(pending[owners])
    places = places[np.argsort(owners[places], kind="stable")]
    starts = np.cumsum(np.where(pending, areas, 0)) - areas
    asked = places
    while len(asked):
        heard, winners = _elect(asked, steps, values, owners, pending)
        settled = places[np.repeat(starts[heard], areas[heard]) + _counted(areas[heard])]
        values[settled] = np.repeat(winners, areas[heard])
        pending[heard] = False
        near = np.unique(np.concatenate([owners[settled + step] for step in steps]))
        near = near[pending[near]]
        asked = places[np.repeat(starts[near], areas[near]) + _counted(areas[near])]
    mask[...] = framed[1:-1, 1:-1]


def _counted(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, ... for each of several lengths in turn: [2, 3] gives [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    counted: npt.NDArray[np.int64] = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    return counted


def _elect(
    asked: npt.NDArray[np.int64], steps: list[int], values: Mask, owners: npt.NDArray[np.int64], pending: Plane
) -> tuple[npt.NDArray[np.int64], Mask]:
    """The components of the pixels `asked` that have voters around them, and the class that each one's voters elect."""
    ballots = []
    for step in steps:
        around = asked + step
        votes = (values[around] != IGNORE_INDEX) & ~pending[owners[around]]
        ballots.append(owners[asked[votes]] * values.size + around[votes])
    # Each pixel around a component votes once, however many of the component's pixels it touches.
    owner, voter = np.divmod(np.unique(np.concatenate(ballots)), values.size)
    choices, counts = np.unique(owner * (IGNORE_INDEX + 1) + values[voter], return_counts=True)
    owner, choice = np.divmod(choices, IGNORE_INDEX + 1)
    order = np.lexsort((choice, -counts, owner))
    heard, first = np.unique(owner[order], return_index=True)
    return heard, choice[order][first].astype(np.uint8)
