"""Batches: what the worker processes do, the same whatever their number and after a resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from smp_ensemble.data.soft_targets import TaughtSamples, collate_taught
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.soft_targets import SoftTargets

Batch = dict[str, Tensor]
"""`image` `(N, C, H, W)` raw values, `mask` int64 `(N, H, W)` (multilabel `(N, K, H, W)`), `index` int64 `(N,)`;
`soft` where there are soft targets, float32 `(N, K, H, W)`, NaN where they say nothing."""

Transform = Callable[[npt.NDArray[Any], npt.NDArray[Any], int], tuple[npt.NDArray[Any], npt.NDArray[Any]]]
Sample = tuple[npt.NDArray[Any], npt.NDArray[Any], int]
Key = tuple[int, int]
NOTHING = -1
"""The index of an image that counts nothing."""
Weights = npt.NDArray[np.float64]


def training_loader(
    dataset: SegmentationDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    epoch_of: Callable[[], int],
    shard: tuple[int, int] = (0, 1),
    weights_of: Callable[[], Weights | None] = lambda: None,
    teaching: SoftTargets | None = None,
) -> DataLoader[Batch]:
    """Shuffled, transformed batches; which ones depends on `seed`, the epoch and the images' weights alone.

    An incomplete last batch is dropped (batch norm fails on a single image), unless it is the only one.
    `len(loader)` is the number of steps of an epoch.

    Args:
        dataset: What to train on.
        transform: Takes image, mask and seed; must give equal sizes, such as `TrainTransform`.
        batch_size: Images in a batch.
        seed: Of order and augmentation.
        workers: Processes that prepare batches, at most one for each processor; 0 prepares in this one.
        epoch_of: Gives the epoch that starts now; asked at each `iter()`.
        shard: This process's rank and the number of processes that train together; each takes its own batches.
        weights_of: Gives each image's weight, shape `(n,)`, for the epoch that starts now: images are then drawn with
            replacement, in proportion. None: each image once.
        teaching: Batches hold these soft targets too; the rest of them stays as it is.

    Raises:
        ConfigError: The data set is empty for this shard, or a number is out of range.
    """
    _check(batch_size, workers)
    batches = SeededBatches(len(dataset), batch_size, seed, epoch_of, shard, weights_of)
    if teaching is not None:
        taught = TaughtSamples(dataset, transform, teaching)
        return _loader(taught, workers, batch_sampler=batches, collate_fn=partial(collate_taught, collate=_collate))
    samples = _TransformedSamples(dataset, transform)
    return _loader(samples, workers, batch_sampler=batches, collate_fn=_collate)


def epochs_loader(
    dataset: SegmentationDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    shard: tuple[int, int] = (0, 1),
) -> DataLoader[Batch]:
    """The batches of the first few epochs of `training_loader`, one after the other, whole ones, read in this process.

    Args:
        dataset: What to read.
        transform: Takes image, mask and seed; must give equal sizes, such as `TrainTransform`.
        batch_size: Images in a batch.
        seed: Of order and augmentation.
        epochs: So many.
        shard: This process's rank and the number of processes; each takes whole batches, and no batch comes twice.

    Raises:
        ConfigError: The data set is empty, or a number is out of range.
    """
    _check(batch_size, 0)
    rank, world = shard
    batches = [
        batch
        for epoch in range(epochs)
        for batch in SeededBatches(len(dataset), batch_size, seed, lambda epoch=epoch: epoch)  # type: ignore[misc]
    ]
    samples = _TransformedSamples(dataset, transform)
    return _loader(samples, 0, batch_sampler=batches[rank::world], collate_fn=_collate)


def ordered_loader(
    dataset: SegmentationDataset, transform: Transform, *, batch_size: int, seed: int, workers: int = 0
) -> DataLoader[Batch]:
    """Each image once, transformed, in the order of the data set; the last batch may hold fewer.

    Args:
        dataset: What to read.
        transform: Takes image, mask and seed; must give equal sizes, such as `TrainTransform`.
        batch_size: Images in a batch.
        seed: Of the transforms.
        workers: Processes that prepare batches; 0 prepares in this one.

    Raises:
        ConfigError: A number is out of range.
    """
    _check(batch_size, workers)
    keys = list(enumerate(np.random.default_rng(seed).integers(2**32, size=len(dataset)).tolist()))
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _loader(_TransformedSamples(dataset, transform), workers, batch_sampler=batches, collate_fn=_collate)


def evaluation_loader(
    dataset: SegmentationDataset,
    *,
    batch_size: int,
    workers: int,
    divisor: int = 32,
    shard: tuple[int, int] = (0, 1),
    never_empty: bool = False,
) -> DataLoader[Batch]:
    """Whole images in the order of the data set, padded so that those of one batch have one size.

    Padding repeats an image's edge; its mask is 255 there, so that padded pixels never count.

    Args:
        dataset: What to evaluate on.
        batch_size: Images in a batch; the last one may hold fewer.
        workers: Processes that prepare batches, at most one for each processor; 0 prepares in this one.
        divisor: Heights and widths are rounded up to its multiples, in pixels.
        shard: This process's rank and the number of processes; each takes whole batches, and no image comes twice.
        never_empty: Whether a process without a batch of its own gets one that counts nothing: one image with its whole
            mask ignored and -1 as its index.

    Raises:
        ConfigError: A number is out of range.
    """
    _check(batch_size, workers)
    if divisor < 1:
        raise ConfigError(f"divisor: expected at least 1 pixel, found {divisor}")
    rank, world = shard
    order = range(len(dataset))
    batches = [list(order[start : start + batch_size]) for start in order[::batch_size]][rank::world]
    if not batches and never_empty:
        batches = [[NOTHING]]
    return _loader(_Samples(dataset), workers, batch_sampler=batches, collate_fn=_PaddedCollate(divisor))


class SeededBatches(Sampler[list[Key]]):
    """Batches of keys (index, seed of the sample): a pure function of seed, epoch, weights and place in the epoch."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        epoch_of: Callable[[], int],
        shard: tuple[int, int] = (0, 1),
        weights_of: Callable[[], Weights | None] = lambda: None,
    ) -> None:
        rank, world = shard
        if not 0 <= rank < world:
            raise ConfigError(
                f"shard: expected a rank from 0 to below the number of processes, found {rank} of {world}"
            )
        if length < world:
            raise ConfigError(f"expected at least one training image for each of {world} processes, found {length}")
        if seed < 0:
            raise ConfigError(f"seed: expected 0 or more, found {seed}")
        self._length = length
        self._batch_size = min(batch_size, length // world)
        self._seed = seed
        self._epoch_of = epoch_of
        self._weights_of = weights_of
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return self._length // (self._batch_size * self._world)

    def __iter__(self) -> Iterator[list[Key]]:
        generator = np.random.default_rng(np.random.SeedSequence([self._seed, self._epoch_of()]))
        weights = self._weights_of()
        if weights is None:
            order = generator.permutation(self._length).tolist()
        else:
            order = generator.choice(self._length, self._length, p=weights / weights.sum()).tolist()
        seeds = generator.integers(2**32, size=self._length).tolist()
        keys = list(zip(order, seeds, strict=True))
        for step in range(len(self)):
            start = (step * self._world + self._rank) * self._batch_size
            yield keys[start : start + self._batch_size]


class _Samples(Dataset[Sample]):
    """A data set as (image, mask, index)."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self._dataset.read(max(index, 0))
        return image, np.full_like(mask, IGNORE_INDEX) if index == NOTHING else mask, index


class _TransformedSamples(Dataset[Sample]):
    """A data set as transformed (image, mask, index), by keys of `SeededBatches`."""

    def __init__(self, dataset: SegmentationDataset, transform: Transform) -> None:
        self._dataset = dataset
        self._transform = transform

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Key) -> Sample:
        index, seed = key
        image, mask = self._transform(*self._dataset.read(index), seed)
        return image, mask, index


class _PaddedCollate:
    """Pads to the largest height and width of the batch, rounded up, then collates."""

    def __init__(self, divisor: int) -> None:
        self._divisor = divisor

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        height, width = (
            -(-max(mask.shape[axis] for _, mask, _ in samples) // self._divisor) * self._divisor for axis in (0, 1)
        )
        return _collate([(*_pad(image, mask, height, width), index) for image, mask, index in samples])


def _pad(
    image: npt.NDArray[Any], mask: npt.NDArray[Any], height: int, width: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    edges = (0, height - mask.shape[0]), (0, width - mask.shape[1])
    padded = np.pad(image, (*edges, (0, 0)), mode="edge")
    return padded, np.pad(mask, (*edges, (0, 0))[: mask.ndim], constant_values=IGNORE_INDEX)


def _collate(samples: Sequence[Sample]) -> Batch:
    images = np.stack([image.transpose(2, 0, 1) for image, _, _ in samples])
    masks = np.stack([mask if mask.ndim == 2 else mask.transpose(2, 0, 1) for _, mask, _ in samples])
    return {
        "image": torch.from_numpy(images.astype(np.int32) if images.dtype == np.uint16 else images),
        "mask": torch.from_numpy(masks.astype(np.int64)),
        "index": torch.tensor([index for _, _, index in samples]),
    }


def _loader(samples: Dataset[Any], workers: int, **options: Any) -> DataLoader[Batch]:
    workers = min(workers, _processors())  # torch warns of more; results do not depend on the number
    return DataLoader(
        samples,  # the collate function makes batches of them
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # iter() draws a number: not from the generator of the training
        **options,
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(_: int) -> None:
    """Workers are the parallelism: OpenCV's own threads would only fight over the processors."""
    import cv2

    cv2.setNumThreads(0)


def _check(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch size: expected at least 1, found {batch_size}")
    if workers < 0:
        raise ConfigError(f"workers: expected 0 or more, found {workers}")
