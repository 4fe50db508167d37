"""Tiles of an image, and how what they say is blended: geometry, and a buffer of one row of tiles that rolls down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

TILE = 512
OVERLAP = 0.25

SIGMA = 0.125
"""Of the Gaussian that weighs a tile's pixels, as a share of the tile's side: at its border 0.0003 of the middle."""


@dataclass(frozen=True)
class Grid:
    """Tiles of one size that cover an image: one at each of `tops` x `lefts`, in pixels.

    Attributes:
        height: Of the image.
        width: Of the image.
        tile_height: Of every tile.
        tile_width: Of every tile.
        tops: First row of each row of tiles, ascending.
        lefts: First column of each column of tiles, ascending.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """How many there are."""
        return len(self.tops) * len(self.lefts)

    def finished(self, row: int) -> int:
        """Up to which row of pixels nothing below row of tiles `row` reaches."""
        return self.tops[row + 1] if row + 1 < len(self.tops) else self.height

    def first_row(self, done: int) -> int:
        """The first row of tiles that reaches below the first `done` rows of pixels; the number of rows: none does."""
        reaching = (row for row, top in enumerate(self.tops) if top + self.tile_height > done)
        return next(reaching, len(self.tops))


def make_grid(height: int, width: int, tile: int = TILE, overlap: float = OVERLAP, stride: int = 1) -> Grid:
    """Tiles for an image of `height` x `width` pixels.

    A tile's side is `tile`, rounded up to a multiple of `stride`, or the image's where that is shorter. Tiles start
    every `int(side * (1 - overlap))` pixels (at least 1), and the last one is moved back to end with the image.

    Raises:
        ConfigError: The side is no whole number above 0, or the overlap not a share from 0 to below 1.

    Example:
        >>> grid = make_grid(100, 30, tile=62, overlap=0.25, stride=32)
        >>> grid.tile_height, grid.tile_width, grid.tops, grid.lefts
        (64, 30, (0, 36), (0,))
    """
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ConfigError(f"expected tile as a whole number of pixels above 0, got {tile!r}")
    if not 0 <= overlap < 1:
        raise ConfigError(f"expected overlap as a share of the tile, from 0 to below 1, got {overlap}")
    side = -(-tile // stride) * stride
    high, wide = min(side, height), min(side, width)
    return Grid(height, width, high, wide, _starts(height, high, overlap), _starts(width, wide, overlap))


def _starts(length: int, side: int, overlap: float) -> tuple[int, ...]:
    step = max(1, int(side * (1 - overlap)))
    count = -(-(length - side) // step) + 1
    return tuple(min(index * step, length - side) for index in range(count))


def gaussian(side: int, sigma: float = SIGMA) -> npt.NDArray[np.float64]:
    """Weights of the pixels along one side of a tile, `(side,)`; `sigma` is a share of the side."""
    offsets = np.arange(side) - (side - 1) / 2
    weights: npt.NDArray[np.float64] = np.exp(-0.5 * (offsets / (sigma * side)) ** 2)
    return weights


def shares(starts: tuple[int, ...], side: int, sigma: float = SIGMA) -> npt.NDArray[np.float32]:
    """What each tile counts for at each of its pixels along one axis, `(tiles, side)`; over tiles they sum to 1.

    Tiles are the product of rows and columns, and their weights are too, so the sum of weights is a product as well:
    each axis is normalised by itself, before anything is predicted. Where only one tile lies its share is exactly 1.

    Example:
        >>> shares((0, 1), 2).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    weights = gaussian(side, sigma)
    total = np.zeros(starts[-1] + side)
    for start in starts:
        total[start : start + side] += weights
    return np.stack([weights / total[start : start + side] for start in starts]).astype(np.float32)


class Blender:
    """Sums what tiles say, weighted, in a buffer of one row of tiles: `(K, tile height, image width)`, float32.

    Rows of tiles come from the top; once all tiles of one are added, `take` hands out the pixels that are final.

    Args:
        grid: The tiles.
        sigma: Of the Gaussian, as a share of the tile's side.

    Example:
        >>> grid = make_grid(3, 6, tile=4, overlap=0.5)
        >>> blender = Blender(grid)
        >>> for column in range(len(grid.lefts)):
        ...     blender.add(0, column, torch.full((1, 3, 4), 0.25))
        >>> blender.take(0).unique().tolist()
        [0.25]
    """

    def __init__(self, grid: Grid, sigma: float = SIGMA) -> None:
        self._grid = grid
        self._down = torch.from_numpy(shares(grid.tops, grid.tile_height, sigma))
        self._right = torch.from_numpy(shares(grid.lefts, grid.tile_width, sigma))
        self._sum: Tensor | None = None

    def add(self, row: int, column: int, values: Tensor) -> None:
        """Takes what one tile says, `(K, tile height, tile width)`."""
        if self._sum is None:
            self._sum = torch.zeros(len(values), self._grid.tile_height, self._grid.width)
        left = self._grid.lefts[column]
        place = self._sum[..., left : left + self._grid.tile_width]
        place.addcmul_(values, torch.outer(self._down[row], self._right[column]))

    @property
    def empty(self) -> bool:
        """Whether no tile was ever added: nothing can be taken then."""
        return self._sum is None

    def take(self, row: int) -> Tensor:
        """The rows of pixels `(K, rows, width)` that end with row of tiles `row`; makes room for the next row of tiles.

        Raises:
            ConfigError: No tile was ever added.
        """
        if self._sum is None:
            raise ConfigError("expected a tile to be added before rows are taken, got none")
        count = self._grid.finished(row) - self._grid.tops[row]
        rest = self._grid.tile_height - count
        done = self._sum[:, :count].clone()
        if rest:
            self._sum[:, :rest] = self._sum[:, count:].clone()
        self._sum[:, rest:] = 0
        return done
