"""One pass over all images and masks: digests, statistics, and every error of the data before training starts."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from smp_ensemble.data.sources import digest_of_array, size_text
from smp_ensemble.exceptions import DataError
from smp_ensemble.typing import IGNORE_INDEX, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.datasets import Record

_MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass found in one image and its mask.

    Attributes:
        image_digest: Of the stored image.
        mask_digest: Of the decoded mask.
        size: Height and width in pixels.
        dtype: NumPy type of the image.
        mean: Per band, float64 `(C,)`, as are `variance`, `maximum` and `minimum`.
        id_counts: Pixels of each id in the mask, as (id, pixels) for the ids that occur; one tuple for each layer of a
            multilabel mask, else a single one.
    """

    image_digest: str
    mask_digest: str
    size: tuple[int, int]
    dtype: str
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]
    minimum: npt.NDArray[np.float64]
    id_counts: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def pixels(self) -> int:
        """Pixels of the image."""
        return self.size[0] * self.size[1]

    @property
    def bands(self) -> int:
        """C, the bands of the image."""
        return len(self.mean)

    @property
    def ids(self) -> frozenset[int]:
        """All ids in the mask, 255 among them."""
        return frozenset(found for layer in self.id_counts for found, _ in layer)

    def class_counts(self, task: Task) -> npt.NDArray[np.int64]:
        """Pixels of each class, shape `(num_classes,)`; in multilabel mode the ones of each layer."""
        if task.mode == "multilabel":
            return np.array([dict(layer).get(1, 0) for layer in self.id_counts], dtype=np.int64)
        counts = dict(self.id_counts[0])
        return np.array([counts.get(index, 0) for index in range(len(task.class_names))], dtype=np.int64)


def scan(records: Sequence[Record]) -> tuple[Scan, ...]:
    """Decodes every image and mask once, on several threads, with a progress bar on a terminal.

    Raises:
        DataError: For the first record, in their order, that cannot be read, whose mask has another size than its
            image, or whose bands or type differ from the first image's.
    """
    scans: list[Scan] = []
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(_scan_record, records)
        bar = tqdm(results, "reading data", len(records), unit="image", leave=False, disable=not sys.stderr.isatty())
        for record, found in zip(records, bar, strict=True):
            first = scans[0] if scans else found
            if (found.bands, found.dtype) != (first.bands, first.dtype):
                raise DataError(
                    f"image {record.image} has {found.bands} bands of {found.dtype}, but {records[0].image} has "
                    f"{first.bands} of {first.dtype}: expected the same bands in all images"
                )
            scans.append(found)
    return tuple(scans)


def check_ids(records: Sequence[Record], scans: Sequence[Scan], task: Task) -> None:
    """Refuses masks that hold an id which stands for no class.

    Raises:
        DataError: Names the first such file, the id, and what is allowed.
    """
    last = 1 if task.mode == "multilabel" else len(task.class_names) - 1
    allowed = {*range(last + 1), IGNORE_INDEX}
    for record, found in zip(records, scans, strict=True):
        if strange := sorted(found.ids - allowed):
            meaning = "0 and 1" if task.mode == "multilabel" else f"0..{last} ({', '.join(task.class_names)})"
            raise DataError(
                f"mask {record.mask} holds id {strange[0]}: expected {meaning}, or {IGNORE_INDEX} for ignored pixels"
            )


def _scan_record(record: Record) -> Scan:
    image, image_digest = record.image.read_with_digest()
    mask = record.mask.read()
    if image.shape[:2] != mask.shape[:2]:
        raise DataError(
            f"image {record.image} is {size_text(image.shape)}, but its mask {record.mask} is "
            f"{size_text(mask.shape)}: expected the same size"
        )
    bands = np.ascontiguousarray(image.transpose(2, 0, 1)).reshape(image.shape[2], -1)  # sums run along memory
    mean = bands.mean(axis=1, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise DataError(f"image {record.image} holds values that are not finite: fill its missing pixels first")
    return Scan(
        image_digest=image_digest,
        mask_digest=digest_of_array(mask),
        size=(image.shape[0], image.shape[1]),
        dtype=str(image.dtype),
        mean=mean,
        variance=bands.var(axis=1, dtype=np.float64),
        maximum=bands.max(axis=1).astype(np.float64),
        minimum=bands.min(axis=1).astype(np.float64),
        id_counts=tuple(_id_counts(layer) for layer in ([mask] if mask.ndim == 2 else np.moveaxis(mask, -1, 0))),
    )


def _id_counts(layer: npt.NDArray[Any]) -> tuple[tuple[int, int], ...]:
    counts = np.bincount(layer.ravel(), minlength=256)
    return tuple((int(found), int(counts[found])) for found in np.flatnonzero(counts))
