"""Masks made visible."""

from __future__ import annotations

import numpy as np
import pytest

from smp_ensemble.inference.overlay import PALETTE, colour, draw_overlay, to_rgb
from smp_ensemble.typing import IGNORE_INDEX

IMAGE = np.full((2, 3, 3), 100, dtype=np.uint8)


def blended(*layers: int, opacity: float = 0.45) -> list[int]:
    """What a pixel of 100 becomes under the colours of classes, one over the other."""
    pixel = np.full(3, 100.0)
    for layer in layers:
        pixel = (1 - opacity) * pixel + opacity * PALETTE[layer].astype(float)
    return pixel.round().astype(int).tolist()


def test_colours_differ_and_repeat_after_the_palette():
    assert len({tuple(one) for one in PALETTE.tolist()}) == len(PALETTE)
    assert np.array_equal(colour(len(PALETTE) + 2), colour(2))


def test_binary_colours_the_foreground_alone():
    mask = np.array([[0, 1, 0], [IGNORE_INDEX, 0, 1]], dtype=np.uint8)
    drawn = draw_overlay(IMAGE, mask, "binary")
    assert drawn.dtype == np.uint8
    assert drawn.shape == (2, 3, 3)
    for pixel, value in zip(drawn.reshape(-1, 3), mask.flatten(), strict=True):
        assert pixel.tolist() == (blended(0) if value == 1 else [100] * 3)


def test_multiclass_colours_every_class_but_ignored_pixels():
    mask = np.array([[0, 1, 2], [IGNORE_INDEX, 9, 0]], dtype=np.uint8)
    drawn = draw_overlay(IMAGE, mask, "multiclass")
    assert drawn[0].tolist() == [blended(0), blended(1), blended(2)]
    assert drawn[1].tolist() == [[100] * 3, blended(9 % len(PALETTE)), blended(0)]


def test_multilabel_layers_lie_over_each_other():
    mask = np.zeros((2, 2, 3), dtype=np.uint8)
    mask[0, 0] = 1
    mask[1, :, 0] = 1
    drawn = draw_overlay(IMAGE, mask, "multilabel")
    assert drawn[0].tolist() == [blended(0, 1), blended(0), blended(0)]
    assert drawn[1].tolist() == [blended(1), [100] * 3, [100] * 3]


@pytest.mark.parametrize("opacity", [0.0, 1.0])
def test_opacity_goes_from_the_image_to_the_colour(opacity):
    drawn = draw_overlay(IMAGE, np.ones((2, 3), dtype=np.uint8), "binary", opacity)
    assert np.array_equal(drawn, IMAGE if opacity == 0 else np.broadcast_to(PALETTE[0], IMAGE.shape))


def test_the_image_is_left_alone():
    image = IMAGE.copy()
    draw_overlay(image, np.ones((2, 3), dtype=np.uint8), "binary")
    assert np.array_equal(image, IMAGE)


def test_uint8_is_shown_as_it_is_and_grey_as_grey():
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(to_rgb(image), image[..., :3])
    for bands in (1, 2):
        assert np.array_equal(to_rgb(image[..., :bands]), np.repeat(image[..., :1], 3, axis=-1))


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_sensor_values_are_stretched(dtype):
    image = np.linspace(-100 if dtype != np.uint16 else 0, 3000, 4 * 5 * 3).reshape(4, 5, 3).astype(dtype)
    shown = to_rgb(image)
    assert shown.dtype == np.uint8
    assert (shown.min(), shown.max()) == (0, 255)
    assert np.all(np.diff(shown.astype(int).flatten()) >= 0)


def test_a_constant_image_can_be_shown():
    assert np.array_equal(to_rgb(np.full((2, 2, 3), 7.5, dtype=np.float32)), np.zeros((2, 2, 3), dtype=np.uint8))
