"""What people hand to `predict`, and what they get back."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn

from smp_ensemble.data import rle
from smp_ensemble.data.limits import Limits
from smp_ensemble.data.normalization import Normalization
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import InputError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.inference.overlay import draw_overlay
from smp_ensemble.inference.payload import answer, check_kind
from smp_ensemble.typing import KINDS

NAMES = {"binary": ("ground", "roof"), "multiclass": ("red", "green", "blue"), "multilabel": ("red", "green", "blue")}


def make_engine(mode: str, **options) -> Engine:
    """A model that one can read: a band that is brighter than 51 (of 255) speaks for its class; binary: the first."""
    outputs = 1 if mode == "binary" else 3
    network = nn.Conv2d(3, outputs, 1)
    with torch.no_grad():
        network.weight.copy_(20 * torch.eye(3)[:outputs, :, None, None])
        network.bias.fill_(-4)
    member = Member(network, Normalization("none", [0.0] * 3, [1.0] * 3))
    return Engine(Ensemble([member], mode=mode, class_names=NAMES[mode], **options), "cpu", "32")


@pytest.fixture(scope="module", params=sorted(NAMES))
def engine(request) -> Engine:
    return make_engine(request.param)


@pytest.fixture(scope="module")
def binary() -> Engine:
    return make_engine("binary")


def make_images(count: int = 3, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encode(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form)
    return buffer.getvalue()


def decode_png(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def expected_mask(mode: str, images: np.ndarray) -> np.ndarray:
    if mode == "multiclass":
        return images.argmax(axis=-1).astype(np.uint8)
    bright = (images >= 51).astype(np.uint8)
    return bright[..., 0] if mode == "binary" else bright.transpose(0, 3, 1, 2)


def test_masks_are_class_ids(engine):
    images = make_images()
    masks = answer(engine, images, {})
    assert masks.dtype == np.uint8
    assert np.array_equal(masks, expected_mask(engine.ensemble.mode, images))


def test_probabilities_are_the_engines(engine):
    images = make_images()
    found = answer(engine, images, {"kind": "probabilities"})
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack(engine.predict(list(images))))


def test_overlays_are_drawn_from_the_mask(engine):
    images = make_images()
    found = answer(engine, images, {"kind": "overlay"})
    assert found.shape == (3, 5, 7, 3)
    masks = answer(engine, images, {})
    for image, mask, overlay in zip(images, masks, found, strict=True):
        assert np.array_equal(overlay, draw_overlay(image, mask, engine.ensemble.mode))


def test_run_lengths_are_those_of_the_contest(binary):
    image = np.zeros((1, 2, 3, 3), dtype=np.uint8)
    image[0, 0, 1], image[0, 1, 1], image[0, 1, 2] = 255, 255, 255  # down the columns: pixels 3, 4 and 6
    assert answer(binary, image, {"kind": "rle"}) == ["3 2 6 1"]
    assert answer(binary, np.zeros_like(image), {"kind": "rle"}) == [""]


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_run_lengths_of_several_classes_have_their_names(mode):
    images = make_images(2)
    found = answer(make_engine(mode), images, {"kind": "rle"})
    masks = expected_mask(mode, images)
    for text, mask in zip(found, masks, strict=True):
        planes = json.loads(text)
        assert tuple(planes) == NAMES[mode]
        for index, runs in enumerate(planes.values()):
            plane = mask == index if mode == "multiclass" else mask[index]
            assert np.array_equal(rle.decode(runs, 5, 7), plane)


def test_a_list_of_one_size_is_stacked_and_of_several_a_list(engine):
    images = list(make_images())
    assert np.array_equal(answer(engine, images, {}), answer(engine, np.stack(images), {}))
    mixed = [*images, make_images(1, 9, 4)[0]]
    found = answer(engine, mixed, {})
    assert isinstance(found, list)
    for image, mask in zip(mixed, found, strict=True):
        assert np.array_equal(mask, answer(engine, [image], {})[0])


def as_bytes(image: np.ndarray) -> bytes:
    return encode(image)


def as_base64(image: np.ndarray) -> str:
    return base64.b64encode(encode(image)).decode()


def as_tiff(image: np.ndarray) -> memoryview:
    return memoryview(encode(image, "TIFF"))


@pytest.mark.parametrize("form", [as_bytes, as_base64, as_tiff])
def test_a_data_frame_answers_with_a_data_frame_and_its_index(engine, form):
    images = make_images()
    index = pd.Index(["c", "a", "a"], name="scene")
    data = pd.DataFrame({"other": [1, 2, 3], "image": [form(image) for image in images]}, index=index)
    found = answer(engine, data, {})
    assert list(found.columns) == ["mask"]
    pd.testing.assert_index_equal(found.index, index)
    for text, mask in zip(found["mask"], answer(engine, images, {}), strict=True):
        if engine.ensemble.mode != "multilabel":
            assert np.array_equal(decode_png(text), mask)
            continue
        planes = json.loads(text)
        assert tuple(planes) == NAMES["multilabel"]
        assert np.array_equal([decode_png(plane) for plane in planes.values()], mask)


def test_a_jpeg_is_predicted_as_it_decodes(binary):
    content = encode(make_images(1, 16, 16)[0], "JPEG")
    with Image.open(io.BytesIO(content)) as picture:
        decoded = np.asarray(picture)
    found = answer(binary, pd.DataFrame({"image": [content]}), {})
    assert np.array_equal(decode_png(found["mask"][0]), answer(binary, decoded[None], {})[0])


def test_every_kind_survives_a_data_frame(engine):
    images = make_images()
    data = pd.DataFrame({"image": [encode(image) for image in images]})
    probabilities = answer(engine, data, {"kind": "probabilities"})["probabilities"]
    for text, expected in zip(probabilities, answer(engine, images, {"kind": "probabilities"}), strict=True):
        assert np.array_equal(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False), expected)
    overlays = answer(engine, data, {"kind": "overlay"})["overlay"]
    for text, expected in zip(overlays, answer(engine, images, {"kind": "overlay"}), strict=True):
        assert np.array_equal(decode_png(text), expected)
    assert answer(engine, data, {"kind": "rle"})["rle"].tolist() == answer(engine, images, {"kind": "rle"})


def test_images_of_several_sizes_fit_in_one_frame(binary):
    images = [make_images(1, 5, 7)[0], make_images(1, 3, 2)[0]]
    found = answer(binary, pd.DataFrame({"image": [encode(image) for image in images]}), {})
    assert [decode_png(text).shape for text in found["mask"]] == [(5, 7), (3, 2)]


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32)),
    st.sampled_from(sorted(NAMES)),
    st.floats(0.01, 0.99),
)
def test_both_ways_to_decide_agree(probabilities, mode, threshold):
    probabilities = probabilities[:1] if mode == "binary" else probabilities
    probabilities[0, 0, 0] = threshold
    ensemble = Ensemble([nn.Conv2d(3, 1, 1)], mode=mode, threshold=threshold)
    expected = ensemble.decide(torch.from_numpy(probabilities)[None])[0]
    found = make_mask(ensemble, np.zeros((*probabilities.shape[1:], 3), np.uint8), probabilities)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.numpy())


def test_the_ensembles_threshold_decides():
    images = np.full((1, 1, 1, 3), 60, dtype=np.uint8)  # logit 20 * 60 / 255 - 4 = 0.71: 0.67
    assert answer(make_engine("binary", threshold=0.6), images, {}).item() == 1
    assert answer(make_engine("binary", threshold=0.7), images, {}).item() == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kind": "masks"}, r"unknown kind 'masks': did you mean 'mask'\? Known: mask, overlay, probabilities, rle"),
        ({"kind": 3}, "unknown kind '3'"),
        ({"views": "flip"}, "unknown views 'flip'"),
        ({"knid": "mask"}, "unknown param 'knid': did you mean 'kind'"),
        ({"passes": 0}, "expected passes as a whole number above 0, got 0"),
        ({"passes": -3}, "expected passes as a whole number above 0, got -3"),
        ({"passes": 2.5}, "expected passes as a whole number above 0, got 2.5"),
        ({"passes": "many"}, "expected passes as a whole number above 0, got 'many'"),
        ({"passes": True}, "expected passes as a whole number above 0, got True"),
        ({"passes": 2}, r"passes=2 needs dropout, but member 0 \(Conv2d\) holds none"),
    ],
)
def test_unknown_params_are_refused(binary, params, message):
    with pytest.raises(InputError, match=message):
        answer(binary, make_images(), params)


def test_kinds_are_those_of_the_package():
    assert [check_kind(kind) for kind in KINDS] == list(KINDS)


@pytest.fixture(scope="module")
def blurry() -> Ensemble:
    """Its views differ: a convolution that is not symmetric, and d4 as its own."""
    torch.manual_seed(0)
    members = [Member(nn.Conv2d(3, 1, 3, padding=1), Normalization("none", [0.0] * 3, [1.0] * 3)) for _ in range(2)]
    return Ensemble(members, mode="binary", class_names=NAMES["binary"], views="d4")


def test_views_are_the_models_own_unless_others_are_asked_for(blurry):
    engine, images = Engine(blurry, "cpu", "32"), make_images()
    expected = {views: np.stack(Engine(blurry, "cpu", "32", views=views).predict(images)) for views in ("none", "d4")}
    assert not np.allclose(expected["none"], expected["d4"])
    for views, name in ((None, "d4"), ("", "d4"), ("own", "d4"), ("d4", "d4"), ("none", "none"), ("none+none", None)):
        if name is None:
            with pytest.raises(InputError, match="name 'none' twice"):
                answer(engine, images, {"views": views})
        else:
            found = answer(engine, images, {"kind": "probabilities", "views": views})
            assert np.array_equal(found, expected[name])
    assert np.array_equal(answer(engine, images, {"kind": "probabilities"}), expected["d4"])


def test_uncertainty_is_the_engines(blurry):
    engine, images = Engine(blurry, "cpu", "32"), make_images()
    found = answer(engine, images, {"kind": "uncertainty"})
    assert (found.dtype, found.shape) == (np.float32, (3, 3, 5, 7))
    assert np.array_equal(found, np.stack(engine.uncertainty(list(images))))
    plain = answer(engine, images, {"kind": "uncertainty", "views": "none"})
    assert np.array_equal(plain, np.stack(Engine(blurry, "cpu", "32", views="none").uncertainty(list(images))))
    assert plain[:, 1].mean() > 0
    mixed = answer(engine, [images[0], images[1][:4]], {"kind": "uncertainty"})
    assert [one.shape for one in mixed] == [(3, 5, 7), (3, 4, 7)]


def test_uncertainty_in_a_frame_has_its_means_beside_it(blurry):
    engine, images = Engine(blurry, "cpu", "32"), make_images()
    data = pd.DataFrame({"image": [encode(image) for image in images]}, index=[3, 1, 2])
    found = answer(engine, data, {"kind": "uncertainty"})
    assert list(found.columns) == ["uncertainty", "entropy", "mutual_information", "variation_ratio"]
    assert list(found.index) == [3, 1, 2]
    maps = answer(engine, images, {"kind": "uncertainty"})
    for text, expected in zip(found["uncertainty"], maps, strict=True):
        decoded = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
        assert decoded.dtype == np.float32
        assert np.array_equal(decoded, expected)
    np.testing.assert_allclose(found.iloc[:, 1:].to_numpy(), maps.astype(np.float64).mean(axis=(2, 3)), rtol=1e-12)
    rows = json.loads(json.dumps(found.to_dict("records")))
    assert [row["entropy"] for row in rows] == found["entropy"].tolist()


def test_passes_are_those_of_the_engine_and_leave_it_as_it_is():
    network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 1, 1))
    member = Member(network, Normalization("none", [0.0] * 3, [1.0] * 3))
    engine = Engine(Ensemble([member], mode="binary", class_names=NAMES["binary"]), "cpu", "32")
    images = make_images()
    several = Engine(engine.ensemble, "cpu", "32", passes=3)
    expected = np.stack(several.predict(list(images)))
    before = answer(engine, images, {"kind": "probabilities"})
    for passes in (3, np.int64(3)):
        assert np.array_equal(answer(engine, images, {"kind": "probabilities", "passes": passes}), expected)
    assert not np.array_equal(before, expected)
    for passes in (None, 1):
        assert np.array_equal(answer(engine, images, {"kind": "probabilities", "passes": passes}), before)
    assert np.array_equal(answer(several, images, {"kind": "probabilities"}), expected)


BANDS_FIRST = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            make_images()[0],
            r"expected an array of shape \(N, H, W, C\), got \(5, 7, 3\): add the batch axis, images\[None\]",
        ),
        (np.zeros((5, 7)), r"expected an array of shape \(N, H, W, C\), got \(5, 7\)$"),
        (make_images()[:0], "expected at least one image, got none"),
        ([], "expected at least one image, got none"),
        ({"image": 1}, "expected an array .* or a DataFrame, got dict"),
        ("photo.png", "expected an array .* or a DataFrame, got str"),
        (None, "or a DataFrame, got NoneType"),
        ([make_images()[0], make_images()[0, 0]], r"expected image 1 as an array of shape \(H, W, C\), got \(7, 3\)"),
        ([[[1, 2], [3, 4]]], r"expected image 0 as an array of shape \(H, W, C\), got list"),
        (np.zeros((1, 0, 4, 3)), r"expected image 0 as an array of shape \(H, W, C\), got \(0, 4, 3\)"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"expected image 0 with 3 bands, shape \(H, W, 3\), got \(8, 8, 4\)$"),
        ([BANDS_FIRST], r"expected image 0 with 3 bands, shape \(H, W, 3\), got \(3, 8, 8\): channels come last"),
        (np.full((1, 2, 2, 3), np.nan), "expected image 0 to hold finite values, got NaN or infinity"),
        (np.full((1, 2, 2, 3), np.inf), "expected image 0 to hold finite values"),
        (np.zeros((1, 2, 2, 3), bool), "expected image 0 to hold numbers, raw pixel values, got dtype bool"),
        (np.zeros((1, 2, 2, 3), complex), "got dtype complex128"),
        (np.full((1, 2, 2, 3), "x"), "expected image 0 to hold numbers"),
    ],
)
def test_wrong_arrays_are_refused_with_what_came(binary, data, message):
    with pytest.raises(InputError, match=message):
        answer(binary, data, {})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"picture": [b""]}, "expected a column 'image', got picture"),
        ({}, "expected a column 'image', got none"),
        ({"image": []}, "expected at least one image, got none"),
        ({"image": [None]}, "expected image bytes or base64 in row 0, got nothing"),
        ({"image": [float("nan")]}, "expected image bytes or base64 in row 0, got nothing"),
        ({"image": [3.5]}, "expected image bytes or base64 in row 0, got float"),
        ({"image": ["not base64!"]}, "expected base64 of image bytes in row 0, got other text"),
        ({"image": ["ümlaut"]}, "expected base64 of image bytes in row 0, got other text"),
        ({"image": [base64.b64encode(b"no image").decode()]}, "cannot read image row 0: expected PNG, JPEG"),
        ({"image": [b""]}, "cannot read image row 0"),
        ({"image": [encode(make_images()[0]), encode(make_images()[0])[:60]]}, "cannot read image row 1"),
        ({"image": [encode(make_images()[0, ..., 0])]}, r"expected row 0 with 3 bands.* got \(5, 7, 1\)"),
    ],
)
def test_wrong_frames_are_refused_with_the_row(binary, column, message):
    with pytest.raises(InputError, match=message) as error:
        answer(binary, pd.DataFrame(column), {})
    assert "\n" not in str(error.value)


def test_errors_can_be_reported_row_by_row(blurry):
    engine, images = Engine(blurry, "cpu", "32"), make_images()
    cells = [encode(images[0]), encode(images[1])[:50], None, "no!", encode(images[0, ..., 0]), encode(images[2])]
    for kind in KINDS:
        found = answer(
            engine, pd.DataFrame({"image": cells}, index=range(10, 16)), {"kind": kind, "on_error": "report"}
        )
        expected = answer(engine, pd.DataFrame({"image": [cells[0], cells[5]]}, index=[10, 15]), {"kind": kind})
        assert list(found.columns) == [*expected.columns, "error"]
        for name in expected.columns:
            assert found[name][[10, 15]].tolist() == expected[name].tolist()
        assert found["error"][[10, 15]].tolist() == ["", ""]
        assert found[kind][[11, 12, 13, 14]].tolist() == [""] * 4
        assert [text.partition(":")[0] for text in found["error"][[11, 12, 13, 14]]] == [
            "cannot read image row 1",
            "expected image bytes or base64 in row 2, got nothing",
            "expected base64 of image bytes in row 3, got other text",
            "expected row 4 with 3 bands, shape (H, W, 3), got (5, 7, 1)",
        ]
        assert "NaN" not in json.dumps(found.to_dict("records"))
    nothing_wrong = answer(engine, pd.DataFrame({"image": cells[:1]}), {"kind": "uncertainty", "on_error": "report"})
    assert nothing_wrong["entropy"].dtype == np.float64
    with pytest.raises(InputError, match="on_error=report is for DataFrames: expected one, got ndarray"):
        answer(engine, images, {"on_error": "report"})


def test_a_few_images_at_a_time_give_what_all_at_once_give(binary, monkeypatch):
    images = [make_images(1, 5 + number % 3, 7)[0] for number in range(11)]
    data = pd.DataFrame({"image": [encode(image) for image in images]})
    at_once = answer(binary, data, {})
    batches = []
    predict = Engine.predict
    monkeypatch.setattr(Engine, "predict", lambda self, arrays: batches.append(len(arrays)) or predict(self, arrays))
    monkeypatch.setattr("smp_ensemble.inference.payload.CHUNK_PIXELS", 100)
    pd.testing.assert_frame_equal(answer(binary, data, {}), at_once)
    assert sum(batches) == 11
    assert max(batches) == 2


def test_limits_are_those_of_the_request(binary):
    data = pd.DataFrame({"image": [encode(image) for image in make_images(3, 10, 10)]})
    for limits, message in (
        (Limits(request_images=2), "at most 2 images in one request, got 3"),
        (Limits(image_pixels=99), "row 0: 10 x 10 pixels are more than the 99 allowed"),
        (Limits(request_pixels=299), "at most 299 pixels in one request, all views and passes counted, got 300"),
        (Limits(image_bytes=20), "at most 20 encoded bytes in row 0"),
    ):
        with pytest.raises(InputError, match=message):
            answer(binary, data, {}, limits)
    for limits in (Limits(request_images=2), Limits(image_pixels=99), Limits(request_pixels=299)):
        with pytest.raises(InputError, match="at most|more than the"):
            answer(binary, make_images(3, 10, 10), {}, limits)
    exact = Limits(image_pixels=100, request_images=3, request_pixels=300)
    pd.testing.assert_frame_equal(answer(binary, data, {}, exact), answer(binary, data, {}))
