"""Which images a folder, a glob, a file or a CSV names."""

from __future__ import annotations

import glob
import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from smp_ensemble.data.images import IMAGE_SUFFIXES
from smp_ensemble.exceptions import DataError

CSV_COLUMNS = ("image", "name")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputImage:
    """One image to predict.

    Attributes:
        name: How results call it: its path relative to the folder that was named, with forward slashes.
        path: Where it is.
    """

    name: str
    path: Path


def find_images(spec: str, output: Path | None = None) -> list[InputImage]:
    """The images that a folder (with its subfolders), a glob, a file or a CSV names, sorted by name but for a CSV.

    A CSV needs a header with a column `image` or `name`; paths are relative to it, or to `images/` beside it,
    and may leave out the ending.

    Args:
        spec: Says which.
        output: Where results go; what lies in it, where it is below the folder, is results and no image to predict.

    Raises:
        DataError: Nothing there, or a CSV without such a column.
    """
    path = Path(spec)
    if path.is_dir():
        found = [one for one in path.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
        found = _without_results(found, path, output)
        images = [InputImage(one.relative_to(path).as_posix(), one) for one in found]
    elif path.suffix.lower() in {".csv", ".tsv"} and path.is_file():
        return _from_csv(path)
    elif path.is_file():
        images = [InputImage(path.name, path)]
    else:
        found = [Path(one) for one in glob.glob(spec, recursive=True) if Path(one).is_file()]  # noqa: PTH207 (absolute patterns)
        images = [InputImage(one.name, one) for one in found]
        if len({image.name for image in images}) < len(images):
            images = [InputImage(image.path.as_posix().lstrip("/"), image.path) for image in images]
    if not images:
        raise DataError(
            f"no images found at '{spec}': expected an image, a folder, a glob such as 'images/*.png', or a CSV "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    return sorted(images, key=lambda image: image.name)


def _without_results(found: list[Path], folder: Path, output: Path | None) -> list[Path]:
    """The images that do not lie in the output folder, if that is below the folder of images."""
    if output is None or not output.is_dir() or folder.resolve() not in output.resolve().parents:
        return found
    results = folder / output.resolve().relative_to(folder.resolve())
    kept = [one for one in found if not one.is_relative_to(results)]
    if len(kept) < len(found):
        number = len(found) - len(kept)
        logger.info("%d images in the output folder %s are taken for results, and not predicted", number, output)
    return kept


def _from_csv(path: Path) -> list[InputImage]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:  # pandas: the csv module limits the length of a field, and run lengths are long
        table = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    column = next((known for known in CSV_COLUMNS if known in table.columns), None)
    if column is None:
        raise DataError(f"expected a column {' or '.join(CSV_COLUMNS)} in {path}, got {', '.join(table.columns)}")
    names = dict.fromkeys(table[column].fillna("").tolist())  # a list may name an image once for each of its objects
    if "" in names:
        raise DataError(f"expected a path in every row of {path}, column '{column}', got an empty one")
    if not names:
        raise DataError(f"{path} names no images")
    return [InputImage(name, _beside(path.parent, name)) for name in names]


def _beside(folder: Path, name: str) -> Path:
    """The image that a CSV in `folder` names, perhaps without its ending; where there is none, where it should be."""
    places = [folder / f"{part}{name}{ending}" for part in ("", "images/") for ending in ("", *IMAGE_SUFFIXES)]
    return next((place for place in places if place.is_file()), folder / "images" / name)
