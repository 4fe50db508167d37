"""Soft targets: a teacher's probabilities beside image and mask, through the same augmentation, into batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from smp_ensemble.data.unlabelled import is_labelled
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset

TaughtSample = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32], int]


class SoftTargets(Protocol):
    """What a teacher says about each image of a data set; read in any process that loads data."""

    def __call__(self, index: int) -> npt.NDArray[np.float32]:
        """Probabilities of the image at `index`, shape `(H, W, K)`."""
        ...


@runtime_checkable
class PlanesTransform(Protocol):
    """A training transform that moves soft targets along with the image, such as `TrainTransform`."""

    def with_planes(
        self, image: npt.NDArray[Any], mask: npt.NDArray[Any], planes: npt.NDArray[Any], seed: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """Image, mask and planes; image and mask are those of the transform without planes."""
        ...


class TaughtSamples(Dataset[TaughtSample]):
    """A data set as transformed (image, mask, soft targets, index), by keys of `SeededBatches`.

    Soft targets are NaN where they say nothing: beside the image, and where a mask that somebody drew is 255, so that
    ignored pixels are ignored altogether. An image without a mask has its soft targets everywhere.

    Args:
        dataset: Images and masks.
        transform: A `PlanesTransform`.
        soft_targets: Of each image.

    Raises:
        ConfigError: The transform does not move planes.
    """

    def __init__(self, dataset: SegmentationDataset, transform: object, soft_targets: SoftTargets) -> None:
        if not isinstance(transform, PlanesTransform):
            raise ConfigError(f"soft targets need a transform with `with_planes`, got {type(transform).__name__}")
        self._dataset = dataset
        self._transform = transform
        self._soft_targets = soft_targets

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> TaughtSample:
        index, seed = key
        image, mask = self._dataset.read(index)
        image, mask, soft = self._transform.with_planes(image, mask, self._soft_targets(index), seed)
        if is_labelled(self._dataset.records[index]):
            ignored = mask == IGNORE_INDEX
            soft = np.where(ignored if ignored.ndim == 3 else ignored[..., None], np.float32(np.nan), soft)
        return image, mask, soft, index


def collate_taught(
    samples: Sequence[TaughtSample],
    collate: Callable[[Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any], int]]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """A batch as without soft targets, and these as `soft`, float32 `(N, K, H, W)`."""
    batch = collate([(image, mask, index) for image, mask, _, index in samples])
    soft = np.stack([planes.transpose(2, 0, 1) for _, _, planes, _ in samples])
    return {**batch, "soft": torch.from_numpy(soft)}
