"""A DataFrame of image bytes and masks as a data set, so that it is measured like any other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pandas as pd

from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.memory import ClassMaskBytes, ImageBytes, MaskBytes, dataset_in_memory
from smp_ensemble.exceptions import DataError, InputError
from smp_ensemble.inference.inputs import IMAGE_COLUMN, to_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.sources import MaskSource
    from smp_ensemble.typing import Task


def dataset_of_frame(
    frame: pd.DataFrame,
    masks: Sequence[Any],
    task: Task,
    *,
    title: str = "data",
    name: str | None = None,
    group: str | None = None,
) -> SegmentationDataset:
    """Reads and checks images and masks of a DataFrame.

    Args:
        frame: Its column `image` holds PNG, JPEG, TIFF, BMP or WebP bytes, or base64 of them.
        masks: For each row, as predictions have them: PNG bytes of class ids or base64 of them; in multilabel mode a
            JSON object with one of 0 and 1, in base64, for each class. 255 is ignored.
        task: What the masks must hold, and how many bands the images must have.
        title: Of the data set.
        name: Column with the name of each image; None: `row 0`, `row 1`, ...
        group: Column with the group of each image; None: there are no groups.

    Raises:
        DataError: A cell is not as described, or a picture does not fit; names row, expected and found.
        InputError: No such column.
    """
    images = _column(frame, IMAGE_COLUMN)
    if len(images) != len(masks):
        raise DataError(f"expected a mask for each of {len(images)} images, found {len(masks)}")
    names = [f"row {row}" for row in range(len(images))] if name is None else _words(frame, name)
    groups = [None] * len(images) if group is None else _words(frame, group)
    records = [
        Record(
            names[row],
            ImageBytes(to_bytes(image, f"row {row}"), f"row {row}"),
            _mask(mask, row, task),
            group=groups[row],
        )
        for row, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    return dataset_in_memory(title, task, records, source="DataFrame")


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame.columns:
        raise InputError(f"expected a column '{name}', found {', '.join(map(str, frame.columns)) or 'none'}")
    found: list[Any] = frame[name].tolist()
    return found


def _words(frame: pd.DataFrame, column: str) -> list[str]:
    """A column as text; every cell holds something."""
    values = _column(frame, column)
    for row, value in enumerate(values):
        if not pd.api.types.is_scalar(value) or pd.isna(value) or str(value) == "":
            raise DataError(f"expected text or a number in row {row} of the column '{column}', found {value!r}")
    return [str(value) for value in values]


def _mask(value: Any, row: int, task: Task) -> MaskSource:
    where = f"row {row}"
    if task.mode != "multilabel":
        return MaskBytes(to_bytes(value, where, "mask"), where)
    expected = f"a JSON object with base64 of a PNG for each of {', '.join(task.class_names)}"
    if not isinstance(value, str):
        raise DataError(f"mask {where}: expected {expected}, found {type(value).__name__}")
    try:
        planes = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"mask {where}: expected {expected}, found other text") from error
    if not isinstance(planes, dict):
        raise DataError(f"mask {where}: expected {expected}, found {type(planes).__name__}")
    if set(planes) != set(task.class_names):
        raise DataError(f"mask {where}: expected {expected}, found {', '.join(planes) or 'none'}")
    layers = []
    for label in task.class_names:
        place = f"{where}, class {label}"
        layers.append(MaskBytes(to_bytes(planes[label], place, "mask"), place))
    return ClassMaskBytes(tuple(layers))
