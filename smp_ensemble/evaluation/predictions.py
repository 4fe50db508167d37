"""Members' probabilities on a data set, as often as they are asked for: computed once, then read from disk."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.inference import engine as engines
from smp_ensemble.inference.engine import Engine, to_tensor
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset

FREE_SHARE = 0.5
"""Predictions are kept on disk while they need no more than this share of what is free there."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Images of one size, as they are: nothing is padded.

    Attributes:
        number: Counts the batches of a data set.
        indices: Which images of the data set.
        images: Raw, each `(H, W, C)`.
        truth: int64 `(N, H, W)`, in multilabel mode `(N, K, H, W)`; 255 where ignored.
    """

    number: int
    indices: Sequence[int]
    images: Sequence[npt.NDArray[Any]]
    truth: Tensor

    def known_pixels(self) -> Tensor:
        """Where the truth says anything, bool `(N, H, W)`; in multilabel mode of at least one class."""
        known = self.truth != IGNORE_INDEX
        return known.any(dim=1) if known.ndim == 4 else known


class Predictions:
    """Batches of a data set, and what each member of an ensemble predicts for them.

    Fitting weights, a temperature, a threshold and post-processing asks for the same predictions again and again. With
    a folder they are computed in the first pass and read in all others.

    Args:
        engine: Runs the members; its views and passes are in what they predict.
        data: Images and masks.
        batch_size: Images at once.
        folder: For predictions; None, or too little room there: they are computed anew in each pass.
        label: Of the progress bars.
        files: Numbers of the members in the names of files; empty: counted from 0.
    """

    def __init__(
        self,
        engine: Engine,
        data: SegmentationDataset,
        *,
        batch_size: int = 8,
        folder: Path | None = None,
        label: str = "",
        files: Sequence[int] = (),
    ) -> None:
        self.engine = engine
        self.ensemble = engine.ensemble
        self.data = data
        self.label = label
        self._batch_size = batch_size
        self._files = list(files or range(len(self.ensemble.members)))
        self._folder = folder if folder is None or self._fits(folder) else None

    def of_some(self, members: Sequence[int]) -> Predictions:
        """The same with some of the members only, in the order of their indices, combined by their plain mean."""
        ensemble = self.ensemble
        chosen = Ensemble(
            [ensemble.members[index] for index in members],
            mode=ensemble.mode,
            views=ensemble.views,
            class_names=ensemble.class_names,
        )
        return self._of(chosen, [self._files[index] for index in members])

    def combined_by(self, ensemble: Ensemble) -> Predictions:
        """The same for another ensemble of the same members, in the same views."""
        return self._of(ensemble, self._files)

    def _of(self, ensemble: Ensemble, files: Sequence[int]) -> Predictions:
        return Predictions(
            self.engine.with_ensemble(ensemble),
            self.data,
            batch_size=self._batch_size,
            folder=self._folder,
            label=self.label,
            files=files,
        )

    def _fits(self, folder: Path) -> bool:
        if next(folder.iterdir(), None) is not None:
            return True  # they are there already
        pixels = sum(scan.pixels for scan in self.data.scans)
        needed = pixels * self.data.task.num_outputs * len(self._files) * 4
        free = shutil.disk_usage(folder).free
        if needed > FREE_SHARE * free:
            logger.info(
                "%s predictions take %.1f GB and %.1f GB are free: they are computed anew in each pass",
                self.label, needed / 1e9, free / 1e9,
            )  # fmt: skip
        return needed <= FREE_SHARE * free

    def __iter__(self) -> Iterator[Batch]:
        """All images once, those of one size together, in an order that is always the same."""
        number = 0
        starts = range(0, len(self.data), self._batch_size)
        for start in tqdm(starts, desc=self.label, unit="batch", leave=False, disable=None):
            window = range(start, min(start + self._batch_size, len(self.data)))
            pairs = {index: self.data.read(index) for index in window}
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for index, (image, _) in pairs.items():
                by_shape.setdefault(image.shape, []).append(index)
            for shape, indices in by_shape.items():
                size = max(1, engines.MAX_BATCH_PIXELS // (shape[0] * shape[1]))
                for at in range(0, len(indices), size):
                    chosen = indices[at : at + size]
                    truth = np.stack([_planes_first(pairs[index][1]) for index in chosen])
                    images = [pairs[index][0] for index in chosen]
                    yield Batch(number, chosen, images, torch.from_numpy(truth.astype(np.int64)))
                    number += 1

    def of_members(self, batch: Batch) -> Iterator[Tensor]:
        """Each member's probabilities `(N, K, H, W)` for a batch, float32 on the CPU, one after the other."""
        kept = [self._path(batch, file) for file in self._files]
        if kept and all(path is not None and path.is_file() for path in kept):
            for path in kept:
                assert path is not None
                yield torch.from_numpy(np.load(path))
            return
        images = torch.stack([to_tensor(image) for image in batch.images])
        stream = self.engine.member_probabilities(images)
        for path in kept:
            one = next(stream).cpu()
            if path is not None:
                np.save(path, one.numpy())
            yield one
            del one  # before the next member runs
        stream.close()  # type: ignore[attr-defined]

    def _path(self, batch: Batch, file: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{batch.number:06d}-{file:03d}.npy"


def _planes_first(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return mask if mask.ndim == 2 else mask.transpose(2, 0, 1)
