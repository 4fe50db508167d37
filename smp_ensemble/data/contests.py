"""Form 2: a contest's list of run lengths, `name,mask`, beside a folder of images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from smp_ensemble.data.datasets import Record
from smp_ensemble.data.folders import Description, check_unique, name_of
from smp_ensemble.data.images import IMAGE_SUFFIXES, image_size
from smp_ensemble.data.sidecars import Classes, read_classes, read_splits
from smp_ensemble.data.sources import ImageFile, RunLengths
from smp_ensemble.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SUFFIXES = (".csv", ".tsv")


def describe_contest(path: Path) -> Description:
    """Finds the images and run lengths of a contest.

    The list has comma-separated lines after a header `name,mask`, or tab-separated lines without a header. Images lie
    in `images/` beside it, or beside it. Where the file's name holds `train`, the lists with `val` and `test` in its
    place are those splits. `classes.json` beside it may name the two classes; `splits.csv` may group the images.

    Raises:
        DataError: A line is malformed, an image is missing, or one comes twice.
    """
    folder = path.parent
    groups = _groups(folder)
    records = []
    for split, listed in _lists(path).items():
        for place, name, runs in _lines(listed):
            image = _image(folder, name, place)
            stem = name_of(name)
            if groups and stem not in groups:
                raise DataError(f"{place}: expected a group of '{stem}' in {folder / 'splits.csv'}, found none")
            mask = RunLengths(runs, *image_size(image), line=place)
            records.append(Record(stem, ImageFile(image), mask, split, groups.get(stem)))
    if not records:
        raise DataError(f"data '{path}': expected lines 'name,mask', found none")
    check_unique(records, path)
    classes = read_classes(folder / "classes.json")
    if classes is None or len(classes.names) != 2:
        classes = Classes(("background", "foreground"))
    return Description(tuple(records), replace(classes, mode="binary"), "binary")


def _lists(path: Path) -> dict[str | None, Path]:
    """The lists by their splits; a single list names no split."""
    if "train" not in path.name:
        return {None: path}
    siblings = {split: path.with_name(path.name.replace("train", split)) for split in ("val", "test")}
    return {"train": path, **{split: sibling for split, sibling in siblings.items() if sibling.is_file()}}


def _lines(path: Path) -> list[tuple[str, str, str]]:
    """Place for errors, name and run lengths of each line. Not the csv module: it limits the length of a field."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    separator, first = ("\t", 1) if lines and "\t" in lines[0] else (",", 2)
    if separator == "," and [cell.strip().strip('"') for cell in "".join(lines[:1]).split(",")] != ["name", "mask"]:
        start = f"'{lines[0][:40]}'" if lines else "nothing"
        raise DataError(f"{path}: expected the header 'name,mask' or tab-separated lines, found {start}")
    found = []
    for number, line in enumerate(lines[first - 1 :], start=first):
        if not line.strip():
            continue
        name, separated, runs = (part.strip().strip('"') for part in line.partition(separator))
        if (not separated and separator == ",") or not name:
            raise DataError(
                f"{path} line {number}: expected a name, '{separator}' and run lengths, found '{line[:40]}'"
            )
        found.append((f"{path} line {number} ({name})", name, runs))
    return found


def _image(folder: Path, name: str, place: str) -> Path:
    """The image of a line, whose ending the line may leave out."""
    for base in (folder / "images", folder):
        for ending in ("", *IMAGE_SUFFIXES):
            if (path := base / f"{name}{ending}").is_file():
                return path
    raise DataError(f"{place}: image {folder / 'images' / name} does not exist; correct the name, or add the image")


def _groups(folder: Path) -> Mapping[str, str]:
    rows = read_splits(folder) or []
    return {name_of(row["image"]): row["group"] for row in rows if row.get("group")}
