"""Test-time views in the engine: as ttach averages them, for any height and width, in batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import ttach
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.views import View, parse_views
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine

STRIDE = 8


def make_member(seed: int, **options) -> Member:
    torch.manual_seed(seed)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8], **options}
    return Member(create_network("unet", num_outputs=3, model_options=options), imagenet())


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble([make_member(0), make_member(1)], mode="multiclass", weights=[2, 1])


def make_images(height: int, width: int, count: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


class Probabilities(nn.Module):
    """A member as ttach takes it: raw images to probabilities."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.member(images).softmax(dim=1)


@pytest.mark.parametrize(
    ("views", "transforms"), [("d4", ttach.aliases.d4_transform()), ("flips", ttach.aliases.flip_transform())]
)
@torch.inference_mode()
def test_views_are_those_of_ttach(ensemble, views, transforms):
    images = make_images(32, 32, count=2)
    each = [
        ttach.SegmentationTTAWrapper(Probabilities(member), transforms, merge_mode="mean")(images.float())
        for member in ensemble.members
    ]
    engine = Engine(ensemble, "cpu", "32", views=views)
    torch.testing.assert_close(engine(images), (2 * each[0] + each[1]) / 3, rtol=0, atol=1e-6)


def seen_by_numpy(view: View, images: np.ndarray) -> np.ndarray:
    turned = np.rot90(images, view.turns, axes=(2, 3))
    return np.ascontiguousarray(turned[..., ::-1] if view.flip else turned)


def back_by_numpy(view: View, probabilities: np.ndarray) -> np.ndarray:
    flipped = probabilities[..., ::-1] if view.flip else probabilities
    return np.rot90(flipped, -view.turns, axes=(2, 3))


@torch.inference_mode()
def by_hand(member: Member, images: np.ndarray, views: str) -> np.ndarray:
    """Each symmetry alone: turned, padded with edge pixels, predicted, cropped, turned back."""
    total = 0.0
    for view in parse_views(views):
        seen = seen_by_numpy(view, images)
        height, width = seen.shape[2:]
        padded = np.pad(seen, ((0, 0), (0, 0), (0, -height % STRIDE), (0, -width % STRIDE)), mode="edge")
        logits = member(torch.from_numpy(padded).float().contiguous(memory_format=torch.channels_last))
        total = total + back_by_numpy(view, logits.softmax(dim=1).numpy()[..., :height, :width].astype(np.float64))
    return total / len(parse_views(views))


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 2), st.sampled_from(["flips", "d4"]))
def test_any_size_is_turned_first_and_padded_then(ensemble, height, width, count, views):
    images = make_images(height, width, count)
    engine = Engine(ensemble, "cpu", "32", views=views)
    each = [by_hand(member, images.numpy(), views) for member in ensemble.members]
    np.testing.assert_allclose(engine(images).numpy(), (2 * each[0] + each[1]) / 3, atol=1e-5)
    for found, expected in zip(engine.member_probabilities(images), each, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@torch.inference_mode()
def test_scales_are_resampled_predicted_and_resampled_back(ensemble):
    images, each = make_images(29, 42).float(), []
    for factor, (height, width) in ((0.75, (22, 32)), (1.0, (29, 42)), (1.25, (36, 52))):
        options = {"mode": "bilinear", "align_corners": False}
        seen = nn.functional.interpolate(images, (height, width), **options, antialias=factor < 1)
        found = Engine(ensemble, "cpu", "32")(seen)
        each.append(nn.functional.interpolate(found, (29, 42), **options, antialias=factor > 1))
    engine = Engine(ensemble, "cpu", "32", views="scales:0.75,1,1.25")
    torch.testing.assert_close(engine(images), torch.stack(each).mean(dim=0), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exact() -> Ensemble:
    """Its sums of whole numbers (over 1024) are exact in float32, whichever kernel oneDNN picks for a batch size."""
    members = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList(members).parameters():
        nn.init.zeros_(parameter)
        parameter.data += torch.randint(-8, 9, parameter.shape, generator=generator) / 1024
    return Ensemble(members, mode="multiclass")


@pytest.mark.parametrize("pixels", [1, 21 * 13, 5 * 21 * 13 + 3, 20 * 21 * 13])
@pytest.mark.parametrize("views", ["none", "d4"])
def test_batches_of_any_size_give_the_same(exact, monkeypatch, views, pixels):
    images = make_images(21, 13, count=5)
    engine = Engine(exact, "cpu", "32", views=views)
    whole = engine(images)
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", pixels)
    assert torch.equal(engine(images), whole)


def test_views_run_together_where_they_fit(monkeypatch):
    sizes = []

    class Watching(nn.Conv2d):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    ensemble = Ensemble([Watching(3, 2, 1)], mode="multiclass", views="d4")
    Engine(ensemble, "cpu", "bf16-mixed")(make_images(32, 32, count=2))
    assert sizes == [16]
    sizes.clear()
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", 5 * 32 * 32)
    Engine(ensemble, "cpu", "bf16-mixed")(make_images(32, 32, count=2))
    assert sizes == [4] * 4
    sizes.clear()
    monkeypatch.undo()
    Engine(ensemble, "cpu", "32")(make_images(32, 32, count=2))
    assert sizes == [8, 8]  # each image by itself: the same bits in any batch


def test_the_ensembles_own_views_are_used_unless_others_are_named(ensemble):
    images = make_images(11, 14)
    plain, turned = Engine(ensemble, "cpu", "32"), Engine(ensemble, "cpu", "32", views="d4")
    own = Ensemble(list(ensemble.members), mode="multiclass", weights=[2, 1], views="d4")
    assert torch.equal(Engine(own, "cpu", "32")(images), turned(images))
    assert torch.equal(Engine(own, "cpu", "32", views="none")(images), plain(images))
    assert torch.equal(Engine(own, "cpu", "32", views="own")(images), turned(images))
    assert not torch.equal(plain(images), turned(images))
    assert own.views == ("d4",)


def test_other_options_are_another_engine_on_the_same_weights(ensemble):
    engine = Engine(ensemble, "cpu", "32", views="flips")
    for same in ({}, {"views": "flips"}, {"views": "none + flips"}, {"passes": 1}, {"passes": 1, "views": ["flips"]}):
        assert engine.with_options(**same) is engine
    other = engine.with_options(views="d4")
    assert other.ensemble is ensemble
    assert (other.views, engine.views, other.with_options(views="own").views) == (("d4",), ("flips",), ("none",))
    assert other.with_options(passes=1).views == ("d4",)
    with pytest.raises(ConfigError, match="unknown views 'd5': did you mean 'd4'"):
        engine.with_options(views="d5")


@pytest.mark.parametrize("views", ["none", "flips"])
@torch.inference_mode()
def test_each_pass_sees_all_views(views):
    member = make_member(0, dropout=0.5)
    images = make_images(16, 24)
    engine = Engine(Ensemble([member], mode="multiclass"), "cpu", "32", passes=3, views=views)
    member.network.head_dropout.train()
    batch = torch.cat([view.forward(images.float()) for view in parse_views(views)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        raw = batch.contiguous(memory_format=torch.channels_last)
        passes = [member(raw).softmax(dim=1) for _ in range(3)]
    member.network.head_dropout.eval()
    expected = torch.stack(
        [
            view.inverse(one, (16, 24))
            for found in passes
            for view, one in zip(parse_views(views), found.split(1), strict=True)
        ]
    ).mean(dim=0)
    torch.testing.assert_close(engine(images), expected, rtol=0, atol=1e-6)
    assert torch.equal(engine(images), engine(images))
