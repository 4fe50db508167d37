"""A data set in memory is the same as one of files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from smp_ensemble.data.datasets import Record
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.memory import ClassMaskBytes, ImageBytes, MaskBytes, dataset_in_memory
from smp_ensemble.exceptions import DataError


@pytest.mark.parametrize("multilabel", [False, True])
def test_it_has_the_digests_of_files_with_the_same_bytes(make_folder, multilabel):
    ids = np.eye(8, dtype=np.uint8)
    masks = {f"{index}": {"a": ids, "b": 1 - ids} if multilabel else ids for index in range(8)}
    folder = make_folder(masks, size=(8, 8))
    files = load_data(str(folder)).train

    def mask(name: str):
        if not multilabel:
            return MaskBytes((folder / "masks" / f"{name}.png").read_bytes(), name)
        return ClassMaskBytes(
            tuple(MaskBytes((folder / "masks" / label / f"{name}.png").read_bytes(), label) for label in "ab")
        )

    records = [
        Record(name, ImageBytes((folder / "images" / f"{name}.png").read_bytes(), name), mask(name))
        for name in files.names
    ]
    memory = dataset_in_memory("memory", files.task, records)
    assert memory.image_digests == files.image_digests
    assert memory.digest == files.digest
    assert memory.reference() == dataclasses.replace(files.reference(), name="memory", source="memory")
    for index in range(len(files)):
        for ours, theirs in zip(memory.read(index), files.read(index), strict=True):
            assert np.array_equal(ours, theirs)


def test_contents_do_not_flood_errors(make_folder):
    folder = make_folder({"0": np.eye(8, dtype=np.uint8), "1": 0, "2": 1}, size=(8, 8))
    content = (folder / "images" / "0.png").read_bytes()
    for source in (ImageBytes(content, "row 0"), MaskBytes(content, "row 0")):
        assert str(source) == "row 0"
        assert len(repr(source)) < 40


def test_masks_without_a_class_but_background_are_refused_where_255_is_there(make_folder):
    folder = make_folder({"0": np.eye(8, dtype=np.uint8), "1": 0, "2": 255 * np.eye(8, dtype=np.uint8)}, size=(8, 8))
    task = load_data(str(folder)).task
    image = ImageBytes((folder / "images" / "0.png").read_bytes(), "image")
    masks = [MaskBytes((folder / "masks" / f"{index}.png").read_bytes(), f"mask {index}") for index in range(3)]
    black, white = Record("black", image, masks[1]), Record("white", image, masks[2])
    assert len(dataset_in_memory("black", task, [black])) == 1
    assert len(dataset_in_memory("all", task, [Record("some", image, masks[0]), white])) == 2
    with pytest.raises(DataError, match="nothing but 0 and 255"):
        dataset_in_memory("white", task, [black, white])
