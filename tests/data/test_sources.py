from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.data.sources import ClassMaskFiles, ImageFile, MaskFile, RunLengths, digest_of, digest_of_array
from smp_ensemble.exceptions import DataError


def test_an_image_file_is_digested_by_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2)).save(path)
    image, digest = ImageFile(path).read_with_digest()
    assert image.shape == (2, 3, 3)
    assert digest == digest_of(path.read_bytes())
    assert len(digest) == 32


def test_replaced_ids_stand_for_others(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(path)
    assert MaskFile(path).read().tolist() == [[0, 1, 2, 255]]
    assert MaskFile(path, ((0, 255), (2, 7))).read().tolist() == [[255, 1, 7, 255]]


def test_class_masks_of_other_sizes_are_named(tmp_path):
    files = []
    for name, size in (("roof", (3, 2)), ("road", (4, 2))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
        files.append(MaskFile(tmp_path / f"{name}.png"))
    with pytest.raises(DataError, match=r"road\.png is 2x4 \(height x width\), but .*roof\.png is 2x3"):
        ClassMaskFiles(tuple(files)).read()


def test_malformed_run_lengths_name_their_line():
    with pytest.raises(DataError, match=r"^train\.csv line 7 \(a\.jpg\): run lengths: expected pixels"):
        RunLengths("9 9", 2, 2, "train.csv line 7 (a.jpg)").read()


def test_the_digest_of_an_array_tells_shapes_and_types_apart():
    zeros = np.zeros((2, 3), np.uint8)
    others = [zeros.T, zeros.astype(np.int8), zeros + 1]
    assert len({digest_of_array(array) for array in [zeros, *others]}) == 4
    assert digest_of_array(zeros) == digest_of_array(np.asfortranarray(zeros))
