"""Form 1: a folder with `images/`, `masks/`, and optionally `classes.json` and `splits.csv`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from smp_ensemble.data.datasets import Record
from smp_ensemble.data.images import IMAGE_SUFFIXES
from smp_ensemble.data.sidecars import Classes, read_classes, read_splits
from smp_ensemble.data.sources import ClassMaskFiles, ImageFile, MaskFile, MaskSource
from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.registry import nearest
from smp_ensemble.typing import IGNORE_INDEX, Mode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NOT_MASKS = ("image", "split", "group")


@dataclass(frozen=True)
class Description:
    """A data set of which no image has been read yet.

    Attributes:
        records: In order.
        classes: What `classes.json` says, or None.
        mode: As far as the layout tells it.
        layers: Names of the multilabel masks' folders.
    """

    records: tuple[Record, ...]
    classes: Classes | None
    mode: Mode | None = None
    layers: tuple[str, ...] = ()


def describe_folder(folder: Path, mask_column: str = "mask") -> Description:
    """Finds the images and masks of a folder.

    With `splits.csv` (columns `image,mask[,split][,group]`, paths relative to the folder) its rows are the images.
    Without it, images and masks are paired by their names, in the order of these. Multilabel masks lie in
    `masks/<class>/`, a file of 0 and 1 for each image and class. `mask_column="mask_landcover"` reads that column
    (without `splits.csv`: the folder `masks_landcover/`), and `classes_landcover.json` rather than `classes.json`.

    Raises:
        DataError: A file or folder is missing or malformed.
        ConfigError: `splits.csv` has no such column.
    """
    suffix = mask_column.removeprefix("mask") if mask_column.startswith("mask") else f"_{mask_column}"
    classes = read_classes(folder / f"classes{suffix}.json") or read_classes(folder / "classes.json")
    masks = _Masks(folder / f"masks{suffix}", classes, nested=_has_folders(folder / "images"))
    rows = read_splits(folder)
    records = _paired(folder, masks) if rows is None else _listed(folder, masks, rows, mask_column)
    if not records:
        raise DataError(f"data '{folder}': expected images ({' '.join(IMAGE_SUFFIXES)}), found none in images/")
    check_unique(records, folder)
    if not masks.layers:
        return Description(tuple(records), classes)
    return Description(tuple(records), classes, "multilabel", tuple(masks.layers))


def name_of(image: str) -> str:
    """An image's name: its path below `images/`, without the ending.

    Example:
        >>> name_of("images/north/7.png")
        'north/7'
    """
    path = PurePosixPath(image.replace("\\", "/"))
    below = path.relative_to("images") if path.is_relative_to("images") else path
    return below.with_suffix("").as_posix()


def check_unique(records: Sequence[Record], where: Path) -> None:
    """Refuses two images of one name.

    Raises:
        DataError: Names both.
    """
    seen: dict[str, Record] = {}
    for record in records:
        if (twin := seen.setdefault(record.name, record)) is not record:
            raise DataError(
                f"data '{where}': expected one image named '{record.name}', found {twin.image} and {record.image}; "
                "remove or rename one of them"
            )


class _Masks:
    """The folder of masks: one file for each image, or in multilabel form one folder for each class.

    Attributes:
        layers: For each class, in their order, its files by name; empty: not multilabel.
    """

    def __init__(self, folder: Path, classes: Classes | None, *, nested: bool) -> None:
        self.folder = folder
        ignored = IGNORE_INDEX if classes is None else classes.ignore_index
        self._replaced = ((ignored, IGNORE_INDEX),) if 0 <= ignored < IGNORE_INDEX else ()
        self.layers = {path.name: _by_name(path) for path in self._class_folders(classes, nested)}
        self._files = {} if self.layers or not folder.is_dir() else _by_name(folder)

    def of_name(self, name: str, image: Path) -> MaskSource:
        """The mask of the image of that name."""
        if self.layers:
            files = [self._found(found, name, image, self.folder / label) for label, found in self.layers.items()]
            return ClassMaskFiles(tuple(files))
        return self._found(self._files, name, image, self.folder)

    def at(self, path: Path) -> MaskSource:
        """The mask in a given file."""
        return MaskFile(path, self._replaced)

    def _found(self, files: Mapping[str, Path], name: str, image: Path, folder: Path) -> MaskFile:
        if name not in files:
            raise DataError(f"image {image} has no mask: expected {folder / name}.png; add it, or remove the image")
        return MaskFile(files[name], self._replaced)

    def _class_folders(self, classes: Classes | None, nested: bool) -> list[Path]:
        if classes is not None and classes.mode not in (None, "multilabel"):
            return []
        found = {path.name: path for path in sorted(self.folder.glob("*")) if path.is_dir()}
        if classes is not None and classes.mode == "multilabel":
            if missing := [name for name in classes.names if name not in found]:
                raise DataError(
                    f"multilabel masks: expected a folder {self.folder / missing[0]} with a mask of 0 and 1 for each "
                    f"image, found {', '.join(found) or 'no folders'} in {self.folder}"
                )
            return [found[name] for name in classes.names]
        flat = any(path.suffix.lower() in IMAGE_SUFFIXES for path in self.folder.glob("*"))
        return [] if nested or flat else list(found.values())


def _paired(folder: Path, masks: _Masks) -> list[Record]:
    """Images and masks by their names."""
    for needed in (folder / "images", masks.folder):
        if not needed.is_dir():
            raise DataError(
                f"data '{folder}': expected folders images/ and {masks.folder.name}/, found no {needed.name}/"
            )
    images = _by_name(folder / "images")
    return [Record(name, ImageFile(path), masks.of_name(name, path)) for name, path in images.items()]


def _listed(folder: Path, masks: _Masks, rows: Sequence[Mapping[str, str]], mask_column: str) -> list[Record]:
    """The rows of `splits.csv`."""
    if not masks.layers and rows and mask_column not in rows[0]:
        columns = [column for column in rows[0] if column not in _NOT_MASKS]
        raise ConfigError(
            f"{folder / 'splits.csv'} has no mask column '{mask_column}': {nearest(mask_column, columns)}"
        )
    records = []
    for line, row in enumerate(rows, start=2):
        image, name = folder / row["image"], name_of(row["image"])
        where = f"{folder / 'splits.csv'} line {line}"
        if not image.is_file():
            raise DataError(f"{where}: image {image} does not exist; correct its path, or remove the line")
        if masks.layers:
            mask = masks.of_name(name, image)
        elif row[mask_column] and (folder / row[mask_column]).is_file():
            mask = masks.at(folder / row[mask_column])
        else:
            found = f"'{row[mask_column]}', which does not exist" if row[mask_column] else "nothing"
            raise DataError(
                f"{where}: image {image} has no mask: expected a file in column '{mask_column}', found {found}"
            )
        records.append(Record(name, ImageFile(image), mask, row["split"] or None, row.get("group") or None))
    return records


def _has_folders(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("*"))


def _by_name(folder: Path) -> dict[str, Path]:
    """The images below a folder by their path in it without the ending, sorted.

    Raises:
        DataError: Two files differ in their endings alone.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"expected one file named '{name}' in {folder}, found {found[name].name} and {path.name}")
        found[name] = path
    return found
