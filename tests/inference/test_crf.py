"""The CRF: against all pairs of pixels written out in NumPy, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.ensembling.postprocessing import Crf
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference import crf as module
from smp_ensemble.inference.crf import refine

HEIGHT, WIDTH = 9, 12
WHOLE = 2 * max(HEIGHT, WIDTH) - 1
SMALL = Crf(iterations=3, window=5, colour_sigma=40.0)


def scene(seed: int, classes: int, bands: int = 3, size=(HEIGHT, WIDTH)):
    """An image and probabilities without any pattern; K is 1 for one class."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (*size, bands)).astype(np.uint8)
    probabilities = generator.random((classes, *size)).astype(np.float32) ** 3
    return image, probabilities / probabilities.sum(axis=0) if classes > 1 else probabilities


def dense(colours: np.ndarray, probabilities: np.ndarray, crf: Crf, *, window: int | None = None) -> np.ndarray:
    """Kraehenbuehl and Koltun's mean field for `probabilities` (L, H, W), every pair of pixels at once."""
    labels, height, width = probabilities.shape
    place = np.stack(np.mgrid[:height, :width], axis=-1).reshape(-1, 2).astype(float)
    colour = colours.reshape(height * width, -1).astype(float)
    apart = ((place[:, None] - place[None]) ** 2).sum(-1)
    contrast = 3 * ((colour[:, None] - colour[None]) ** 2).mean(-1)
    kernels = [
        (crf.position_weight, np.exp(-apart / (2 * crf.position_sigma**2))),
        (
            crf.bilateral_weight,
            np.exp(-apart / (2 * crf.bilateral_sigma**2) - contrast / (2 * crf.colour_sigma**2)),
        ),
    ]
    near = np.abs(place[:, None] - place[None]).max(-1) <= (window or WHOLE) // 2
    coupling = np.zeros_like(apart)
    for weight, kernel in kernels:
        total = (kernel * near).sum(axis=1)
        coupling += weight * kernel * near / np.sqrt(np.outer(total, total))
    np.fill_diagonal(coupling, 0)
    potts = 1 - np.eye(labels)
    energy = -np.log(np.clip(probabilities.reshape(labels, -1).astype(float), 1e-7, 1))
    belief = np.exp(-energy) / np.exp(-energy).sum(axis=0)
    for _ in range(crf.iterations):
        message = belief @ coupling
        belief = np.exp(-energy - potts @ message)
        belief /= belief.sum(axis=0)
    return belief.reshape(labels, height, width)


def dense_binary(colours, probabilities, crf, **options) -> np.ndarray:
    """Each channel with its complement, as a CRF of two labels."""
    return np.stack([dense(colours, np.stack([1 - one, one]), crf, **options)[1] for one in probabilities])


@pytest.mark.parametrize("mode", ["binary", "multilabel", "multiclass"])
@pytest.mark.parametrize("window", [WHOLE, 101, 5])
def test_it_is_the_dense_mean_field(mode, window):
    image, probabilities = scene(0, 1 if mode == "binary" else 4)
    crf = Crf(window=window, colour_sigma=60.0, position_weight=3.0, bilateral_weight=5.0)
    expected = (dense if mode == "multiclass" else dense_binary)(image, probabilities, crf, window=window)
    refined = refine(image, probabilities, mode, crf)
    assert refined.dtype == np.float32
    assert np.abs(refined - probabilities).max() > 0.3
    assert np.abs(refined - expected).max() < 1e-5


@given(st.integers(0, 99), st.sampled_from([1, 2, 5]), st.sampled_from([1, 3, 7]))
def test_any_number_of_classes_and_bands(seed, classes, bands):
    image, probabilities = scene(seed, classes, bands, size=(5, 4))
    mode = "multiclass" if classes > 1 else "binary"
    refined = refine(image, probabilities, mode, SMALL)
    expected = (dense if classes > 1 else dense_binary)(image, probabilities, SMALL, window=5)
    assert np.abs(refined - expected).max() < 1e-5
    if classes > 1:
        assert np.abs(refined.sum(axis=0) - 1).max() < 1e-6


