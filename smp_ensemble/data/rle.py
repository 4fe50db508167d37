"""Run lengths, the contest's text form of a binary mask: `start length start length ...`.

Starts count from 1, pixels run down the columns (Fortran order), and an empty string means: no object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from smp_ensemble.exceptions import DataError

_MOST_DIGITS = 15  # far beyond any image, well within int64


def encode(mask: npt.NDArray[Any]) -> str:
    """Run lengths of a binary mask.

    Args:
        mask: Boolean, or integers 0 and 1, shape `(H, W)`.

    Raises:
        DataError: The mask is not two-dimensional, or holds anything but 0 and 1.

    Example:
        >>> encode(np.array([[0, 1], [1, 1]]))
        '2 3'
    """
    if mask.ndim != 2:
        raise DataError(f"run lengths: expected a mask of shape (H, W), found shape {mask.shape}")
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.size:
        raise DataError(f"run lengths: expected a mask of 0 and 1, found {strange[0]}; pass `mask == 1`")
    pixels = np.zeros(mask.size + 2, dtype=np.int8)
    pixels[1:-1] = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(pixels)) + 1
    edges[1::2] -= edges[::2]
    return " ".join(map(str, edges.tolist()))


def decode(runs: str, height: int, width: int) -> npt.NDArray[np.uint8]:
    """The binary mask that run lengths stand for.

    Args:
        runs: `start length start length ...`, ascending; runs may touch, but not overlap.
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        0 and 1, shape `(H, W)`.

    Raises:
        DataError: The text is not of that form, or a run lies beyond the image.

    Example:
        >>> decode("2 3", 2, 2).tolist()
        [[0, 1], [1, 1]]
    """
    if height < 1 or width < 1:
        raise DataError(f"run lengths: expected an image of at least 1x1 pixels, found {height}x{width}")
    pixels = height * width
    numbers = _numbers(runs.split(), pixels)
    starts, lengths = numbers[::2], numbers[1::2]
    ends = starts + lengths  # the first pixel after the run, counted from 1
    if late := np.flatnonzero(ends - 1 > pixels)[:1].tolist():
        raise _beyond(pixels, starts[late[0]], ends[late[0]] - 1)
    if back := np.flatnonzero(starts[1:] < ends[:-1])[:1].tolist():
        first = back[0]
        raise DataError(
            f"run lengths: expected ascending runs that do not overlap, found run {starts[first + 1]}.."
            f"{ends[first + 1] - 1} after run {starts[first]}..{ends[first] - 1}"
        )
    steps = np.zeros(pixels + 1, dtype=np.int8)
    steps[starts - 1] += 1
    steps[ends - 1] -= 1
    mask = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
    return np.ascontiguousarray(mask.reshape((height, width), order="F"))


def _numbers(words: list[str], pixels: int) -> npt.NDArray[np.int64]:
    if wrong := next((word for word in words if not (word.isascii() and word.isdigit() and word.strip("0"))), None):
        raise DataError(f"run lengths: expected positive whole numbers, found '{_short(wrong)}'")
    if len(words) % 2:
        raise DataError(f"run lengths: expected pairs of start and length, found {len(words)} numbers (an odd count)")
    if huge := next((word for word in words if len(word) > _MOST_DIGITS), None):
        raise DataError(f"run lengths: expected pixels 1..{pixels}, found {_short(huge)}")
    return np.array([int(word) for word in words], dtype=np.int64)


def _beyond(pixels: int, first: int, last: int) -> DataError:
    return DataError(
        f"run lengths: expected pixels 1..{pixels}, found run {first}..{last}; "
        "do the run lengths belong to an image of another size?"
    )


def _short(word: str) -> str:
    return word if len(word) <= 20 else f"{word[:17]}..."
