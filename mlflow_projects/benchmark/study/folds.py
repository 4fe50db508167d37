"""A data set in memory, and its division for grouped cross-validation: each group is test data exactly once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.forms import DataSplits, load_data
from smp_ensemble.data.splits import fold_split

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Decoded:
    """An image or a mask that was read once; training reads each one in every epoch."""

    pixels: npt.NDArray[np.generic]

    def read(self) -> npt.NDArray[np.generic]:
        """A view that nobody can write to."""
        return self.pixels


def load_whole(data: str, mask_column: str) -> SegmentationDataset:
    """All images of a data set, whatever its own splits, decoded in memory."""
    splits = load_data(data, mask_column=mask_column)
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    records: list[Record] = []
    for part in parts:
        for record in part.records:
            image, mask = record.image.read(), record.mask.read()
            image.setflags(write=False)
            mask.setflags(write=False)
            records.append(replace(record, image=Decoded(image), mask=Decoded(mask)))  # type: ignore[arg-type]
    order = sorted(range(len(records)), key=lambda index: records[index].name)
    scans = [scan for part in parts for scan in part.scans]
    name = splits.train.name.removesuffix("-train")
    return SegmentationDataset(
        name, splits.train.source, splits.task, [records[i] for i in order], [scans[i] for i in order]
    )


def groups_of(data: SegmentationDataset) -> list[str]:
    """The group of each image; images are their own groups where the data names none."""
    return list(data.groups or data.names)


def evenly(total: int, wanted: int) -> npt.NDArray[np.int64]:
    """So many of the places 0, 1, ..., `total` - 1, evenly spread; all where as many or more are wanted."""
    return np.linspace(0, total - 1, min(wanted, total)).astype(np.int64)


def fold_splits(data: SegmentationDataset, folds: int, fold: int, train_share: float = 1.0) -> DataSplits:
    """Fold number `fold` is test data, the next one validation data, and the others, or a share of them, train.

    The division itself never changes: it is drawn with seed 0 and knows groups and classes.
    """
    parts = [held for _, held in fold_split(data.class_presence, data.groups, folds, 0)]
    test, val = parts[fold], parts[(fold + 1) % folds]
    train = np.setdiff1d(np.arange(len(data)), np.concatenate([test, val]))
    train = train[evenly(len(train), max(1, round(train_share * len(train))))]
    return DataSplits(
        data.subset(train, f"{data.name}-train"),
        data.subset(val, f"{data.name}-val"),
        data.subset(test, f"{data.name}-test"),
    )
