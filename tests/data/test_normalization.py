"""Normalisation: what goes into a network, as NumPy computes it, and back from plain numbers exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.data.normalization import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    KINDS,
    Normalization,
    imagenet,
    make_normalization,
)
from smp_ensemble.exceptions import ConfigError

finite = st.floats(-1e3, 1e3, width=32)
positive = st.floats(2**-10, 1e3, width=32)


@st.composite
def normalizations(draw) -> Normalization:
    bands = draw(st.integers(1, 5))
    mean = draw(st.lists(finite, min_size=bands, max_size=bands))
    std = draw(st.lists(positive, min_size=bands, max_size=bands))
    return Normalization(draw(st.sampled_from(KINDS)), mean, std, draw(positive))


def random_images(bands: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, bands, 6, 5), dtype=np.uint8)


def statistics(images: np.ndarray) -> dict[str, list[float]]:
    axes = (0, 2, 3)
    found = {
        "mean": images.mean(axes),
        "std": images.std(axes),
        "minimum": images.min(axes),
        "maximum": images.max(axes),
    }
    return {name: values.astype(float).tolist() for name, values in found.items()}


@given(normalizations())
def test_plain_numbers_come_back_exactly(normalization):
    again = Normalization.from_dict(json.loads(json.dumps(normalization.to_dict())))
    assert again.to_dict() == normalization.to_dict()
    for name in ("mean", "std", "maximum"):
        assert torch.equal(getattr(again, name), getattr(normalization, name))
    images = torch.rand(2, normalization.in_channels, 3, 3)
    assert torch.equal(again(images), normalization(images))


@given(normalizations().filter(lambda one: one.kind != "per-image"))
def test_it_is_the_formula(normalization):
    images = np.random.default_rng(0).uniform(0, 255, (2, normalization.in_channels, 3, 4)).astype(np.float32)
    mean, std = (getattr(normalization, name).double().numpy()[:, None, None] for name in ("mean", "std"))
    expected = (images / float(normalization.maximum) - mean) / std
    np.testing.assert_allclose(normalization(torch.from_numpy(images)), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float64, torch.bfloat16])
def test_any_type_of_image_gives_float32(dtype):
    images = torch.arange(48).reshape(1, 3, 4, 4)
    result = imagenet()(images.to(dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, imagenet()(images))


def test_imagenet_is_torchvisions():
    from torchvision.transforms.v2.functional import normalize

    images = torch.from_numpy(random_images())
    expected = normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(imagenet()(images), expected)
    with pytest.raises(ConfigError, match="is for 3 bands, the images have 4: use normalization=dataset"):
        imagenet(4)


@pytest.mark.parametrize("scale", [1, 40])
def test_dataset_statistics_give_zero_mean_and_unit_variance(scale):
    images = random_images(5).astype(np.float32) * scale
    result = make_normalization("dataset", 5, **statistics(images))(torch.from_numpy(images))
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-5, rtol=0)


def test_min_max_fills_0_to_1():
    images = random_images(2).astype(np.float32) * 9 - 500
    result = make_normalization("min-max", 2, **statistics(images))(torch.from_numpy(images))
    torch.testing.assert_close(result.amin((0, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.amax((0, 2, 3)), torch.ones(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("peak", "maximum"), [(200.0, 255.0), (255.0, 255.0), (4000.0, 4000.0)])
def test_none_divides_by_the_sensors_maximum(peak, maximum):
    statistic = [peak]
    normalization = make_normalization("none", 1, mean=statistic, std=statistic, minimum=statistic, maximum=statistic)
    assert normalization(torch.full((1, 1, 1, 1), maximum)).item() == 1.0


def test_per_image_takes_each_image_by_itself():
    images = torch.from_numpy(random_images())
    normalization = make_normalization("per-image", 3, **statistics(random_images()))
    result = normalization(images)
    torch.testing.assert_close(result.mean((2, 3)), torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std((2, 3), correction=0), torch.ones(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalization(images[2:3]), result[2:3])


@pytest.mark.parametrize("kind", ["dataset", "min-max", "per-image"])
def test_a_constant_band_stays_finite(kind):
    images = np.full((2, 1, 4, 4), 7, dtype=np.uint8)
    result = make_normalization(kind, 1, **statistics(images))(torch.from_numpy(images))
    assert torch.equal(result, torch.zeros_like(result))


@given(normalizations())
def test_the_raw_mean_is_what_becomes_zero(normalization):
    raw = torch.tensor(normalization.raw_mean())[None, :, None, None]
    expected = normalization.mean * normalization.maximum
    torch.testing.assert_close(raw.flatten(), expected)
    if normalization.kind != "per-image":
        scale = (normalization.mean.abs() / normalization.std)[:, None, None] + 1
        assert ((normalization(raw).abs() / scale) < 1e-5).all()


def test_statistics_move_with_the_module_but_are_no_weights():
    normalization = imagenet()
    assert normalization.state_dict() == {}
    assert {buffer.device.type for buffer in normalization.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 3), (1, 1, 4, 4)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match=r"expected images of shape \(N, 3, H, W\), got \("):
        imagenet()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kind", "mean", "std", "maximum", "message"),
    [
        ("imagnet", [0.0], [1.0], 255, "unknown normalization 'imagnet': did you mean 'imagenet'"),
        ("none", [0.0], [1.0, 1.0], 255, "one mean and one std for each band, got 1 and 2"),
        ("none", [], [], 255, "one mean and one std for each band, got 0 and 0"),
        ("none", [0.0], [0.0], 255, "std and maximum above 0"),
        ("none", [0.0], [-1.0], 255, "std and maximum above 0"),
        ("none", [0.0], [1e-60], 255, "std and maximum above 0"),
        ("none", [0.0], [1.0], 0, "std and maximum above 0"),
        ("none", [float("nan")], [1.0], 255, "finite numbers"),
        ("none", [0.0], [float("inf")], 255, "finite numbers"),
        ("none", [0.0], [1.0], float("nan"), "finite numbers"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(kind, mean, std, maximum, message):
    with pytest.raises(ConfigError, match=message):
        Normalization(kind, mean, std, maximum)


@pytest.mark.parametrize(
    "change", [{"mean": None}, {"mean": ["x"]}, {"std": 3}, {"maximum": "many"}, {"maximum": 10**400}, {"kind": "?"}]
)
def test_other_content_of_a_file_is_refused(change):
    with pytest.raises(ConfigError, match="normalization"):
        Normalization.from_dict({**imagenet().to_dict(), **change})
    with pytest.raises(ConfigError, match="expected a normalization with kind, mean, std and maximum"):
        Normalization.from_dict({"kind": "none"})


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown normalization 'datset': did you mean 'dataset'"):
        make_normalization("datset", 1, mean=[0.0], std=[1.0], minimum=[0.0], maximum=[1.0])
