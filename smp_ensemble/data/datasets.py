"""The one dataset type: named images with masks, decoded and checked once, read again on demand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from smp_ensemble.data.sources import DIGEST_LENGTH, ImageSource, MaskSource
from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import DatasetReference, Task

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smp_ensemble.data.scanning import Scan


@dataclass(frozen=True)
class Record:
    """One image with its mask.

    Attributes:
        name: Unique; the file's stem, with its folders inside `images/` if there are any (`a/1`).
        image: Where the image is.
        mask: Where the mask is.
        split: `train`, `val`, `test`, or None where the data names none.
        group: Images of one group never fall into different splits.
    """

    name: str
    image: ImageSource
    mask: MaskSource
    split: str | None = None
    group: str | None = None


class Statistics(NamedTuple):
    """Per band, over all pixels of a data set: float64, shape `(C,)`, in the units of the images."""

    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    minimum: npt.NDArray[np.float64]


class SegmentationDataset(Dataset[dict[str, npt.NDArray[Any]]]):
    """Images and masks with what one pass over them found out.

    Attributes:
        name: For people: `aerial-val`.
        source: Where the data came from.
        task: Mode, class names, bands.
        records: The images, in order.
        scans: What the pass found for each image; see `smp_ensemble.data.scanning.scan`.
    """

    def __init__(self, name: str, source: str, task: Task, records: Iterable[Record], scans: Iterable[Scan]) -> None:
        self.name = name
        self.source = source
        self.task = task
        self.records = tuple(records)
        self.scans = tuple(scans)
        if not self.records:
            raise DataError(f"data set '{name}' from {source}: expected at least one image, found none")
        if len(self.records) != len(self.scans):
            raise DataError(f"data set '{name}': {len(self.records)} records, but {len(self.scans)} scans")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        image, mask = self.read(index)
        return {"image": image, "mask": mask}

    def read(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """Image `(H, W, C)` and mask, uint8 `(H, W)`, multilabel `(H, W, K)`; 255 is ignored."""
        record = self.records[index]
        return record.image.read(), record.mask.read()

    def subset(self, indices: Iterable[int], name: str | None = None) -> SegmentationDataset:
        """The images at `indices`, in that order; an index may come more than once (bootstrap).

        Args:
            indices: Positions in this data set.
            name: Of the subset; this data set's own when left out.
        """
        chosen = [int(index) for index in indices]
        records = [self.records[index] for index in chosen]
        return SegmentationDataset(
            name or self.name, self.source, self.task, records, [self.scans[index] for index in chosen]
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the images, in order."""
        return tuple(record.name for record in self.records)

    @property
    def groups(self) -> tuple[str, ...] | None:
        """The group of each image, or None where the data names none."""
        groups = tuple(record.group for record in self.records if record.group is not None)
        return groups if len(groups) == len(self.records) else None

    @property
    def image_digests(self) -> tuple[str, ...]:
        """For each image 32 hexadecimal digits of the SHA-256 of its file (synthetic: of its pixels)."""
        return tuple(scan.image_digest for scan in self.scans)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits over all names, images and masks, in any order."""
        lines = sorted(
            f"{record.name}\t{scan.image_digest}\t{scan.mask_digest}\n"
            for record, scan in zip(self.records, self.scans, strict=True)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:DIGEST_LENGTH]

    def reference(self) -> DatasetReference:
        """What scores are linked to."""
        return DatasetReference(self.name, self.digest, self.source, len(self))

    def statistics(self) -> Statistics:
        """Mean, standard deviation, maximum and minimum of each band over all pixels."""
        pixels = np.array([scan.pixels for scan in self.scans], dtype=np.float64)[:, None]
        means = np.stack([scan.mean for scan in self.scans])
        mean = (pixels * means).sum(axis=0) / pixels.sum()
        variances = np.stack([scan.variance for scan in self.scans])
        variance = (pixels * (variances + (means - mean) ** 2)).sum(axis=0) / pixels.sum()
        maximum = np.max([scan.maximum for scan in self.scans], axis=0)
        minimum = np.min([scan.minimum for scan in self.scans], axis=0)
        return Statistics(mean, np.sqrt(variance), maximum, minimum)

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """Pixels of each class in each image, shape `(n, num_classes)`; ignored pixels belong to none."""
        return np.stack([scan.class_counts(self.task) for scan in self.scans])

    @property
    def class_presence(self) -> npt.NDArray[np.bool_]:
        """Which image holds which class, shape `(n, num_classes)`."""
        return self.class_counts > 0

    @property
    def class_pixels(self) -> npt.NDArray[np.int64]:
        """Pixels of each class, shape `(num_classes,)`."""
        pixels: npt.NDArray[np.int64] = self.class_counts.sum(axis=0)
        return pixels