def test_without_weights_probabilities_are_given_back():
    crf = Crf(position_weight=0, bilateral_weight=0)
    for mode, classes in (("binary", 1), ("multiclass", 4)):
        image, probabilities = scene(1, classes)
        probabilities[:, 0, 0] = np.eye(classes)[0] if classes > 1 else 0
        probabilities[:, 0, 1] = np.eye(classes)[-1]
        assert np.abs(refine(image, probabilities, mode, crf) - probabilities).max() < 1e-6


def test_two_classes_are_binary():
    image, probabilities = scene(2, 1)
    both = np.concatenate([1 - probabilities, probabilities])
    binary = refine(image, probabilities, "binary", SMALL)
    assert np.abs(refine(image, both, "multiclass", SMALL)[1:] - binary).max() < 1e-5


def test_channels_of_multilabel_mode_know_nothing_of_each_other():
    image, probabilities = scene(3, 3)
    together = refine(image, probabilities, "multilabel", SMALL)
    for index in range(3):
        alone = refine(image, probabilities[index : index + 1], "binary", SMALL)
        assert np.abs(together[index] - alone[0]).max() < 1e-6


def test_constant_images_keep_their_decisions_and_uniform_ones_their_probabilities():
    image = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    sure = np.full((1, HEIGHT, WIDTH), 0.6, dtype=np.float32)
    assert (refine(image, sure, "binary", Crf()) > 0.6).all(), "neighbours that agree make surer"
    assert (refine(image, 1 - sure, "binary", Crf()) < 0.4).all()
    for classes in (1, 4):
        even = np.full((classes, HEIGHT, WIDTH), 1 / max(classes, 2), dtype=np.float32)
        mode = "multiclass" if classes > 1 else "binary"
        assert np.abs(refine(image, even, mode, Crf()) - even).max() < 1e-6
    certain = np.zeros((4, HEIGHT, WIDTH), dtype=np.float32)
    certain[2] = 1
    assert np.abs(refine(image, certain, "multiclass", Crf()) - certain).max() < 1e-6


@given(st.integers(0, 99))
def test_it_turns_with_the_image_and_follows_the_order_of_classes(seed):
    image, probabilities = scene(seed, 3, size=(6, 5))
    refined = refine(image, probabilities, "multiclass", SMALL)
    flipped = refine(image[::-1], probabilities[:, ::-1], "multiclass", SMALL)
    assert np.abs(flipped[:, ::-1] - refined).max() < 1e-5
    turned = refine(image.transpose(1, 0, 2), probabilities.transpose(0, 2, 1), "multiclass", SMALL)
    assert np.abs(turned.transpose(0, 2, 1) - refined).max() < 1e-5
    mixed = refine(image, probabilities[[2, 0, 1]], "multiclass", SMALL)
    assert np.abs(mixed - refined[[2, 0, 1]]).max() < 1e-5


def test_a_noisy_prediction_is_cleaned_up_to_the_edge_of_colour():
    generator = np.random.default_rng(4)
    truth = np.zeros((40, 40), dtype=bool)
    truth[:, 17:] = True
    image = (np.where(truth, 150, 90)[..., None] + generator.normal(0, 5, (40, 40, 3))).astype(np.uint8)
    shifted = np.roll(truth, 2, axis=1)  # the network is two pixels late
    shifted[:, :2] = False
    noisy = 1 / (1 + np.exp(-(np.where(shifted, 1.0, -1.0) + generator.normal(0, 1.5, truth.shape))))
    wrong = (noisy >= 0.5) != truth
    strong = Crf(position_weight=3.0, bilateral_weight=5.0)
    refined = refine(image, noisy[None].astype(np.float32), "binary", strong)[0] >= 0.5
    assert wrong.mean() > 0.25
    assert wrong[:, 17:19].mean() > 0.6
    assert (refined != truth).mean() < 0.01
    assert (refined != truth)[:, 17:19].mean() < 0.15
    # Smoothing alone cannot know where the edge is.
    blind = Crf(position_weight=8.0, bilateral_weight=0)
    smoothed = refine(image, noisy[None].astype(np.float32), "binary", blind)[0] >= 0.5
    assert (smoothed != truth)[:, 17:19].mean() > 0.5


