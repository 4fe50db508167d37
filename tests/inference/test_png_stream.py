"""A PNG that was written row by row is what Pillow reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smp_ensemble.inference.png_stream import write_png


@settings(max_examples=30)
@given(st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(0, 99))
def test_pillow_reads_what_was_written(tmp_path_factory, bands, height, width, rows, seed):
    path = tmp_path_factory.mktemp("png") / "one.png"
    pixels = np.random.default_rng(seed).integers(0, 256, (bands, height, width), dtype=np.uint8)
    write_png(path, (pixels[:, top : top + rows] for top in range(0, height, rows)), pixels.shape)
    with Image.open(path) as picture:
        assert picture.mode == ("L" if bands == 1 else "RGB")
        found = np.asarray(picture).reshape(height, width, bands)
    assert np.array_equal(found, pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("bands", [1, 3])
def test_it_is_about_as_small_as_pillows(tmp_path, bands):
    generator = np.random.default_rng(0)
    if bands == 1:  # class ids
        pixels = np.kron(generator.integers(0, 5, (1, 10, 15)), np.ones((1, 20, 20))).astype(np.uint8)
    else:  # colours that change little from pixel to pixel
        pixels = np.cumsum(generator.integers(-2, 3, (3, 200, 300)), axis=2).clip(0, 255).astype(np.uint8)
    write_png(tmp_path / "ours.png", [pixels], pixels.shape)
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(tmp_path / "pillow.png")
    assert (tmp_path / "ours.png").stat().st_size < 1.5 * (tmp_path / "pillow.png").stat().st_size
