from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.data.transforms import AUGMENTATIONS, TrainTransform
from smp_ensemble.exceptions import ConfigError


def pair(height=40, width=60, bands=3, dtype=np.uint8, layers=None):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 250, (height, width, bands)).astype(dtype)
    return image, rng.integers(0, 3, (height, width, *([layers] if layers else [])), dtype=np.uint8)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize(("bands", "layers"), [(1, None), (3, None), (3, 1), (4, 3), (5, None), (9, 7)])
def test_any_bands_types_and_masks(augment, dtype, bands, layers):
    image, mask = pair(bands=bands, dtype=dtype, layers=layers)
    transform = TrainTransform(48, fill=[10.0] * bands, augment=augment)
    for seed in range(3):
        out, out_mask = transform(image, mask, seed)
        assert (out.shape, out.dtype) == ((48, 48, bands), dtype)
        assert (out_mask.shape, out_mask.dtype) == ((48, 48, *mask.shape[2:]), np.uint8)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_same_seed_same_result_whatever_came_before(augment):
    image, mask = pair()
    before = image.copy(), mask.copy()
    one, other = (TrainTransform(32, fill=(1, 2, 3), augment=augment) for _ in range(2))
    first = [one(image, mask, seed) for seed in range(8)]
    second = [other(image, mask, seed) for seed in reversed(range(8))][::-1]
    for (image_a, mask_a), (image_b, mask_b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(image_a, image_b)
        np.testing.assert_array_equal(mask_a, mask_b)
    assert len({result.tobytes() for result, _ in first}) > 4
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_image_and_mask_move_together(augment):
    mask = np.zeros((50, 70), np.uint8)
    mask[10:30, 20:55] = 1
    image = (mask * 200)[..., None].repeat(2, axis=2)
    transform = TrainTransform(64, fill=(0, 0), augment=augment)
    for seed in range(20):
        out, out_mask = transform(image, mask, seed)
        known = out_mask != 255
        assert ((out[..., 0] > 100) == (out_mask == 1))[known].mean() > 0.985


@pytest.mark.parametrize("layers", [None, 2])
def test_padding_is_filled_and_ignored(layers):
    image, mask = pair(20, 30, 5, layers=layers)
    fill = (300.4, 7.5, 0.0, 1.0, 2.0)
    out, out_mask = TrainTransform(40, fill=fill, augment="none")(image.astype(np.uint16), mask, 4)
    padded = (out_mask if layers is None else out_mask[..., 0]) == 255
    assert padded.sum() == 40 * 40 - 20 * 30
    assert (out_mask[padded] == 255).all()
    np.testing.assert_array_equal(np.unique(out[padded], axis=0), [[300, 8, 0, 1, 2]])


def test_without_augmentation_a_crop_is_a_window():
    image, mask = pair()
    out, out_mask = TrainTransform(40, fill=(0, 0, 0), augment="none")(image, mask, 11)
    windows = [column for column in range(21) if np.array_equal(out, image[:, column : column + 40])]
    assert len(windows) == 1
    np.testing.assert_array_equal(out_mask, mask[:, windows[0] : windows[0] + 40])


def test_flips_reach_all_eight_symmetries():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    transform = TrainTransform(4, fill=(0,), augment="flips")
    found = {transform(image, image[..., 0], seed)[0].tobytes() for seed in range(100)}
    assert len(found) == 8


def test_scale_reaches_half_and_double():
    image = np.tile(np.arange(100, dtype=np.float32)[:, None, None], (1, 100, 1))
    transform = TrainTransform(40, fill=(0.0,))
    steps = [
        np.abs(np.gradient(transform(image, image[..., 0].astype(np.uint8), s)[0][..., 0])).max() for s in range(60)
    ]
    assert 0.4 < min(steps) < 0.6
    assert 1.7 < max(steps) < 2.2


def test_colour_changes_only_rgb_bytes():
    for bands, dtype, changed in ((3, np.uint8, True), (4, np.uint8, False), (3, np.uint16, False)):
        image = np.full((32, 32, bands), 90, dtype)
        image[..., 0] = 160
        transform = TrainTransform(16, fill=[0] * bands)
        colours = {transform(image, np.zeros((32, 32), np.uint8), seed)[0][8, 8].tobytes() for seed in range(10)}
        assert (len(colours) > 1) == changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop size: expected at least 1 pixel, found 0"),
        ({"augment": "flip"}, "unknown augmentation 'flip': did you mean 'flips'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainTransform(**({"crop_size": 8, "fill": (0, 0, 0)} | options))


def test_a_fill_of_other_bands_is_refused():
    with pytest.raises(ConfigError, match="fill: expected one value for each of 3 bands, found 1"):
        TrainTransform(8, fill=(0,))(*pair(), 0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(10, 70), st.integers(10, 70)),
    augment=st.sampled_from(sorted(AUGMENTATIONS)),
    outputs=st.sampled_from([1, 3]),
)
def test_planes_that_follow_the_pixels_still_do(seed, size, augment, outputs):
    """A float image is its own soft target: scaled, cropped, flipped and filled up, the two stay equal."""
    generator = np.random.default_rng(seed)
    image = generator.random((*size, 4), dtype=np.float32)
    mask = generator.integers(0, 2, size, dtype=np.uint8)
    transform = TrainTransform(32, fill=(2, 2, 2, 2), augment=augment)
    out, out_mask, planes = transform.with_planes(image, mask, image[..., :outputs].copy(), seed)
    assert (planes.shape, planes.dtype) == ((32, 32, outputs), np.float32)
    inside = out_mask != 255
    np.testing.assert_array_equal(planes[inside], out[..., :outputs][inside])
    assert np.isnan(planes[~inside]).all()
    for one, other in zip((out, out_mask), transform(image, mask, seed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_colour_leaves_planes_alone():
    image, mask = np.full((40, 40, 3), 120, np.uint8), np.zeros((40, 40), np.uint8)
    image[..., 0] = 30
    transform = TrainTransform(16, fill=(0, 0, 0))
    coloured = 0
    for seed in range(10):
        out, _, planes = transform.with_planes(image, mask, np.full((40, 40, 1), 0.25, np.float32), seed)
        np.testing.assert_array_equal(planes, np.float32(0.25))
        np.testing.assert_array_equal(out, transform(image, mask, seed)[0])
        coloured += not np.array_equal(out[0, 0], image[0, 0])
    assert coloured > 3


@pytest.mark.parametrize("shape", [(40, 60), (40, 59, 1)])
def test_planes_of_another_size_are_refused(shape):
    with pytest.raises(ConfigError, match=r"expected planes of shape \(40, 60\) and K, found"):
        TrainTransform(8, fill=(0, 0, 0)).with_planes(*pair(), np.zeros(shape, np.float32), 0)
