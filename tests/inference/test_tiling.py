"""Tiles cover every pixel, their shares sum to one, and blending is the weighted mean over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import nn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.tiling import SIGMA, Blender, gaussian, make_grid, shares

grids = st.builds(
    make_grid,
    st.integers(1, 70),
    st.integers(1, 70),
    tile=st.integers(1, 40),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7]),
    stride=st.sampled_from([1, 4, 32]),
)


def blend(grid, tiles, sigma=SIGMA) -> torch.Tensor:
    """All rows that the blender hands out, from tiles by row and column."""
    blender, rows = Blender(grid, sigma), []
    for row in range(len(grid.tops)):
        for column in range(len(grid.lefts)):
            blender.add(row, column, tiles[row][column])
        rows.append(blender.take(row))
    return torch.cat(rows, dim=1)


def cut(grid, image) -> list[list[torch.Tensor]]:
    high, wide = grid.tile_height, grid.tile_width
    return [[image[..., top : top + high, left : left + wide] for left in grid.lefts] for top in grid.tops]


@given(grids)
def test_tiles_cover_the_image_and_end_with_it(grid):
    covered = np.zeros((grid.height, grid.width), dtype=int)
    for top in grid.tops:
        for left in grid.lefts:
            covered[top : top + grid.tile_height, left : left + grid.tile_width] += 1
    assert covered.min() >= 1
    assert covered.sum() == grid.tiles * grid.tile_height * grid.tile_width  # none sticks out
    assert grid.tops[-1] + grid.tile_height == grid.height
    assert list(grid.tops) == sorted(set(grid.tops))


@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from([1, 8, 32]))
def test_a_tile_is_rounded_up_to_the_stride_and_no_larger_than_the_image(length, tile, stride):
    grid = make_grid(length, length, tile, 0.25, stride)
    assert grid.tile_height == length or (grid.tile_height % stride == 0 and 0 <= grid.tile_height - tile < stride)


@given(grids)
def test_rows_that_are_finished_are_those_that_no_later_tile_reaches(grid):
    for row in range(len(grid.tops)):
        later = grid.tops[row + 1 :]
        assert grid.finished(row) == (min(later) if later else grid.height)
        reaching = [one for one, top in enumerate(grid.tops) if top + grid.tile_height > grid.finished(row)]
        assert grid.first_row(grid.finished(row)) == (min(reaching) if reaching else len(grid.tops))


@given(grids, st.sampled_from([0.125, 0.25]))
def test_shares_sum_to_one_everywhere(grid, sigma):
    total = np.zeros(grid.height)
    for start, share in zip(grid.tops, shares(grid.tops, grid.tile_height, sigma), strict=True):
        total[start : start + grid.tile_height] += share
    np.testing.assert_allclose(total, 1, atol=3e-7)


@given(grids, st.floats(0, 1, width=32))
def test_constant_probabilities_come_back(grid, value):
    tiles = cut(grid, torch.full((2, grid.height, grid.width), value))
    torch.testing.assert_close(
        blend(grid, tiles), torch.full((2, grid.height, grid.width), value), atol=1e-6, rtol=1e-6
    )


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_single_tile_comes_back_bit_for_bit(height, width):
    grid = make_grid(height, width, tile=32)
    values = torch.rand(3, height, width)
    assert torch.equal(blend(grid, [[values]]), values)


@given(grids, st.integers(0, 99))
def test_blending_is_the_formula_on_the_full_array(grid, seed):
    generator = np.random.default_rng(seed)
    shape = (2, grid.tile_height, grid.tile_width)
    tiles = [[generator.random(shape, dtype=np.float32) for _ in grid.lefts] for _ in grid.tops]
    weights = np.outer(gaussian(grid.tile_height), gaussian(grid.tile_width))
    above, below = np.zeros((2, grid.height, grid.width)), np.zeros((grid.height, grid.width))
    for top, row in zip(grid.tops, tiles, strict=True):
        for left, values in zip(grid.lefts, row, strict=True):
            place = np.s_[..., top : top + grid.tile_height, left : left + grid.tile_width]
            above[place] += weights * values
            below[place] += weights
    found = blend(grid, [[torch.from_numpy(values) for values in row] for row in tiles])
    np.testing.assert_allclose(found.numpy(), above / below, atol=2e-6)


def monai_weights(side: int) -> torch.Tensor:
    """Our weights for MONAI, whose own are cut off from below at 0.001."""
    line = torch.from_numpy(gaussian(side)).float()
    return torch.outer(line, line)[None, None]


@pytest.mark.parametrize("sigma", [0.125, 0.25])
@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"), [(97, 130, 32, 0.25), (64, 41, 16, 0.5), (50, 99, 40, 0)]
)
def test_it_equals_monais_sliding_window(height, width, tile, overlap, sigma):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 5, padding=2), nn.Sigmoid())
    image = torch.rand(1, 3, height, width)
    grid = make_grid(height, width, tile, overlap)
    chosen = {"roi_weight_map": monai_weights(tile)} if sigma == SIGMA else {"sigma_scale": sigma}
    with torch.inference_mode():
        tiles = [[module(one)[0] for one in row] for row in cut(grid, image)]
        expected = sliding_window_inference(
            image, (tile, tile), sw_batch_size=3, predictor=module, overlap=overlap, mode="gaussian", **chosen
        )
    torch.testing.assert_close(blend(grid, tiles, sigma), expected[0], atol=1e-5, rtol=0)


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([0.25, 0.5]))
def test_no_step_where_a_tile_begins_or_ends(seed, overlap):
    """Where tiles disagree, one fades into the other; at their borders there is next to nothing to see."""
    side = 64
    step = int(side * (1 - overlap))
    grid = make_grid(side, side + 3 * step, tile=side, overlap=overlap)
    levels = np.random.default_rng(seed).random(len(grid.lefts), dtype=np.float32)
    tiles = [[torch.full((1, side, side), float(level)) for level in levels]]
    steps = blend(grid, tiles).diff(dim=2).abs()
    borders = [column for left in grid.lefts for column in (left, left + side) if 0 < column < grid.width]
    assert steps[..., [column - 1 for column in borders]].max() <= 0.01
    # Two Gaussians share a pixel by the logistic function of x * step / sigma^2: its slope is at most a quarter of it.
    steepest = step / (SIGMA * side) ** 2 / 4
    assert steps.max() <= steepest * np.abs(np.diff(levels)).max() + 1e-6


@pytest.mark.parametrize("tile", [0, -3, 2.5, True])
def test_a_tile_is_a_whole_number_above_zero(tile):
    with pytest.raises(ConfigError, match="expected tile as a whole number of pixels above 0, got"):
        make_grid(10, 10, tile)


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5, float("nan")])
def test_an_overlap_is_a_share_below_one(overlap):
    with pytest.raises(ConfigError, match="expected overlap as a share of the tile, from 0 to below 1, got"):
        make_grid(10, 10, 8, overlap)


def test_nothing_is_taken_before_a_tile_is_added():
    blender = Blender(make_grid(10, 10, 8))
    assert blender.empty
    with pytest.raises(ConfigError, match="expected a tile to be added"):
        blender.take(0)