def test_sensor_values_are_stretched_band_by_band():
    grey, probabilities = scene(5, 1, bands=5, size=(20, 21))
    grey[:2, :, :], grey[-2:, :, :] = 0, 255  # both percentiles are at the ends
    expected = refine(grey, probabilities, "binary", SMALL)
    gains, offsets = np.array([3, 90, 256, 1, 17]), np.array([0, 4000, 0, 100, 7])
    for dtype in (np.uint16, np.int32, np.float32, np.float64):
        values = (grey.astype(int) * gains + offsets).astype(dtype)
        assert np.abs(refine(values, probabilities, "binary", SMALL) - expected).max() < 1e-5
    outlier = (grey.astype(int) * gains + offsets).astype(np.float32)
    outlier[-1, -1] = 1e9
    assert np.abs(refine(outlier, probabilities, "binary", SMALL) - expected).max() < 1e-5
    constant = np.full((20, 21, 2), 7e6, dtype=np.float32)
    assert np.isfinite(refine(constant, probabilities, "binary", SMALL)).all()


def test_a_setting_means_the_same_for_any_number_of_bands():
    image, probabilities = scene(6, 1, bands=1)
    expected = refine(image, probabilities, "binary", SMALL)
    for bands in (3, 8):
        assert np.abs(refine(image.repeat(bands, -1), probabilities, "binary", SMALL) - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_neither_tiles_nor_memory_change_anything(monkeypatch, dtype):
    image, probabilities = scene(7, 3, size=(50, 61))
    image = image.astype(dtype)
    crf = Crf(iterations=2, window=7, colour_sigma=40.0)
    expected = refine(image, probabilities, "multiclass", crf)
    monkeypatch.setattr(module, "TILE", 16)
    assert np.abs(refine(image, probabilities, "multiclass", crf) - expected).max() < 1e-6
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    assert np.array_equal(
        refine(image, probabilities, "multiclass", crf), refine(image, probabilities, "multiclass", crf)
    )
    assert np.abs(refine(image, probabilities, "multiclass", crf) - expected).max() < 1e-6


def test_arrays_are_left_alone_and_may_be_views():
    image, probabilities = scene(8, 3, size=(12, 10))
    kept = image.copy(), probabilities.copy()
    expected = refine(image, probabilities, "multiclass", SMALL)
    assert np.array_equal(image, kept[0])
    assert np.array_equal(probabilities, kept[1])
    views = np.asfortranarray(image)[::1], np.asfortranarray(probabilities)
    for array in views:
        array.flags.writeable = False
    assert np.array_equal(refine(*views, "multiclass", SMALL), expected)
    half = refine(image, probabilities.astype(np.float16), "multiclass", SMALL)
    assert half.dtype == np.float32
    assert np.abs(half - expected).max() < 0.02


def test_small_images_and_large_windows():
    for size in ((1, 1), (1, 7), (7, 1), (2, 2)):
        image, probabilities = scene(9, 1, size=size)
        expected = dense_binary(image, probabilities, Crf(window=51))
        assert np.abs(refine(image, probabilities, "binary", Crf(window=51)) - expected).max() < 1e-5


def test_sizes_must_fit():
    image, probabilities = scene(10, 1)
    with pytest.raises(InputError, match=r"got \(9, 11, 3\) and \(1, 9, 12\)"):
        refine(image[:, 1:], probabilities, "binary", SMALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    image, probabilities = scene(11, 3, size=(70, 90))
    expected = refine(image, probabilities, "multiclass", SMALL)
    assert np.abs(refine(image, probabilities, "multiclass", SMALL, device="cuda") - expected).max() < 1e-5
