from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.data.folders import check_unique, describe_folder, name_of
from smp_ensemble.exceptions import ConfigError, DataError


def test_names_are_paths_below_images():
    assert [name_of(path) for path in ("images/a.jpg", "images/n/a.b.png", "else/a.tif", "a.png", "n\\a.png")] == [
        "a", "n/a.b", "else/a", "a", "n/a",
    ]  # fmt: skip


def test_images_and_masks_are_paired_by_name_in_order(make_folder):
    description = describe_folder(make_folder({"b": 0, "a": 1, "c": 0}))
    assert [record.name for record in description.records] == ["a", "b", "c"]
    assert description.records[0].mask.read().tolist() == [[1] * 8] * 8
    assert (description.classes, description.mode) == (None, None)


def test_nested_folders_are_paired_by_path(make_folder):
    folder = make_folder({"north/1": 0, "south/1": 1})
    description = describe_folder(folder)
    assert [record.name for record in description.records] == ["north/1", "south/1"]
    assert description.mode is None


def test_splits_name_order_splits_and_groups(make_folder):
    lines = ["image,mask,split,group", "images/b.png,masks/a.png,train,g", "images/a.png,masks/b.png,val,h"]
    description = describe_folder(make_folder({"a": 1, "b": 0}, splits=lines))
    assert [(r.name, r.split, r.group) for r in description.records] == [("b", "train", "g"), ("a", "val", "h")]
    assert description.records[0].mask.read().max() == 1


def test_another_mask_column_brings_its_own_classes(make_folder):
    folder = make_folder({"a": 1}, classes={"names": ["x", "y"]})
    (folder / "masks_cover").mkdir()
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(folder / "masks_cover" / "a.png")
    assert describe_folder(folder, "mask_cover").classes.names == ("x", "y")
    (folder / "classes_cover.json").write_text('{"names": ["p", "q", "r"]}')
    for lines in (None, "image,mask,mask_cover\nimages/a.png,masks/a.png,masks_cover/a.png\n"):
        if lines:
            (folder / "splits.csv").write_text(lines)
        description = describe_folder(folder, "mask_cover")
        assert description.classes.names == ("p", "q", "r")
        assert description.records[0].mask.read().max() == 2


def test_folders_of_classes_are_multilabel(make_folder):
    masks = {"a": {"road": 1, "building": 0}, "b": {"road": 0, "building": 255}}
    description = describe_folder(make_folder(masks))
    assert (description.mode, description.layers) == ("multilabel", ("building", "road"))
    assert description.records[0].mask.read()[0, 0].tolist() == [0, 1]
    assert description.records[1].mask.read()[0, 0].tolist() == [255, 0]


def test_classes_order_the_folders_of_multilabel_masks(make_folder):
    classes = {"names": ["road", "building"], "task": "multilabel"}
    lines = ["image,split", "images/a.png,train"]
    folder = make_folder({"a": {"road": 1, "building": 0}}, classes=classes, splits=lines)
    description = describe_folder(folder)
    assert description.layers == ("road", "building")
    assert description.records[0].mask.read()[0, 0].tolist() == [1, 0]


def test_another_ignore_index_is_read_as_255(make_folder):
    classes = {"names": ["background", "building"], "ignore_index": 9}
    description = describe_folder(make_folder({"a": [[0] * 4 + [9] * 4]}, classes=classes))
    assert description.records[0].mask.read()[0].tolist() == [0] * 4 + [255] * 4


def test_an_image_without_mask_is_named(make_folder):
    folder = make_folder({"a": 0, "b": 0})
    (folder / "masks" / "b.png").unlink()
    with pytest.raises(DataError, match=r"image .*b\.png has no mask: expected .*masks.b\.png; add it, or remove"):
        describe_folder(folder)


def test_a_class_without_mask_is_named(make_folder):
    folder = make_folder({"a": {"road": 0, "building": 0}})
    (folder / "masks" / "road" / "a.png").unlink()
    with pytest.raises(DataError, match=r"image .*a\.png has no mask: expected .*road.a\.png"):
        describe_folder(folder)


def test_a_class_without_folder_is_named(make_folder):
    classes = {"names": ["road", "water"], "task": "multilabel"}
    with pytest.raises(DataError, match=r"expected a folder .*water .*, found road in .*masks"):
        describe_folder(make_folder({"a": {"road": 0}}, classes=classes))


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected folders images/ and masks/, found no images/"):
        describe_folder(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"found no masks/"):
        describe_folder(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"expected images \(\.png .*\), found none in images/"):
        describe_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/x.png,masks/a.png", r"splits\.csv line 2: image .*x\.png does not exist"),
        ("images/a.png,masks/x.png", r"line 2: image .*a\.png has no mask: .*'mask', found 'masks/x\.png', which does"),
        ("images/a.png,", r"line 2: image .*a\.png has no mask: expected a file in column 'mask', found nothing"),
    ],
)
def test_lines_of_splits_without_files_are_named(make_folder, line, message):
    with pytest.raises(DataError, match=message):
        describe_folder(make_folder({"a": 0}, splits=["image,mask", line]))


def test_an_unknown_mask_column_names_those_there_are(make_folder):
    folder = make_folder({"a": 0}, splits=["image,mask,mask_cover,split", "images/a.png,masks/a.png,,train"])
    with pytest.raises(ConfigError, match=r"no mask column 'mask_covr': did you mean 'mask_cover'\? Known: mask, mask"):
        describe_folder(folder, "mask_covr")


def test_two_images_of_one_name_are_refused(make_folder):
    folder = make_folder({"a": 0})
    Image.new("RGB", (8, 8)).save(folder / "images" / "a.jpg")
    with pytest.raises(DataError, match=r"expected one file named 'a' in .*images, found a\.jpg and a\.png"):
        describe_folder(folder)
    (folder / "images" / "a.jpg").unlink()
    record = describe_folder(folder).records[0]
    with pytest.raises(DataError, match="expected one image named 'a'"):
        check_unique([record, describe_folder(folder).records[0]], folder)
