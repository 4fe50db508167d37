"""Images without masks join those that train; never those that are scored, and none of them twice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.unlabelled import is_labelled, join_unlabelled
from smp_ensemble.exceptions import DataError, LeakError


def save(path, seed, size=(20, 28), bands=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, bands), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if bands > 1 else pixels[..., 0]).save(path)


@pytest.fixture
def splits(tmp_path):
    for index in range(12):
        save(tmp_path / "data" / "images" / f"{index}.png", index)
        mask = np.zeros((20, 28), np.uint8)
        mask[5:12, 4 : 8 + index] = 1
        (tmp_path / "data" / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{index}.png")
    return load_data(str(tmp_path / "data"))


@pytest.fixture
def more(tmp_path):
    """Three images that nobody has seen, of other sizes."""
    for index in range(3):
        save(tmp_path / "more" / f"{index}.png", 100 + index, size=(16 + index, 40))
    return [(path.name, path) for path in sorted((tmp_path / "more").iterdir())]


def file_of(splits, split, tmp_path):
    """The file of the first image of a split."""
    return tmp_path / "data" / "images" / f"{splits.split(split).names[0]}.png"


def test_they_come_after_the_training_images_and_all_their_pixels_are_ignored(splits, more):
    joined = join_unlabelled(splits, more)
    count = len(splits.train)
    assert (joined.added, joined.known, len(joined.train)) == (3, 0, count + 3)
    assert joined.train.names[:count] == splits.train.names
    assert joined.train.names[count:] == ("unlabelled/0.png", "unlabelled/1.png", "unlabelled/2.png")
    assert [is_labelled(record) for record in joined.train.records] == [True] * count + [False] * 3
    image, mask = joined.train.read(count + 2)
    np.testing.assert_array_equal(image, np.asarray(Image.open(more[2][1])))
    assert (mask.shape, mask.dtype, set(np.unique(mask))) == ((18, 40), np.uint8, {255})
    np.testing.assert_array_equal(joined.train.class_pixels, splits.train.class_pixels)
    assert set(joined.train.image_digests) > set(splits.train.image_digests)
    assert joined.train.digest != splits.train.digest


def test_multilabel_masks_have_a_layer_for_each_class(more):
    splits = load_data("synthetic:count=12,size=32", mode="multilabel")
    mask = join_unlabelled(splits, more).train.read(len(splits.train))[1]
    assert mask.shape == (16, 40, splits.task.num_outputs)
    assert (mask == 255).all()


@pytest.mark.parametrize(("split", "what"), [("val", "validation"), ("test", "test")])
def test_images_that_are_scored_are_refused_under_any_name(splits, more, tmp_path, split, what):
    copy = tmp_path / "renamed.png"
    shutil.copy(file_of(splits, split, tmp_path), copy)
    with pytest.raises(LeakError, match=f"1 of the 4 unlabelled images are {what} images"):
        join_unlabelled(splits, [*more, ("renamed.png", copy)])


def test_left_out_images_are_scored_too(splits, more, tmp_path):
    part = splits.part(0, folds=3)
    with pytest.raises(LeakError, match="1 of the 4 unlabelled images are left-out images"):
        join_unlabelled(part, [*more, ("a", file_of(part, "left-out", tmp_path))])


def test_no_image_trains_twice(splits, more, tmp_path):
    joined = join_unlabelled(splits, [*more, ("again.png", more[0][1]), ("known", file_of(splits, "train", tmp_path))])
    assert (joined.added, joined.known) == (3, 2)
    assert len(set(joined.train.image_digests)) == len(joined.train)


def test_other_bands_and_broken_files_are_refused(splits, tmp_path):
    save(tmp_path / "grey.png", 1, bands=1)
    with pytest.raises(DataError, match="grey.png has 1 bands of uint8, but the training images have 3 of uint8"):
        join_unlabelled(splits, [("grey.png", tmp_path / "grey.png")])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.png"):
        join_unlabelled(splits, [("broken.png", tmp_path / "broken.png")])
