"""Batches with soft targets: the same images and masks as without, whoever loads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from smp_ensemble.data.datasets import SegmentationDataset
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.loading import training_loader
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.data.unlabelled import NoMask
from smp_ensemble.exceptions import ConfigError

UNLABELLED = {1, 4, 8}


class Brightness:
    """Says of each pixel how bright its first band is, in each of three outputs."""

    def __init__(self, data):
        self.data = data

    def __call__(self, index):
        image, _ = self.data.read(index)
        return (image[..., :1] / np.float32(255)).repeat(3, axis=2).astype(np.float32)


def without_masks(data):
    """The same images, some of which have no mask."""
    records = [
        replace(record, mask=NoMask(*scan.size, None, record.name)) if index in UNLABELLED else record
        for index, (record, scan) in enumerate(zip(data.records, data.scans, strict=True))
    ]
    return SegmentationDataset(data.name, data.source, data.task, records, data.scans)


class PartlyIgnored:
    """A data set in whose masks the left half is ignored."""

    def __init__(self, data):
        self.data, self.records = data, data.records

    def __len__(self):
        return len(self.data)

    def read(self, index):
        image, mask = self.data.read(index)
        mask = mask.copy()
        mask[:, : mask.shape[1] // 2] = 255
        return image, mask


@pytest.fixture(scope="module")
def data():
    return without_masks(load_data("synthetic:count=20,size=48", mode="multiclass").train)


def loader(data, *, epoch=0, workers=0, augment="flips", teaching=None):
    transform = TrainTransform(56, fill=(90, 90, 90), augment=augment)
    return training_loader(
        data, transform, batch_size=4, seed=0, workers=workers, epoch_of=lambda: epoch, teaching=teaching
    )


def test_images_and_masks_are_those_of_a_training_without_a_teacher(data):
    plain, taught = (
        list(loader(data, augment="default")),
        list(loader(data, augment="default", teaching=Brightness(data))),
    )
    assert len(plain) == len(taught) > 2
    for one, other in zip(plain, taught, strict=True):
        assert set(other) == {*one, "soft"}
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (tuple(other["soft"].shape), other["soft"].dtype) == ((4, 3, 56, 56), torch.float32)


def test_soft_targets_lie_on_their_pixels_and_say_nothing_beside_the_image(data):
    for batch in loader(data, teaching=Brightness(data)):
        known = batch["soft"].isfinite()
        assert known[:, 0].flatten(1).sum(1).tolist() == [48 * 48] * 4  # the crop is larger than the image
        expected = (batch["image"][:, :1] / 255).expand(-1, 3, -1, -1)
        torch.testing.assert_close(batch["soft"][known], expected[known], rtol=0, atol=1e-6)
        for index, mask in zip(batch["index"].tolist(), batch["mask"], strict=True):
            assert bool((mask == 255).all()) == (index in UNLABELLED)


def test_where_a_mask_is_ignored_the_teacher_is_too_but_not_where_there_is_no_mask(data):
    for batch in loader(PartlyIgnored(data), teaching=Brightness(data)):
        for index, mask, soft in zip(batch["index"].tolist(), batch["mask"], batch["soft"], strict=True):
            if index in UNLABELLED:
                assert int(soft[0].isfinite().sum()) == 48 * 48
            else:
                assert torch.equal(soft[0].isfinite(), mask != 255)
                assert int(soft[0].isfinite().sum()) == 48 * 24


def test_the_number_of_workers_and_restarts_change_nothing(data):
    alone, shared = (list(loader(data, epoch=1, workers=n, teaching=Brightness(data))) for n in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one)


def test_a_transform_that_moves_no_planes_is_refused(data):
    with pytest.raises(ConfigError, match="soft targets need a transform with `with_planes`, got function"):
        training_loader(
            data, lambda image, mask, seed: (image, mask), batch_size=2, seed=0, workers=0, epoch_of=lambda: 0,
            teaching=Brightness(data),
        )  # fmt: skip
