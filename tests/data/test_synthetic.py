from __future__ import annotations

import numpy as np
import pytest

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.synthetic import CLASS_NAMES, SceneImage, SceneMask, describe_synthetic
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import MODES


def test_options_have_defaults_and_are_spelled_out():
    source, description = describe_synthetic("", None)
    assert source == "synthetic:count=120,size=128,seed=0,mode=binary"
    assert len(description.records) == 120
    assert describe_synthetic("size=64, count=3,seed=9,mode=multilabel", "binary")[0] == (
        "synthetic:count=3,size=64,seed=9,mode=binary"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("count=0", "a whole number of at least 1 as count, found '0'"),
        ("size=x", "a whole number of at least 32 as size, found 'x'"),
        ("sizes=64", "expected key=value, found 'sizes=64': did you mean 'size'"),
        ("64", "expected key=value, found '64'"),
        ("mode=binry", "unknown mode 'binry': did you mean 'binary'"),
        ("seed=-1", "a whole number of at least 0 as seed, found '-1'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        describe_synthetic(options, None)


@pytest.mark.parametrize("mode", MODES)
def test_masks_fit_their_mode(mode):
    data = load_data("synthetic:count=12,size=64", mode=mode)
    image, mask = data.train.read(0)
    assert (image.shape, image.dtype) == ((64, 64, 3), np.uint8)
    assert mask.shape == ((64, 64, 3) if mode == "multilabel" else (64, 64))
    assert mask.dtype == np.uint8
    assert data.task.class_names == CLASS_NAMES[mode]
    assert data.train.class_presence.any(axis=0)[:2].all()


def test_modes_share_their_images_and_buildings():
    binary, cover, layers = (SceneMask(0, 3, 64, mode).read() for mode in MODES)
    np.testing.assert_array_equal(binary, cover == 1)
    np.testing.assert_array_equal(binary, layers[..., 0])
    np.testing.assert_array_equal(layers[..., 1], cover == 2)


def test_pixels_that_were_read_may_be_changed():
    SceneImage(0, 0, 32).read()[:] = 0
    assert SceneImage(0, 0, 32).read().any()
