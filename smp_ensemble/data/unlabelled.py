"""Images without masks that join the training images: all of their pixels are ignored, but a teacher knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.scanning import scan
from smp_ensemble.data.sources import ImageFile
from smp_ensemble.exceptions import DataError, LeakError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from smp_ensemble.data.forms import DataSplits


@dataclass(frozen=True)
class NoMask:
    """The mask of an image that has none: 255 everywhere.

    Attributes:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        layers: K in multilabel mode; None: class ids.
        where: The image, for errors.
    """

    height: int
    width: int
    layers: int | None
    where: str

    def __str__(self) -> str:
        return f"of {self.where}, which has none,"

    def read(self) -> npt.NDArray[np.uint8]:
        """255, shape `(H, W)`; multilabel `(H, W, K)`."""
        shape = (self.height, self.width) if self.layers is None else (self.height, self.width, self.layers)
        return np.full(shape, IGNORE_INDEX, dtype=np.uint8)


class Joined(NamedTuple):
    """Training images with those that have no mask.

    Attributes:
        train: The training images, then the images without a mask.
        added: How many these are.
        known: Images that were left out, because they are training images already or came before.
    """

    train: SegmentationDataset
    added: int
    known: int


def is_labelled(record: Record) -> bool:
    """Whether somebody drew its mask."""
    return not isinstance(record.mask, NoMask)


def join_unlabelled(splits: DataSplits, images: Iterable[tuple[str, Path]]) -> Joined:
    """The training images, and after them the images that have no mask.

    An image whose file is that of a training image, or of one before it, is left out: its copy trains already.

    Args:
        splits: The data; nothing that is scored may come back as a training image.
        images: Name and file of each image; in the data set the name is `unlabelled/NAME`.

    Raises:
        DataError: An image cannot be read, or has other bands than the training images.
        LeakError: Images are validation, test or left-out images.
    """
    task = splits.task
    layers = task.num_outputs if task.mode == "multilabel" else None
    records = []
    for name, path in images:
        source = ImageFile(path)
        height, width = source.read().shape[:2]
        records.append(Record(f"unlabelled/{name}", source, NoMask(height, width, layers, str(path))))
    scans = scan(records)
    for record, found in zip(records, scans, strict=True):
        expected = splits.train.scans[0]
        if (found.bands, found.dtype) != (expected.bands, expected.dtype):
            raise DataError(
                f"image {record.image} has {found.bands} bands of {found.dtype}, but the training images have "
                f"{expected.bands} of {expected.dtype}: expected the same bands in all images"
            )
    _check_unseen(splits, {found.image_digest for found in scans})
    seen = set(splits.train.image_digests)
    added = []
    for record, found in zip(records, scans, strict=True):
        if found.image_digest not in seen:
            added.append((record, found))
            seen.add(found.image_digest)
    train = splits.train
    joined = SegmentationDataset(
        f"{train.name}+unlabelled" if added else train.name,
        train.source,
        task,
        [*train.records, *(record for record, _ in added)],
        [*train.scans, *(found for _, found in added)],
    )
    return Joined(joined, len(added), len(records) - len(added))


def _check_unseen(splits: DataSplits, digests: set[str]) -> None:
    for what, data in (("validation", splits.val), ("test", splits.test), ("left-out", splits.left_out)):
        shared = len(digests & set(data.image_digests)) if data is not None else 0
        if shared:
            raise LeakError(
                f"{shared} of the {len(digests)} unlabelled images are {what} images: a score on images that were "
                "trained on would mean nothing. Take them out of the folder or list"
            )
