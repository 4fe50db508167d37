"""Rows of an image: what is no data, and that a strip reads each row once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.inference.rows import Rows, Strip, separate
from smp_ensemble.inference.tiling import make_grid


class Counted:
    """An image in memory that counts how often each row is read."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.bands, self.height, self.width = rows.pixels.shape
        self.dtype, self.place = rows.pixels.dtype, None
        self.reads = np.zeros(self.height, dtype=int)

    def read(self, top: int, bottom: int) -> Rows:
        self.reads[top:bottom] += 1
        part = self._rows.of(slice(top, bottom))
        if part.valid is not None and part.valid.all():
            return Rows(part.pixels)
        return part


@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from([0, 0.25, 0.6]), st.booleans(), st.integers(0, 99))
def test_a_strip_is_the_rows_under_a_row_of_tiles_each_read_once(height, tile, overlap, partly, seed):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (2, height, 3), dtype=np.uint8)
    valid = generator.random((height, 3)) > 0.1 if partly else None
    image = Counted(Rows(pixels, valid))
    grid, strip = make_grid(height, 3, tile, overlap), Strip(image)
    for top in grid.tops:
        found = strip.move(top, top + grid.tile_height)
        assert np.array_equal(found.pixels, pixels[:, top : top + grid.tile_height])
        expected = np.ones_like(found.pixels[0], bool) if valid is None else valid[top : top + grid.tile_height]
        assert np.array_equal(np.ones_like(expected) if found.valid is None else found.valid, expected)
    assert (image.reads == 1).all()


def test_a_strip_may_begin_further_down():
    image = Counted(Rows(np.arange(20, dtype=np.uint8).reshape(1, 20, 1)))
    assert Strip(image).move(12, 16).pixels.ravel().tolist() == [12, 13, 14, 15]
    assert image.reads.sum() == 4


@pytest.mark.parametrize(
    ("pixels", "nodata", "mask", "valid"),
    [
        ([[0, 0, 5], [0, 3, 0]], (0, 0), None, [False, True, True]),
        ([[0, 0, 5], [0, 3, 0]], (None, None), None, [True, True, True]),
        ([[0, 0, 5], [0, 3, 0]], (0, None), None, [True, True, True]),
        ([[1, 2, 5], [1, 3, 1]], (None, None), [True, False, True], [True, False, True]),
        ([[np.nan, 2, 5], [1, np.inf, 1]], (None, None), None, [False, False, True]),
        ([[np.nan, -9, 5], [np.nan, -9, 1]], (-9, -9), [True, True, False], [False, False, False]),
    ],
)
def test_what_is_no_data(pixels, nodata, mask, valid):
    given_pixels = np.array(pixels, dtype=np.float32)[:, None]
    rows = separate(given_pixels, nodata, None if mask is None else np.array([mask]))
    found = np.ones(3, bool) if rows.valid is None else rows.valid[0]
    assert found.tolist() == valid
    assert np.array_equal(rows.pixels, np.where(valid, given_pixels, 0))
