from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.scanning import scan
from smp_ensemble.data.sources import ImageFile, MaskFile
from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import Task

TASK = Task("multiclass", ("land", "road", "roof"))


@pytest.fixture
def dataset(tmp_path) -> SegmentationDataset:
    rng = np.random.default_rng(1)
    records = []
    for index, (size, ids) in enumerate([((4, 6), [0, 1]), ((8, 3), [2, 255]), ((5, 5), [1, 1])]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"i{index}.png")
        Image.fromarray(rng.choice(np.array(ids, np.uint8), size)).save(tmp_path / f"m{index}.png")
        files = ImageFile(tmp_path / f"i{index}.png"), MaskFile(tmp_path / f"m{index}.png")
        records.append(Record(f"n{index}", *files, group=f"g{index % 2}"))
    return SegmentationDataset("set", "somewhere", TASK, records, scan(records))


def test_items_are_raw_arrays(dataset):
    image, mask = dataset.read(0)
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((4, 6, 3), np.uint8, (4, 6), np.uint8)
    item = dataset[0]
    np.testing.assert_array_equal(item["image"], image)
    np.testing.assert_array_equal(item["mask"], mask)
    assert len(list(dataset)) == len(dataset) == 3


def test_statistics_are_those_of_all_pixels_at_once(dataset):
    pixels = np.concatenate([dataset.read(index)[0].reshape(-1, 3) for index in range(3)]).astype(np.float64)
    found = dataset.statistics()
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0))
    np.testing.assert_allclose(found.std, pixels.std(axis=0))
    np.testing.assert_array_equal(found.maximum, pixels.max(axis=0))
    np.testing.assert_array_equal(found.minimum, pixels.min(axis=0))


def test_classes_are_counted_without_ignored_pixels(dataset):
    masks = [dataset.read(index)[1] for index in range(3)]
    expected = np.array([[(mask == label).sum() for label in range(3)] for mask in masks])
    np.testing.assert_array_equal(dataset.class_pixels, expected.sum(axis=0))
    np.testing.assert_array_equal(dataset.class_presence, expected > 0)
    assert dataset.class_presence.tolist() == [[True, True, False], [False, False, True], [False, True, False]]


def test_the_digest_depends_on_content_and_names_but_not_on_order(dataset):
    assert dataset.digest == dataset.subset([2, 0, 1]).digest
    assert len({dataset.digest, dataset.subset([0, 1]).digest, dataset.subset([0, 1, 2, 2]).digest}) == 3
    assert len(dataset.digest) == 32
    content = dataset.records[0].image.path.read_bytes()
    assert dataset.image_digests[0] == hashlib.sha256(content).hexdigest()[:32]


def test_subsets_keep_order_and_repeats(dataset):
    part = dataset.subset([2, 0, 2], "part")
    assert part.names == ("n2", "n0", "n2")
    assert part.groups == ("g0", "g0", "g0")
    assert part.name == "part"
    assert part.reference().count == 3
    assert dataset.reference().name == "set"
    assert dataset.reference().source == "somewhere"


def test_groups_are_none_where_there_are_none(dataset):
    records = [Record(record.name, record.image, record.mask) for record in dataset.records]
    assert SegmentationDataset("set", "", TASK, records, dataset.scans).groups is None


def test_an_empty_data_set_is_refused(dataset):
    with pytest.raises(DataError, match="data set 'set' from somewhere: expected at least one image, found none"):
        dataset.subset([])
