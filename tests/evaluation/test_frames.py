"""Images and masks in a DataFrame are read as strictly as files."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from smp_ensemble.evaluation.frames import dataset_of_frame
from smp_ensemble.exceptions import InputError
from smp_ensemble.typing import Task

ROOFS = Task("binary", ("background", "roof"))
LAYERS = Task("multilabel", ("roof", "road"))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ids(*values: int, size: tuple[int, int] = (6, 9)) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), size)


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3), dtype=np.uint8))


@pytest.fixture
def frame(images) -> pd.DataFrame:
    return pd.DataFrame({"image": [png(image) for image in images], "scene": [3, 4], "file": ["a", "b"]}, index=[7, 7])


@pytest.mark.parametrize("text", [False, True])
def test_bytes_and_base64_are_images_and_masks(frame, images, text):
    truth = [ids(0, 1, 255), ids(1, 0)]
    cells = [png(mask) for mask in truth]
    if text:
        cells = [base64.b64encode(cell).decode() for cell in cells]
        frame["image"] = [base64.b64encode(cell).decode() for cell in frame["image"]]
    data = dataset_of_frame(frame, np.array(cells, object), ROOFS, title="roofs", name="file", group="scene")
    assert (data.name, data.names, data.groups, data.task) == ("roofs", ("a", "b"), ("3", "4"), ROOFS)
    for index in range(2):
        image, mask = data.read(index)
        assert np.array_equal(image, images[index])
        assert np.array_equal(mask, truth[index])
    plain = dataset_of_frame(frame, cells, ROOFS)
    assert (plain.names, plain.groups) == (("row 0", "row 1"), None)


def test_multilabel_masks_have_a_plane_for_each_class(frame):
    planes = [{"road": ids(0, 1), "roof": ids(1, 1, 255)}, {"roof": ids(0), "road": ids(1)}]
    cells = [json.dumps({name: base64.b64encode(png(plane)).decode() for name, plane in one.items()}) for one in planes]
    data = dataset_of_frame(frame, cells, LAYERS)
    for index in range(2):
        assert np.array_equal(data.read(index)[1], np.stack([planes[index]["roof"], planes[index]["road"]], axis=-1))


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("image", b"no image", "^cannot read image row 1: expected PNG"),
        ("image", None, "^expected image bytes or base64 in row 1, got nothing"),
        ("image", png(ids(0)), "^image row 1 has 1 bands .* row 0 has 3"),
        ("mask", b"no mask", "^cannot read image row 1"),
        ("mask", "not base64!", "^expected base64 of mask bytes in row 1"),
        ("mask", 3.5, "^expected mask bytes or base64 in row 1, got float"),
        ("mask", png(ids(0, size=(5, 9))), "^image row 1 is 6x9 .* its mask row 1 is 5x9"),
        ("mask", png(ids(0, 7)), r"^mask row 1 holds id 7: expected 0..1 \(background, roof\)"),
        ("mask", png(np.zeros((6, 9, 3), np.uint8)), "^mask row 1: expected one band of class ids"),
        ("scene", None, "^expected text or a number in row 1 of the column 'scene', found None"),
        ("file", "a", "^expected different names of images, found 'a' for row 0 and row 1"),
    ],
)
def test_a_wrong_cell_is_named_by_its_row(frame, column, cell, message):
    cells = {name: list(frame[name]) for name in frame} | {"mask": [png(ids(0, 1))] * 2}
    cells[column][1] = cell
    changed = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in cells.items()})
    with pytest.raises(InputError, match=message) as caught:
        dataset_of_frame(changed, changed["mask"].to_numpy(), ROOFS, name="file", group="scene")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("{", "mask row 1: expected a JSON object with base64 of a PNG for each of roof, road, found other text"),
        ("[]", "found list"),
        ("{}", "found none"),
        (json.dumps({"roof": ""}), "for each of roof, road, found roof$"),
        (json.dumps({"roof": "", "road": 1}), "expected mask bytes or base64 in row 1, class road, got int"),
        (json.dumps({"roof": "", "road": ""}), "cannot read image row 1, class roof"),
        (b"PNG", "found bytes"),
    ],
)
def test_multilabel_masks_are_read_strictly(frame, mask, message):
    good = json.dumps(dict.fromkeys(LAYERS.class_names, base64.b64encode(png(ids(0, 1))).decode()))
    with pytest.raises(InputError, match=message):
        dataset_of_frame(frame, [good, mask], LAYERS)


def test_planes_of_one_image_have_one_size(frame):
    planes = {"roof": png(ids(0)), "road": png(ids(0, size=(6, 8)))}
    mask = json.dumps({name: base64.b64encode(plane).decode() for name, plane in planes.items()})
    with pytest.raises(InputError, match="mask row 0, class road is 6x8 .* row 0, class roof is 6x9"):
        dataset_of_frame(frame, [mask] * 2, LAYERS)


def test_columns_and_lengths_fit(frame):
    mask = png(ids(0, 1))
    with pytest.raises(InputError, match="expected a column 'image', found scene, file"):
        dataset_of_frame(frame.drop(columns="image"), [mask] * 2, ROOFS)
    with pytest.raises(InputError, match="expected a column 'scenes', found image, scene, file"):
        dataset_of_frame(frame, [mask] * 2, ROOFS, group="scenes")
    with pytest.raises(InputError, match="a mask for each of 2 images, found 1"):
        dataset_of_frame(frame, [mask], ROOFS)
    with pytest.raises(InputError, match="at least one image"):
        dataset_of_frame(frame[:0], [], ROOFS)
    with pytest.raises(InputError, match="image row 0: expected 4 bands, found 3"):
        dataset_of_frame(frame, [mask] * 2, Task("binary", ("background", "roof"), 4))
