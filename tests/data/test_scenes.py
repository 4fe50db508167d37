from __future__ import annotations

import numpy as np
import pytest

from smp_ensemble.data.canvas import BUILDING, LAND, ROAD, VEGETATION
from smp_ensemble.data.scenes import draw_scene


def test_a_scene_is_a_function_of_seed_index_and_size():
    first = draw_scene(1, 2, 64)
    for one, other in zip(first, draw_scene(1, 2, 64), strict=True):
        np.testing.assert_array_equal(one, other)
    others = [draw_scene(1, 3, 64), draw_scene(2, 2, 64)]
    assert all((first.image != other.image).any() for other in others)


@pytest.mark.parametrize("size", [32, 100, 257])
def test_scenes_come_in_any_size(size):
    scene = draw_scene(0, 0, size)
    assert scene.image.shape == (size, size, 3)
    assert {layer.shape for layer in scene[1:]} == {(size, size)}
    assert (scene.image.dtype, scene.cover.dtype, scene.shadow.dtype) == (np.uint8, np.uint8, np.bool_)


def test_scenes_hold_what_they_promise():
    scenes = [draw_scene(0, index, 128) for index in range(12)]
    shares = np.mean([[(scene.cover == cover).mean() for cover in range(5)] for scene in scenes], axis=0)
    assert shares[LAND] > 0.3
    assert 0.08 < shares[BUILDING] < 0.3
    assert 0.08 < shares[ROAD] < 0.3
    assert 0.05 < shares[VEGETATION] < 0.3
    for scene in scenes:
        np.testing.assert_array_equal(scene.building, scene.cover == BUILDING)
        assert not (scene.shadow & scene.building).mean() > 0.02
    dark = np.mean([scene.image[scene.shadow].mean() for scene in scenes])
    bright = np.mean([scene.image[~scene.shadow].mean() for scene in scenes])
    assert dark < 0.8 * bright


def test_no_colour_gives_roofs_away():
    """Most roofs share their colours with something else: a threshold on one band is a poor classifier."""
    scenes = [draw_scene(0, index, 96) for index in range(12)]
    building = np.concatenate([scene.building.ravel() for scene in scenes])
    for band in range(3):
        values = np.concatenate([scene.image[..., band].ravel() for scene in scenes])
        ious = [
            (guess & building).sum() / (guess | building).sum()
            for threshold in range(40, 220, 20)
            for guess in (values > threshold, values < threshold)
        ]
        assert max(ious) < 0.4
