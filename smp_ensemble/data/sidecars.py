"""The small files beside the images: `classes.json` and `splits.csv`."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from smp_ensemble.exceptions import DataError
from smp_ensemble.registry import nearest
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode
from smp_ensemble.untrusted import shorten

if TYPE_CHECKING:
    from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Classes:
    """What `classes.json` says.

    Attributes:
        names: Class names in the order of their ids.
        mode: Its `task`, or None.
        ignore_index: The id in the files that stands for ignored pixels.
    """

    names: tuple[str, ...]
    mode: Mode | None = None
    ignore_index: int = IGNORE_INDEX


def read_classes(path: Path) -> Classes | None:
    """What a `classes.json` says, or None where there is no such file.

    Raises:
        DataError: It is not JSON of the expected form.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {shorten(error)}") from error
    names = content.get("names") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f'{path}: expected {{"names": ["background", ...]}}, a list of class names, found {shorten(repr(names))}'
        )
    if len(set(names)) < len(names) or len(names) > IGNORE_INDEX:
        raise DataError(
            f"{path}: expected at most {IGNORE_INDEX} different class names, found {shorten(', '.join(names))}"
        )
    mode = content.get("task")
    if mode is not None and mode not in MODES:
        raise DataError(f"{path}: unknown task {shorten(repr(mode))}: {nearest(str(mode), MODES)}")
    ignored = content.get("ignore_index", IGNORE_INDEX)
    if ignored is not None and (not isinstance(ignored, int) or isinstance(ignored, bool)):
        raise DataError(f"{path}: expected a whole number as ignore_index, found {shorten(repr(ignored))}")
    return Classes(tuple(names), cast("Mode | None", mode), IGNORE_INDEX if ignored is None else ignored)


def read_splits(folder: Path) -> list[dict[str, str]] | None:
    """The rows of `splits.csv`, or None where there is no such file.

    Raises:
        DataError: It has no column `image`, no rows, or a row of another length.
    """
    path = folder / "splits.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[dict[str, Any]] = list(reader)
            columns = list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if "image" not in columns:
        raise DataError(f"{path}: expected a column 'image', found {shorten(', '.join(columns)) or 'an empty file'}")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise DataError(f"{path} line {line}: expected {len(columns)} values ({shorten(', '.join(columns))})")
        for column in ("image", "split"):
            row[column] = row.get(column, "").strip()
        if not row["image"]:
            raise DataError(f"{path} line {line}: expected a path in the column 'image', found none")
    unsplit = not any(row["split"] for row in rows)
    grouped = any(row.get("group") for row in rows)
    for line, row in enumerate(rows, start=2):
        if not unsplit and row["split"] not in SPLITS:
            raise DataError(f"{path} line {line}: expected split train, val or test, found '{shorten(row['split'])}'")
        if grouped and not row["group"]:
            raise DataError(f"{path} line {line}: expected a group, as other rows have one, found none")
    return rows
