"""An image as rows of pixels that are read from the top, with what is no data told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


@dataclass(frozen=True)
class Rows:
    """Some rows of an image.

    Attributes:
        pixels: Shape `(C, rows, W)`; 0 where there is no data.
        valid: Which pixels are data, bool `(rows, W)`; None: all.
    """

    pixels: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_] | None = None

    def of(self, rows: slice) -> Rows:
        """Some of these rows."""
        return Rows(self.pixels[:, rows], None if self.valid is None else self.valid[rows])


@dataclass(frozen=True)
class Place:
    """Where on Earth an image lies, as rasterio holds it: coordinate system, transform, or control points instead."""

    crs: Any = None
    transform: Any = None
    gcps: Any = None
    rpcs: Any = None


class ImageRows(Protocol):
    """An open image: its size in pixels, C, the type of its pixels, where it lies if it says so, and its rows."""

    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    place: Place | None

    def read(self, top: int, bottom: int) -> Rows:
        """Its rows from `top` to before `bottom`."""
        ...


def separate(
    pixels: npt.NDArray[Any],
    nodata: Sequence[float | None],
    mask: npt.NDArray[np.bool_] | None = None,
) -> Rows:
    """Tells data from what is none, and sets the latter to 0.

    A pixel is no data where every band has its nodata value, where any band is not finite, or where the mask says so.

    Args:
        pixels: Shape `(C, rows, W)`.
        nodata: The value of each band that means no data; None: the band has none.
        mask: Which pixels the image itself calls data, `(rows, W)`; None: it does not say.

    Example:
        >>> rows = separate(np.array([[[7, 7]], [[7, 1]]], dtype=np.uint8), (7, 7))
        >>> rows.valid.tolist(), rows.pixels.tolist()
        ([[False, True]], [[[0, 7]], [[0, 1]]])
    """
    valid = np.ones(pixels.shape[1:], dtype=bool) if mask is None else mask.copy()
    if all(value is not None for value in nodata):
        valid &= np.any([band != value for band, value in zip(pixels, nodata, strict=True)], axis=0)
    if pixels.dtype.kind == "f":
        valid &= np.isfinite(pixels).all(axis=0)
    if valid.all():
        return Rows(pixels)
    return Rows(np.where(valid, pixels, pixels.dtype.type(0)), valid)


class Strip:
    """The rows of an image that lie under one row of tiles; what the next row needs too is kept, not read again."""

    def __init__(self, image: ImageRows) -> None:
        self._image = image
        self._top = self._bottom = 0
        self._rows: Rows | None = None

    def move(self, top: int, bottom: int) -> Rows:
        """Rows `top` to before `bottom`; neither may be less than before."""
        new = self._image.read(max(top, self._bottom), bottom)
        kept = self._rows is not None and top < self._bottom
        self._rows = _stack(self._rows.of(slice(top - self._top, None)), new) if self._rows and kept else new
        self._top, self._bottom = top, bottom
        return self._rows


def _stack(above: Rows, below: Rows) -> Rows:
    pixels = np.concatenate([above.pixels, below.pixels], axis=1)
    if above.valid is None and below.valid is None:
        return Rows(pixels)
    valid = [np.ones(one.pixels.shape[1:], bool) if one.valid is None else one.valid for one in (above, below)]
    return Rows(pixels, np.concatenate(valid))
