"""Images and masks as encoded bytes in memory: a data set that never was in files, checked as strictly as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.images import decode_image, decode_mask
from smp_ensemble.data.scanning import check_ids, scan
from smp_ensemble.data.sources import digest_of, stack_classes
from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import IGNORE_INDEX, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image.

    Attributes:
        content: What an image file would hold.
        where: It came from, for errors: `row 3`.
    """

    content: bytes = field(repr=False)
    where: str

    def __str__(self) -> str:
        return self.where

    def read(self) -> npt.NDArray[Any]:
        """Pixels, shape `(H, W, C)`."""
        return decode_image(self.content, self.where)

    def read_with_digest(self) -> tuple[npt.NDArray[Any], str]:
        """Pixels, and the digest of the bytes: that of a file that holds them."""
        return self.read(), digest_of(self.content)


@dataclass(frozen=True)
class MaskBytes:
    """An encoded mask of class ids; attributes as of `ImageBytes`."""

    content: bytes = field(repr=False)
    where: str

    def __str__(self) -> str:
        return self.where

    def read(self) -> npt.NDArray[np.uint8]:
        """Class ids, shape `(H, W)`."""
        return decode_mask(self.content, self.where)


@dataclass(frozen=True)
class ClassMaskBytes:
    """One encoded binary mask for each class: the multilabel form."""

    masks: tuple[MaskBytes, ...]

    def __str__(self) -> str:
        return " + ".join(str(mask) for mask in self.masks)

    def read(self) -> npt.NDArray[np.uint8]:
        """0, 1 and 255, shape `(H, W, K)`."""
        return stack_classes(self.masks)


def dataset_in_memory(name: str, task: Task, records: Sequence[Record], source: str = "memory") -> SegmentationDataset:
    """Decodes and checks everything once, against a task that is known.

    Its digest is that of a data set of files with these names, these bytes as images, and masks with these ids (however
    they are encoded): scores on the one compare with scores on the other.

    Args:
        name: For people.
        task: What the masks must hold, and how many bands the images must have.
        records: Images and masks; 255 in a mask is an ignored pixel.
        source: Where the data came from.

    Raises:
        DataError: No image at all, two of one name, a broken image or mask, sizes that differ, other bands than the
            task's, an id that is no class, or masks in which everything is background or ignored.
    """
    seen: dict[str, Record] = {}
    for record in records:
        if (twin := seen.setdefault(record.name, record)) is not record:
            raise DataError(
                f"expected different names of images, found '{record.name}' for {twin.image} and {record.image}"
            )
    scans = scan(records)
    for record, found in zip(records, scans, strict=True):
        if found.bands != task.in_channels:
            raise DataError(f"image {record.image}: expected {task.in_channels} bands, found {found.bands}")
    check_ids(records, scans, task)
    ids = frozenset[int]().union(*(found.ids for found in scans))
    if IGNORE_INDEX in ids and ids <= {0, IGNORE_INDEX}:
        raise DataError(
            f"masks hold nothing but 0 and {IGNORE_INDEX}, which is ignored: expected class ids; if {IGNORE_INDEX} is "
            "meant as the foreground, write 1"
        )
    return SegmentationDataset(name, source, task, records, scans)
