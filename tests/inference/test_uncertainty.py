"""Uncertainty of a prediction: the engine's maps against NumPy, their means, and the heat map's colours."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.uncertainty import COLUMNS, draw_heatmap, image_means
from smp_ensemble.metrics.uncertainty import max_entropy
from smp_ensemble.typing import MODES


def make_ensemble(mode: str, count: int = 3, **options) -> Ensemble:
    torch.manual_seed(0)
    members = [nn.Conv2d(3, 1 if mode == "binary" else 3, 3, padding=1) for _ in range(count)]
    for member in members:
        member.weight.data /= 20
    return Ensemble(members, mode=mode, **options)


def make_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def entropy(probabilities: np.ndarray, mode: str) -> np.ndarray:
    """Nats `(N, H, W)`, of float64 probabilities `(N, K, H, W)`."""
    if mode == "multiclass":
        return -(probabilities * np.log(probabilities)).sum(axis=1)
    both = np.stack([probabilities, 1 - probabilities])
    return -(both * np.log(both)).sum(axis=0).mean(axis=1)


def maps_by_hand(mode: str, members: list[np.ndarray], weights: list[float], combined: np.ndarray) -> np.ndarray:
    """Shape `(N, 3, H, W)`, with all members in memory."""
    shares = np.array(weights) / np.sum(weights)
    mean = np.tensordot(shares, members, 1)
    information = entropy(mean, mode) - np.tensordot(shares, [entropy(one, mode) for one in members], 1)
    if mode == "multiclass":
        votes = np.stack([one.argmax(axis=1)[:, None] == np.arange(3)[None, :, None, None] for one in members])
        most = np.tensordot(shares, votes, 1).max(axis=1)
    else:
        foreground = np.tensordot(shares, [one >= 0.5 for one in members], 1)
        most = np.maximum(foreground, 1 - foreground).mean(axis=1)
    return np.stack([entropy(combined, mode), information, 1 - most], axis=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"weights": [3, 1, 0], "temperature": 1.7, "views": "flips"}])
def test_maps_are_those_of_all_members_at_once(mode, options):
    ensemble = make_ensemble(mode, **options)
    engine = Engine(ensemble, "cpu", "32")
    images = make_images((9, 14), (9, 14), (5, 3))
    found = engine.uncertainty(images)
    for image, maps in zip(images, found, strict=True):
        batch = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
        members = [one.double().numpy() for one in engine.member_probabilities(batch)]
        expected = maps_by_hand(mode, members, options.get("weights", [1, 1, 1]), engine(batch).double().numpy())
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps, expected[0], atol=2e-6)
        assert maps[0].max() <= max_entropy(mode, 3) + 1e-6


def test_one_member_agrees_with_itself():
    maps = Engine(make_ensemble("multiclass", 1), "cpu", "32").uncertainty(make_images((8, 8)))[0]
    np.testing.assert_allclose(maps[1:], 0, atol=1e-6)
    assert maps[0].min() > 0


@torch.inference_mode()
def test_each_pass_counts_as_a_member():
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8], "dropout": 0.5}
    members = [Member(create_network("unet", num_outputs=1, model_options=options), imagenet()) for _ in range(2)]
    engine = Engine(Ensemble(members, mode="binary", weights=[2, 1]), "cpu", "32", passes=4)
    image = make_images((16, 24))[0]
    raw = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    drawn = []
    for seed, member in enumerate(members):
        member.network.head_dropout.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batch = raw.float().contiguous(memory_format=torch.channels_last)
            drawn += [member(batch).sigmoid().double().numpy() for _ in range(4)]
        member.network.head_dropout.eval()
    expected = maps_by_hand("binary", drawn, [2] * 4 + [1] * 4, engine(raw).double().numpy())
    found = engine.uncertainty([image])[0]
    np.testing.assert_allclose(found, expected[0], atol=2e-6)
    assert found[1].mean() > 1e-4
    np.testing.assert_array_equal(found, engine.uncertainty([image])[0])


def test_cutting_batches_changes_nothing(monkeypatch):
    engine = Engine(make_ensemble("multilabel"), "cpu", "32")
    images = make_images((6, 8), (6, 8), (6, 8))
    whole = engine.uncertainty(images)
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", 1)
    np.testing.assert_allclose(engine.uncertainty(images), whole, atol=1e-6)


def test_what_is_no_image_is_refused():
    with pytest.raises(ConfigError, match=r"expected images of shape \(H, W, C\), image 0 has \(8, 8\)"):
        Engine(make_ensemble("binary"), "cpu", "32").uncertainty([np.zeros((8, 8), np.uint8)])


def test_means_are_one_number_for_each_map():
    maps = np.random.default_rng(0).random((3, 7, 5), dtype=np.float32)
    assert len(COLUMNS) == 3
    np.testing.assert_allclose(image_means(maps), [one.mean() for one in maps.astype(np.float64)], rtol=1e-12)


def test_the_heat_map_is_viridis():
    values = np.linspace(0, math.log(2), 512, dtype=np.float32).reshape(16, 32)
    picture = draw_heatmap(values, math.log(2))
    assert (picture.dtype, picture.shape) == (np.uint8, (16, 32, 3))
    expected = 255 * mpl.colormaps["viridis"](np.linspace(0, 1, 512))[:, :3].reshape(16, 32, 3)
    assert np.abs(picture - expected).max() < 6  # it is drawn from a seventeenth of its table


def test_the_heat_map_ends_at_the_limits():
    picture = draw_heatmap(np.array([[-0.1, 0.0, 0.5, 9.0]]), 0.5)
    assert picture[0].tolist() == [[68, 1, 84], [68, 1, 84], [253, 231, 37], [253, 231, 37]]
