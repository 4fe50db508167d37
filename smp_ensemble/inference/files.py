"""Images from a folder, a glob, a file or a CSV, and predictions to files."""

from __future__ import annotations

import csv
import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from smp_ensemble.exceptions import DataError, InputError

if TYPE_CHECKING:
    import numpy.typing as npt

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
CSV_COLUMNS = ("image", "name")


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

    A CSV needs a header with a column `image` or `name`; paths are relative to it, or to `images/` beside it.

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
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return sorted(images, key=lambda image: image.name)


def _from_csv(path: Path) -> list[InputImage]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        column = next((known for known in CSV_COLUMNS if known in (rows.fieldnames or ())), None)
        if column is None:
            raise DataError(f"expected a column {' or '.join(CSV_COLUMNS)} in {path}, got {rows.fieldnames}")
        names = [str(row[column]) for row in rows]
    if not names:
        raise DataError(f"{path} names no images")
    beside = path.parent / "images"
    return [
        InputImage(name, path.parent / name if (path.parent / name).is_file() else beside / name) for name in names
    ]


class FileWriter:
    """Writes predictions as they come: one file for each image, or one CSV for run lengths.

    Args:
        output: The folder; for `rle` also a `.csv` file. Created.
        kind: `mask`, `probabilities`, `overlay` or `rle`.
    """

    def __init__(self, output: Path, kind: str) -> None:
        if output.suffix.lower() == ".csv" and kind != "rle":
            raise InputError(f"output '{output}' is a CSV, which only kind=rle writes: name a folder")
        self._kind = kind
        self._rows: list[tuple[str, str]] = []
        self._table = output if output.suffix.lower() == ".csv" else output / "predictions.csv"
        self.folder = output.parent if output.suffix.lower() == ".csv" else output
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output '{output}' is a file: name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, image: InputImage, result: Any) -> None:
        """Keeps one result of `payload.render`."""
        if self._kind == "rle":
            self._rows.append((image.name, result))
            return
        path = self.folder / Path(image.name).with_suffix(".npy" if self._kind == "probabilities" else ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._kind == "probabilities":
            np.save(path, result, allow_pickle=False)
        elif result.ndim == 3 and self._kind == "mask":
            for index, plane in enumerate(result):
                _save_png(plane, path.with_name(f"{path.stem}_{index}.png"))
        else:
            _save_png(result, path)

    def close(self) -> Path:
        """Writes the CSV, whole or not at all, where there is one; returns where the results are."""
        if self._kind != "rle":
            return self.folder
        return write_csv(self._table, ("name", "mask"), self._rows)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, str]]) -> Path:
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
