"""Views: every transform and its exact inverse, their product in text, and their mean in probability."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.views import D4, FLIPS, IDENTITY, View, average_views, check_views, parse_views, views_name
from smp_ensemble.exceptions import ConfigError

sides = st.integers(1, 13)
symmetries = st.sampled_from(D4)
factors = st.floats(0.1, 8.0)


def numbered(height: int, width: int, count: int = 2, bands: int = 3) -> torch.Tensor:
    """No two pixels are equal, so that a transform is known by what it gives."""
    return torch.arange(count * bands * height * width, dtype=torch.float32).reshape(count, bands, height, width)


def by_numpy(view: View, images: np.ndarray) -> np.ndarray:
    turned = np.rot90(images, view.turns, axes=(2, 3))
    return turned[..., ::-1] if view.flip else turned


@given(symmetries, sides, sides)
def test_a_symmetry_moves_pixels_as_numpy_does_and_its_inverse_gives_back_every_bit(view, height, width):
    images = numbered(height, width)
    seen = view.forward(images)
    assert np.array_equal(seen.numpy(), by_numpy(view, images.numpy()))
    assert seen.shape[-2:] == view.size((height, width))
    assert torch.equal(view.inverse(seen, (height, width)), images)


@given(symmetries, sides, sides, st.sampled_from([torch.uint8, torch.float16, torch.float64, torch.int64]))
def test_a_symmetry_keeps_the_type(view, height, width, dtype):
    images = (numbered(height, width) % 200).to(dtype)
    seen = view.forward(images)
    assert seen.dtype == dtype
    assert torch.equal(view.inverse(seen, (height, width)), images)


def test_d4_is_the_group_of_the_square():
    image = numbered(5, 5, 1, 1)
    seen = [view.forward(image).numpy().tobytes() for view in D4]
    assert len(set(seen)) == 8
    for first in D4:
        for second in D4:
            assert second.forward(first.forward(image)).numpy().tobytes() in seen
    assert set(FLIPS) < set(D4)
    assert D4[0] == IDENTITY


def test_flips_are_what_they_are_called():
    image = numbered(3, 4)
    expected = {"identity": [], "hflip": [3], "vflip": [2], "rotate180": [2, 3]}
    assert {view.name for view in FLIPS} == set(expected)
    for view in FLIPS:
        assert torch.equal(view.forward(image), torch.flip(image, expected[view.name]))


def test_names_say_what_is_done():
    assert sorted(view.name for view in D4) == [
        "hflip", "identity", "rotate180", "rotate270", "rotate270+hflip", "rotate90", "rotate90+hflip", "vflip",
    ]  # fmt: skip
    assert View(1, flip=True, scale=0.75).name == "rotate90+hflip+scale 0.75"
    assert View(scale=2.0).name == "scale 2"


@given(symmetries, factors, sides, sides)
def test_a_scale_has_the_size_that_is_promised_and_returns_to_the_images(shape, factor, height, width):
    view = View(shape.turns, shape.flip, factor)
    images = numbered(height, width)
    seen = view.forward(images)
    turned = (height, width) if shape.turns % 2 == 0 else (width, height)
    assert seen.shape[-2:] == tuple(max(1, round(factor * side)) for side in turned) == view.size((height, width))
    assert view.inverse(seen, (height, width)).shape == images.shape


@given(symmetries, factors, sides, sides, st.floats(0, 255, width=32))
def test_a_scale_gives_back_constant_images_bit_for_bit(shape, factor, height, width, value):
    view = View(shape.turns, shape.flip, factor)
    images = torch.full((1, 2, height, width), value)
    assert torch.equal(view.inverse(view.forward(images), (height, width)), images)


@given(symmetries, factors, sides, sides, st.integers(0, 2**32 - 1))
def test_probabilities_stay_probabilities(shape, factor, height, width, seed):
    view = View(shape.turns, shape.flip, factor)
    logits = torch.randn(2, 4, *view.size((height, width)), generator=torch.Generator().manual_seed(seed)) * 30
    back = view.inverse(logits.softmax(dim=1), (height, width))
    assert back.min() >= 0
    assert back.max() <= 1
    torch.testing.assert_close(back.sum(dim=1), torch.ones(2, height, width))


@given(st.floats(0.5, 3.0), st.integers(16, 40), st.integers(16, 40), st.integers(0, 2**32 - 1))
def test_a_scale_keeps_the_mean_within_a_hundredth(factor, height, width, seed):
    probabilities = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    back = View(scale=factor).inverse(View(scale=factor).forward(probabilities), (height, width))
    assert abs(float(back.mean() - probabilities.mean())) < 0.01


@given(symmetries, sides, sides)
def test_the_factor_1_is_the_image_itself(shape, height, width):
    images = numbered(height, width)
    one = View(shape.turns, shape.flip, 1.0)
    assert one == shape
    assert torch.equal(one.forward(images), shape.forward(images))


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25, 2.0])
def test_a_scale_is_torchs_bilinear_interpolation(factor):
    images = torch.rand(2, 3, 21, 34, generator=torch.Generator().manual_seed(0)) * 255
    size = (max(1, round(factor * 21)), max(1, round(factor * 34)))
    options = {"mode": "bilinear", "align_corners": False}
    seen = View(scale=factor).forward(images)
    torch.testing.assert_close(seen, F.interpolate(images, size, **options, antialias=factor < 1))
    back = View(scale=factor).inverse(seen, (21, 34))
    torch.testing.assert_close(back, F.interpolate(seen, (21, 34), **options, antialias=factor > 1))


def test_integers_are_resampled_as_numbers():
    images = numbered(6, 8).to(torch.uint8)
    assert torch.equal(View(scale=0.5).forward(images), View(scale=0.5).forward(images.float()))


@pytest.mark.parametrize(
    ("text", "canonical", "count"),
    [
        (None, ("none",), 1),
        ("", ("none",), 1),
        ((), ("none",), 1),
        ("none", ("none",), 1),
        ("flips", ("flips",), 4),
        ("d4", ("d4",), 8),
        ("none+d4", ("d4",), 8),
        ("scales:0.75,1,1.25", ("scales:0.75,1,1.25",), 3),
        ("scales: 2, 1.0, 0.50", ("scales:0.5,1,2",), 3),
        ("scales:1", ("scales:1",), 1),
        (" scales:1,0.3333333333 + flips ", ("flips", "scales:0.3333333333,1"), 8),
        (["flips", "scales:0.75,1,1.25"], ("flips", "scales:0.75,1,1.25"), 12),
        (("d4+scales:2",), ("d4", "scales:2"), 8),
    ],
)
def test_texts_have_a_canonical_form_that_means_the_same(text, canonical, count):
    assert check_views(text) == canonical
    assert check_views(canonical) == canonical
    assert views_name(text) == "+".join(canonical)
    views = parse_views(text)
    assert len(views) == len(set(views)) == len({view.name for view in views}) == count
    assert parse_views(views_name(text)) == views


def test_the_product_holds_every_pair():
    found = parse_views("flips+scales:0.5,1")
    assert set(found) == {View(one.turns, one.flip, scale) for one in FLIPS for scale in (0.5, 1.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip", "unknown views 'flip': did you mean 'flips'"),
        ("d5", "unknown views 'd5': did you mean 'd4'"),
        ("mirror", "unknown views 'mirror': Known: d4, flips, none, scales .as in scales:0.75,1,1.25.$"),
        ("scale:2", "unknown views 'scale:2': did you mean 'scales"),
        ("flips++d4", "unknown views ''"),
        ("flips+flips", "views 'flips[+]flips' name 'flips' twice"),
        ("scales:1+scales:2", "name 'scales' twice"),
        ("d4+flips", "views 'd4[+]flips' name flips and d4, which holds the flips: leave out 'flips'"),
        ("flips:2", "expected no factors after 'flips', got 'flips:2'"),
        ("scales", "expected numbers separated by commas in views 'scales', such as scales:0.75,1,1.25"),
        ("scales:", "expected numbers separated by commas in views 'scales:'"),
        ("scales:1,,2", "expected numbers separated by commas in views 'scales:1,,2'"),
        ("scales:big", "in views 'scales:big', such as scales:0.75,1,1.25: could not convert string to float: 'big'"),
        ("scales:0", "expected factors from 0.1 to 8 in views 'scales:0', such as scales:0.75,1,1.25: got 0"),
        ("scales:-1", "got -1"),
        ("scales:1,9", "expected factors from 0.1 to 8 in views 'scales:1,9'.*: got 9"),
        ("scales:nan", "got nan"),
        ("scales:inf", "got inf"),
        ("scales:0.5,0.50", "expected each factor once in views 'scales:0.5,0.50', got 0.5 twice: remove one"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_part(text, message):
    for function in (check_views, parse_views, views_name):
        with pytest.raises(ConfigError, match=message) as error:
            function(text)
        assert "\n" not in str(error.value)


def convolution(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Softmax(dim=1))


texts = st.sampled_from(["none", "flips", "d4", "scales:0.75,1,1.25", "flips+scales:0.5,1", "d4+scales:0.7,1.3"])


@given(texts, sides, sides, st.integers(1, 3), st.one_of(st.none(), st.integers(1, 2000)))
def test_the_mean_is_that_of_a_plain_loop(text, height, width, count, max_pixels):
    predict, views = convolution(), parse_views(text)
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        each = [view.inverse(predict(view.forward(images)), (height, width)).numpy() for view in views]
        found = average_views(views, images, predict, max_pixels)
    np.testing.assert_allclose(found.numpy(), np.mean(each, axis=0, dtype=np.float64), atol=1e-6)


@given(texts, sides, sides, st.integers(1, 4), st.integers(1, 2000))
def test_batches_hold_whole_images_of_one_size_within_the_limit(text, height, width, count, max_pixels):
    views, shapes = parse_views(text), []

    def predict(images):
        shapes.append(tuple(images.shape))
        return images[:, :1]

    average_views(views, torch.zeros(count, 3, height, width), predict, max_pixels)
    assert sum(shape[0] for shape in shapes) == len(views) * count
    for images, _, *size in shapes:
        assert images == 1 or images * size[0] * size[1] <= max_pixels


def test_small_views_of_one_size_run_together():
    sizes = []

    def predict(images):
        sizes.append(tuple(images.shape))
        return images

    average_views(parse_views("d4"), torch.zeros(2, 3, 4, 6), predict, 10_000)
    assert sizes == [(8, 3, 4, 6), (8, 3, 6, 4)]
    sizes.clear()
    average_views(parse_views("d4"), torch.zeros(2, 3, 4, 4), predict, 10_000)
    assert sizes == [(16, 3, 4, 4)]
    sizes.clear()
    average_views(parse_views("d4"), torch.zeros(2, 3, 4, 4), predict)
    assert sizes == [(2, 3, 4, 4)] * 8


def test_a_model_that_is_symmetric_already_gains_nothing():
    images = torch.rand(2, 3, 7, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(average_views(parse_views("d4"), images, torch.round, 10_000), images.round())


def test_averaging_makes_a_model_symmetric():
    predict, views = convolution(), parse_views("d4")
    images = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = average_views(views, images, predict)
        turned = average_views(views, torch.rot90(images, 1, (2, 3)), predict)
    torch.testing.assert_close(turned, torch.rot90(plain, 1, (2, 3)))
    assert not torch.allclose(predict(torch.rot90(images, 1, (2, 3))), torch.rot90(predict(images), 1, (2, 3)))


@pytest.mark.parametrize("max_pixels", [None, 1, 10_000])
def test_nobody_else_sees_the_running_sum(max_pixels):
    """Neither what `predict` gave nor what it needs for a gradient is written over."""
    network, given_out = convolution(), []

    def predict(images):
        given_out.append(network(images))
        given_out.append(given_out[-1].detach().clone())
        return given_out[-2]

    images = torch.rand(1, 3, 5, 8, requires_grad=True)
    average_views(parse_views("flips"), images, predict, max_pixels)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0
    for result, copy in zip(given_out[::2], given_out[1::2], strict=True):
        assert torch.equal(result, copy)


@pytest.mark.parametrize("max_pixels", [None, 1])
def test_memory_does_not_grow_with_the_views(max_pixels):
    results, alive = [], []

    def predict(images):
        alive.append(sum(one() is not None for one in results))
        found = images.sigmoid()
        results.append(weakref.ref(found))
        return found

    average_views(parse_views("d4+scales:0.5,1,2"), torch.rand(1, 1, 5, 8), predict, max_pixels)
    assert alive == [0] * 24


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_an_ensemble_averages_views_of_each_member_in_probability(mode):
    torch.manual_seed(0)
    members = [nn.Conv2d(3, 1 if mode == "binary" else 3, 3, padding=1) for _ in range(2)]
    images = torch.rand(2, 3, 6, 9) * 4
    ensemble = Ensemble(members, mode=mode, weights=[1, 3], views="flips+scales:0.5,1")
    assert ensemble.views == ("flips", "scales:0.5,1")
    activation = torch.sigmoid if mode != "multiclass" else lambda logits: logits.softmax(dim=1)
    with torch.inference_mode():
        each = [
            torch.stack(
                [view.inverse(activation(one(view.forward(images))), (6, 9)) for view in parse_views(ensemble.views)]
            ).mean(dim=0)
            for one in members
        ]
        torch.testing.assert_close(ensemble(images), (each[0] + 3 * each[1]) / 4)
        for found, expected in zip(ensemble.member_probabilities(images), each, strict=True):
            torch.testing.assert_close(found, expected)
