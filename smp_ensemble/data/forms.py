"""Data as users bring it, read by one function: a folder, a contest's list, or synthetic scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.data import splits
from smp_ensemble.data.contests import SUFFIXES, describe_contest
from smp_ensemble.data.datasets import Record, SegmentationDataset
from smp_ensemble.data.folders import Description, describe_folder
from smp_ensemble.data.scanning import Scan, check_ids, scan
from smp_ensemble.data.sidecars import SPLITS
from smp_ensemble.data.sources import ClassMaskFiles, MaskFile
from smp_ensemble.data.synthetic import describe_synthetic
from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.typing import IGNORE_INDEX, Mode, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_UNNAMED_CLASSES = 64


@dataclass(frozen=True)
class DataSplits:
    """What trains, what is scored while training, and what is kept for the end.

    Attributes:
        train: What trains.
        val: What is scored while training, and what selection goes by; no fold and no bootstrap sample trains on it.
        test: What is kept for the end, or None.
        left_out: Images that would train, but for this fold or bootstrap sample; None without one.
    """

    train: SegmentationDataset
    val: SegmentationDataset
    test: SegmentationDataset | None = None
    left_out: SegmentationDataset | None = None

    @property
    def task(self) -> Task:
        """Mode, class names, bands: the same in all splits."""
        return self.train.task

    def split(self, name: str) -> SegmentationDataset:
        """The split of that name.

        Raises:
            ConfigError: There is no such split.
        """
        found = {"train": self.train, "val": self.val, "test": self.test, "left-out": self.left_out}
        dataset = found.get(name)
        if dataset is None:
            there = ", ".join(split for split, data in found.items() if data is not None)
            how = "; folds=N with fold=K leaves a fold out" if name == "left-out" else ""
            raise ConfigError(f"{self.train.source} has no split '{name}': expected one of {there}{how}")
        return dataset

    def part(
        self, fold: int | None, *, folds: int | None = None, bootstrap: int | None = None, split_seed: int = 0
    ) -> DataSplits:
        """The same `val` and `test`, with a part of `train`: what one fold leaves, or one bootstrap sample.

        Args:
            fold: Which fold is left out, or which sample is drawn, from 0; None: all of `train`.
            folds: Number of folds: stratified, and groups stay together.
            bootstrap: Number of bootstrap samples, drawn with replacement, by group where there are groups.
            split_seed: Of folds and samples.

        Raises:
            ConfigError: `fold` is not one of them, there are both or neither, or too few images.
        """
        splits.check_part(folds, bootstrap, fold)
        if fold is None:
            return self
        name, groups = self.train.name.removesuffix("-train"), self.train.groups
        if folds is not None:
            train, rest = splits.fold_split(self.train.class_presence, groups, folds, split_seed)[fold]
            what = "fold"
        else:
            train, rest = splits.bootstrap_split(len(self.train), groups, fold, split_seed)
            what = "out-of-bag"
        left_out = self.train.subset(rest, f"{name}-{what}{fold}")
        return replace(self, train=self.train.subset(train), left_out=left_out)


def load_data(
    spec: str,
    *,
    mask_column: str = "mask",
    mode: Mode | None = None,
    holdout: str = "0.15,0.15",
    folds: int | None = None,
    bootstrap: int | None = None,
    fold: int | None = None,
    split_seed: int = 0,
) -> DataSplits:
    """Reads a data set, checks all of it, and splits it.

    Splits that the data names are kept. A missing `val` is set apart from `train`; `val` and `test` are both set apart
    where the data names nothing but `train`, or nothing at all. Images of one group stay together.

    With `fold`, the images of `train` are divided further: fold number `fold` of `folds` is `left_out` and the other
    folds train, or bootstrap sample number `fold` trains and the images that were not drawn are `left_out`. `val` and
    `test` are the same for all of them, so their snapshots compare, and selection goes by images that none trained on.

    Class names and mode come from `classes.json`, else from the masks: ids 0 and 1 are binary. Without `classes.json`,
    masks that hold nothing but 0 and 255 are taken as the field's usual black and white: there 255 is the foreground,
    not an ignored pixel.

    Args:
        spec: A folder, a contest's `.csv` or `.tsv`, or `synthetic[:count=120,size=128,seed=0,mode=binary]`.
        mask_column: Column of `splits.csv` with the masks to learn.
        mode: Overrides the data's own: two classes may run as `binary` or as `multiclass`.
        holdout: Fractions of all images for `val` and `test`.
        folds: Number of cross-validation folds of the training images, or None.
        bootstrap: Number of bootstrap samples of the training images, or None.
        fold: Which fold is left out, or which bootstrap sample trains, from 0; None: `train` is not divided.
        split_seed: Of the shuffle, independent of the training seed.

    Raises:
        DataError: The data is missing, broken, or not as described.
        ConfigError: An option does not fit the data, or another option.
    """
    fractions = _fractions(holdout)
    splits.check_part(folds, bootstrap, fold)
    name, source, description = _describe(spec, mask_column, mode)
    scans = scan(description.records)
    if _black_and_white(description, scans):
        description = replace(description, records=tuple(_with_white_as_one(r) for r in description.records))
        scans = scan(description.records)
    task = _task(description, scans, mode, source)
    check_ids(description.records, scans, task)
    whole = SegmentationDataset(name, source, task, description.records, scans)
    indices = _arrange(whole, fractions, split_seed)
    parts = {split: whole.subset(indices[split], f"{name}-{split}") for split in SPLITS if len(indices[split])}
    found = DataSplits(parts["train"], parts["val"], parts.get("test"))
    return found.part(fold, folds=folds, bootstrap=bootstrap, split_seed=split_seed)


def _describe(spec: str, mask_column: str, mode: Mode | None) -> tuple[str, str, Description]:
    """Name, source and description of what `spec` stands for."""
    word, _, options = spec.partition(":")
    path = Path(spec)
    if word != "synthetic" and path.is_dir():
        return path.resolve().name, str(path.resolve()), describe_folder(path, mask_column)
    if word != "synthetic" and not (path.is_file() and path.suffix.lower() in SUFFIXES):
        raise DataError(
            f"data '{spec}' not found: expected a folder with images/ and masks/, a contest's .csv or .tsv, "
            "or 'synthetic'"
        )
    if mask_column != "mask":
        raise ConfigError(f"mask column '{mask_column}': only a folder has a choice of masks, found data '{spec}'")
    if word == "synthetic":
        return word, *describe_synthetic(options, mode)
    return path.resolve().parent.name, str(path.resolve()), describe_contest(path)


def _task(description: Description, scans: Sequence[Scan], mode: Mode | None, source: str) -> Task:
    """What is to be learned: from `classes.json` where there is one, else from the masks."""
    classes, bands = description.classes, scans[0].bands
    found: Mode
    if classes is not None or description.layers:
        names = classes.names if classes is not None else description.layers
        fallback: Mode = "binary" if len(names) == 2 else "multiclass"
        found = description.mode or (classes.mode if classes is not None else None) or fallback
    else:
        largest = max((index for found in scans for index in found.ids if index != IGNORE_INDEX), default=0)
        if largest >= _MOST_UNNAMED_CLASSES:
            raise DataError(
                f"masks of {source} hold ids up to {largest}: expected class ids below {_MOST_UNNAMED_CLASSES}; "
                "if these are no pictures, name the classes in classes.json"
            )
        found = "binary" if largest <= 1 else "multiclass"
        names = ("background", "foreground") if largest <= 1 else tuple(f"class_{i}" for i in range(largest + 1))
    if found == "binary" and len(names) == 1:
        names = ("background", *names)
    if found == "binary" and len(names) != 2:
        raise DataError(f"{source}: expected two class names for binary masks, found {', '.join(names)}")
    if mode not in (None, found) and (len(names) != 2 or "multilabel" in (mode, found)):
        raise ConfigError(f"mode '{mode}' does not fit {source}: expected {found} for {', '.join(names)}")
    return Task(mode or found, names, bands)


def _black_and_white(description: Description, scans: Sequence[Scan]) -> bool:
    """Whether all masks hold nothing but 0 and 255, and nobody said that 255 is ignored.

    Raises:
        DataError: `classes.json` says it: then there is nothing to learn.
    """
    ids = frozenset[int]().union(*(found.ids for found in scans))
    if IGNORE_INDEX not in ids or not ids <= {0, IGNORE_INDEX}:
        return False
    if description.classes is not None:
        raise DataError(
            f"mask {description.records[0].mask} and all others hold nothing but 0 and {IGNORE_INDEX} (ignored): "
            "write class ids, or remove classes.json, and 255 is the foreground"
        )
    return True


def _with_white_as_one(record: Record) -> Record:
    white: tuple[tuple[int, int], ...] = ((IGNORE_INDEX, 1),)
    mask = record.mask
    if isinstance(mask, MaskFile):
        return replace(record, mask=replace(mask, replaced=white))
    assert isinstance(mask, ClassMaskFiles)
    return replace(record, mask=ClassMaskFiles(tuple(replace(file, replaced=white) for file in mask.files)))


def _arrange(whole: SegmentationDataset, fractions: tuple[float, float], seed: int) -> dict[str, splits.Indices]:
    """Indices of each split."""
    named = np.array([record.split or "train" for record in whole.records])
    indices = {split: np.flatnonzero(named == split) for split in SPLITS}
    pool = indices["train"]
    if not len(pool):
        raise DataError(f"{whole.source}: expected images of split 'train', found none")
    if len(indices["val"]):
        return indices
    wanted = fractions if len(pool) == len(whole) else fractions[:1]
    groups = None if whole.groups is None else [whole.groups[index] for index in pool]
    train, *others = splits.holdout_split(whole.class_presence[pool], groups, wanted, seed)
    return indices | {"train": pool[train]} | {name: pool[part] for name, part in zip(SPLITS[1:], others, strict=False)}


def _fractions(holdout: str) -> tuple[float, float]:
    """Fractions for val and test."""
    try:
        val, test = [float(part) for part in f"{holdout},0".split(",")[: max(2, holdout.count(",") + 1)]]
    except ValueError:
        raise ConfigError(
            f"holdout: expected fractions for val and test such as '0.15,0.15', found '{holdout}'"
        ) from None
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise ConfigError(f"holdout: expected a val fraction above 0 and a sum below 1, found '{holdout}'")
    return val, test
