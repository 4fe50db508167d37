"""Images from a folder, a glob, a file or a CSV, and predictions to files."""

from __future__ import annotations

import csv
import glob
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from smp_ensemble.data.images import IMAGE_SUFFIXES
from smp_ensemble.exceptions import DataError, InputError
from smp_ensemble.inference.uncertainty import COLUMNS, draw_heatmap, image_means

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

CSV_COLUMNS = ("image", "name")
UNCERTAINTY = "uncertainty"


@dataclass(frozen=True)
class InputImage:
    """One image to predict.

    Attributes:
        name: How results call it: its path relative to the folder that was named, with forward slashes.
        path: Where it is.
    """

    name: str
    path: Path


def find_images(spec: str) -> list[InputImage]:
    """The images that a folder (with its subfolders), a glob, a file or a CSV names, sorted by name but for a CSV.

    A CSV needs a header with a column `image` or `name`; paths are relative to it, or to `images/` beside it,
    and may leave out the ending.

    Raises:
        DataError: Nothing there, or a CSV without such a column.
    """
    path = Path(spec)
    if path.is_dir():
        found = [one for one in path.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
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


class FileWriter:
    """Writes predictions as they come: one file for each image, or one CSV for run lengths.

    Args:
        output: The folder; for `rle` also a `.csv` file. Created.
        kind: `mask`, `probabilities`, `uncertainty`, `overlay` or `rle`.
        images: All that will be written.
        max_entropy: The brightest colour in heat maps of uncertainty, in nats.

    Raises:
        InputError: The output is in the way, or two images would be written to one file.
    """

    def __init__(self, output: Path, kind: str, images: Iterable[InputImage], max_entropy: float = math.log(2)) -> None:
        if output.suffix.lower() == ".csv" and kind != "rle":
            raise InputError(f"output '{output}' is a CSV, which only kind=rle writes: name a folder")
        self._kind = kind
        self._max_entropy = max_entropy
        self._rows: list[tuple[str, ...]] = []
        table = f"{UNCERTAINTY}.csv" if kind == UNCERTAINTY else "predictions.csv"
        self._table = output if output.suffix.lower() == ".csv" else output / table
        self.folder = output.parent if output.suffix.lower() == ".csv" else output
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output '{output}' is a file: name a folder")
        self._targets = self._plan(images) if kind != "rle" else {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def _plan(self, images: Iterable[InputImage]) -> dict[InputImage, Path]:
        """The file of each image: always below the folder, its own, and never an image's."""
        suffix = ".npy" if self._kind == "probabilities" else ".png"
        images = list(images)
        sources = {image.path.resolve() for image in images}
        taken: dict[Path, InputImage] = {}
        for image in images:
            name = Path(image.name)
            inside = Path(*[part for part in name.parts if part not in {name.anchor, ".."}])
            stem = inside.stem if inside.suffix.lower() in IMAGE_SUFFIXES else inside.name
            path = self.folder / inside.with_name(f"{stem}{suffix}")
            if path.resolve() in sources:
                raise InputError(f"{path} is an image to predict and would be overwritten: choose another output")
            other = taken.setdefault(path, image)
            if other != image:
                raise InputError(f"'{other.name}' and '{image.name}' would both be written to {path}: rename one")
        return {image: path for path, image in taken.items()}

    def write(self, image: InputImage, result: Any) -> None:
        """Keeps one result of `payload.predict_as`.

        Uncertainty `(3, H, W)` goes to a `.npy` file, its entropy to a heat map beside it, its means to a table.
        """
        if self._kind == "rle":
            self._rows.append((image.name, result))
            return
        path = self._targets[image]
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._kind == "probabilities":
            np.save(path, result, allow_pickle=False)
        elif self._kind == UNCERTAINTY:
            np.save(path.with_suffix(".npy"), result, allow_pickle=False)
            _save_png(draw_heatmap(result[0], self._max_entropy), path)
            self._rows.append((image.name, *map(repr, image_means(result))))
        elif result.ndim == 3 and self._kind == "mask":
            for index, plane in enumerate(result):
                _save_png(plane, path.with_name(f"{path.stem}_{index}.png"))
        else:
            _save_png(result, path)

    def close(self) -> Path:
        """Writes the table, whole or not at all, where there is one; returns where the results are."""
        if self._kind == "rle":
            return write_csv(self._table, ("name", "mask"), self._rows)
        if self._kind == UNCERTAINTY:
            write_csv(self._table, ("name", *COLUMNS), self._rows)
        return self.folder


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Path:
    """Writes a CSV whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    partial.replace(path)
    return path


def _save_png(picture: npt.NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(picture).save(path, format="PNG")
