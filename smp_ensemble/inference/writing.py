"""Predictions as files: for each image its own, or one CSV for all; each whole or not at all."""

from __future__ import annotations

import errno
import io
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from smp_ensemble.data.images import IMAGE_SUFFIXES
from smp_ensemble.exceptions import DataError, InputError, StorageError
from smp_ensemble.inference.tables import Table
from smp_ensemble.inference.uncertainty import COLUMNS, draw_heatmap, image_means

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from smp_ensemble.inference.files import InputImage
    from smp_ensemble.inference.tables import Row

RLE, UNCERTAINTY = "rle", "uncertainty"
HEADERS = {RLE: ("name", "mask"), UNCERTAINTY: ("name", *COLUMNS)}
"""Columns of the table of each kind that has one."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What the system says where nothing more can be written."""


class FileWriter:
    """Writes predictions as they come: files for each image, or a row of one CSV, each whole or not at all.

    Args:
        output: The folder; for `rle` also a `.csv` file. Created.
        kind: `mask`, `probabilities`, `uncertainty`, `overlay` or `rle`.
        images: All that will be written.
        max_entropy: The brightest colour in heat maps of uncertainty, in nats.
        planes: Files of each mask, where it has one for each class (multilabel mode); 0: one in all.
        resume: Keep what an earlier attempt has written, as `todo` says.

    Raises:
        InputError: The output is in the way, or two images would be written to one file.
    """

    def __init__(
        self,
        output: Path,
        kind: str,
        images: Iterable[InputImage],
        max_entropy: float = math.log(2),
        planes: int = 0,
        *,
        resume: bool = False,
    ) -> None:
        if output.suffix.lower() == ".csv" and kind != RLE:
            raise InputError(f"output '{output}' is a CSV, which only kind=rle writes: name a folder")
        self._kind = kind
        self._max_entropy = max_entropy
        self._planes = planes if kind == "mask" else 0
        self._images = list(images)
        table = f"{UNCERTAINTY}.csv" if kind == UNCERTAINTY else "predictions.csv"
        path = output if output.suffix.lower() == ".csv" else output / table
        self.folder = output.parent if output.suffix.lower() == ".csv" else output
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output '{output}' is a file: name a folder")
        self._targets = self._plan() if kind != RLE else {}
        with _storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            header = HEADERS.get(kind)
            self._table = None if header is None else Table(path, header, resume=resume)

    def _plan(self) -> dict[InputImage, Path]:
        """The file of each image: always below the folder, its own, and never an image's."""
        suffix = ".npy" if self._kind == "probabilities" else ".png"
        sources = {image.path.resolve() for image in self._images}
        taken: dict[Path, InputImage] = {}
        for image in self._images:
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

    def _files(self, image: InputImage) -> list[Path]:
        """All files of an image, in the order in which they are written."""
        path = self._targets.get(image)
        if path is None:
            return []
        if self._planes:
            return [path.with_name(f"{path.stem}_{index}.png") for index in range(self._planes)]
        return [path.with_suffix(".npy"), path] if self._kind == UNCERTAINTY else [path]

    def target(self, image: InputImage) -> Path:
        """The file of an image that is written by others, in a folder that exists; not for `rle`."""
        path = self._targets[image]
        with _storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def todo(self) -> list[InputImage]:
        """The images that have no result yet, or one that is older than they are, which is forgotten."""
        images = [image for image in self._images if not self._is_done(image)]
        if self._table is not None:
            for image in images:
                self._table.drop(image.name)
        return images

    def _is_done(self, image: InputImage) -> bool:
        if self._table is not None and image.name not in self._table:
            return False
        times = [] if self._table is None else [self._table.time]
        try:
            times += [path.stat().st_mtime_ns for path in self._files(image)]
            return image.path.stat().st_mtime_ns <= min(times)
        except OSError:  # not there
            return False

    def save(self, image: InputImage, result: Any) -> Row | None:
        """Writes the files of one result of `payload.predict_as`, in any thread; gives its row of the table.

        Uncertainty `(3, H, W)` goes to a `.npy` file, its entropy to a heat map beside it, its means to the table.

        Raises:
            DataError: They cannot be written; another image's may well be.
            StorageError: No more can be.
        """
        if self._kind == RLE:
            return image.name, result
        files = self._files(image)
        with _storage(files[0]):
            files[0].parent.mkdir(parents=True, exist_ok=True)
            if self._kind == UNCERTAINTY:
                results = [result, draw_heatmap(result[0], self._max_entropy)]
            else:
                results = list(result) if self._planes else [result]
            for path, one in zip(files, results, strict=True):
                _write(path, one)
        return (image.name, *map(repr, image_means(result))) if self._kind == UNCERTAINTY else None

    def record(self, row: Row) -> None:
        """Appends a row to the table; in one thread.

        Raises:
            DataError, StorageError: As `save`.
        """
        if self._table is not None:
            with _storage(self.folder):
                self._table.add(row)

    def write(self, image: InputImage, result: Any) -> None:
        """Both, for one result."""
        row = self.save(image, result)
        if row is not None:
            self.record(row)

    def stop(self) -> None:
        """Leaves what is written for a later attempt."""
        if self._table is not None:
            with _storage(self.folder):
                self._table.stop()

    def close(self) -> Path:
        """Gives the table its name, where there is one, with rows in the order of the images; returns where all is."""
        if self._table is None:
            return self.folder
        with _storage(self.folder):
            path = self._table.close(image.name for image in self._images)
        return path if self._kind == RLE else self.folder


def _write(path: Path, result: npt.NDArray[Any]) -> None:
    """Writes a result under another name first, so that a file of its name is whole."""
    content = io.BytesIO()  # NumPy, writing to a file itself, does not say that the disk is full
    if path.suffix == ".npy":
        np.save(content, result, allow_pickle=False)
    else:
        Image.fromarray(result).save(content, format="PNG")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.getbuffer())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Tells a file that cannot be written from a disk that takes none."""
    try:
        yield
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror or error}"
        if error.errno in FULL:
            raise StorageError(f"{reason}; what is written so far stays: skip-existing goes on from there") from error
        raise DataError(reason) from error
