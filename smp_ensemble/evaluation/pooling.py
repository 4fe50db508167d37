"""From predictions on disk to a pool that selectors ask: one byte a probability, sorted by truth, block by block."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.data.splits import fold_split
from smp_ensemble.ensembling.pool import CandidatePool, Chained
from smp_ensemble.ensembling.tally import Block, quantise
from smp_ensemble.evaluation.codes import decode
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.evaluation.cache import CachedPredictions
    from smp_ensemble.typing import Snapshot

BLOCK_PIXELS = 2**19
"""Pixels that are in memory at once, of one candidate; a block's bytes of all candidates are mapped, not held."""


class StoredBlocks:
    """Blocks of pixels in one file, which others may share; each is mapped when its turn comes."""

    def __init__(self, path: Path) -> None:
        """Blocks come after what is in the file."""
        self._path = path
        self._places: list[tuple[int, tuple[int, ...], list[int], int]] = []
        self._end = path.stat().st_size if path.exists() else 0

    def append(self, codes: Iterator[npt.NDArray[np.uint8]], candidates: int, counts: list[int], output: int) -> None:
        """Adds a block from each candidate's codes `(K, V)`."""
        outputs = 0
        with self._path.open("ab") as file:
            for one in codes:
                outputs = len(one)
                file.write(np.ascontiguousarray(one).tobytes())
        shape = (candidates, outputs, sum(counts))
        self._places.append((self._end, shape, counts, output))
        self._end += candidates * outputs * sum(counts)

    def __iter__(self) -> Iterator[Block]:
        for offset, shape, counts, output in self._places:
            yield Block(np.memmap(self._path, np.uint8, "r", offset, shape), counts, output)


def make_pool(
    predictions: Sequence[CachedPredictions],
    candidates: Sequence[Snapshot],
    data: SegmentationDataset,
    metric: str,
    folder: Path,
    parts: int = 0,
) -> CandidatePool:
    """Puts all candidates' predictions side by side.

    Memory holds one block's pixels of one candidate; the file in `folder` has a byte for each candidate, output and
    valid pixel.

    Args:
        predictions: Of each candidate.
        candidates: Best first.
        data: What was predicted.
        metric: One of `ensembling.pool.METRICS`.
        folder: For the file; it must stay for as long as the pool.
        parts: Into how many the images are divided, as far as there are groups (images, where data name none); less
            than 2: they are not.

    Raises:
        ConfigError: There is too little room in `folder`, or another metric.
    """
    needed = len(predictions) * data.task.num_outputs * sum(scan.pixels for scan in data.scans)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"selecting among {len(predictions)} candidates takes {needed / 1e9:.1f} GB in {folder}, where "
            f"{free / 1e9:.1f} GB are free: lower max-candidates, or point TMPDIR elsewhere"
        )
    path = folder / "pool.bin"
    stored = [_store(StoredBlocks(path), predictions, data, images) for images in _divide(data, parts)]
    return CandidatePool(list(candidates), data.task, metric, Chained(stored), stored if len(stored) > 1 else ())


def _divide(data: SegmentationDataset, parts: int) -> list[list[int]]:
    """Images of each part: every group in one of them, and classes spread over all as far as that goes."""
    if parts > 1:
        parts = min(parts, len(set(data.groups)) if data.groups else len(data))
    if parts < 2:
        return [list(range(len(data)))]
    return [held.tolist() for _, held in fold_split(data.class_presence, data.groups, parts, seed=0)]


def _store(
    stored: StoredBlocks,
    predictions: Sequence[CachedPredictions],
    data: SegmentationDataset,
    images: Sequence[int],
) -> StoredBlocks:
    """Appends the blocks of some images."""
    outputs, mode = data.task.num_outputs, data.task.mode
    for pieces in _pieces(data, images):
        truth = _truth(data, pieces)
        for output, plane in enumerate(truth if mode == "multilabel" else truth[None]):
            counts = np.bincount(plane, minlength=IGNORE_INDEX + 1)[: outputs if mode == "multiclass" else 2]
            order = np.argsort(plane, kind="stable")[: counts.sum()]  # ignored pixels come last
            if not len(order):
                continue
            chosen = slice(output, output + 1) if mode == "multilabel" else slice(None)
            rows = (quantise(decode(np.take(_codes(one, pieces, chosen), order, axis=1), mode)) for one in predictions)
            stored.append(rows, len(predictions), counts.tolist(), output)
    return stored


def _pieces(data: SegmentationDataset, images: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Stretches of images, as (image, first pixel, end), that make one block together."""
    pieces: list[tuple[int, int, int]] = []
    room = BLOCK_PIXELS
    for index in images:
        start, pixels = 0, data.scans[index].pixels
        while start < pixels:
            end = min(pixels, start + room)
            pieces.append((index, start, end))
            room -= end - start
            start = end
            if not room:
                yield pieces
                pieces, room = [], BLOCK_PIXELS
    if pieces:
        yield pieces


def _truth(data: SegmentationDataset, pieces: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.uint8]:
    """Class ids `(V,)`, in multilabel mode `(K, V)`."""
    found = []
    for index, start, end in pieces:
        mask = data.records[index].mask.read()
        flat = mask.reshape(mask.shape[0] * mask.shape[1], -1).T
        found.append(flat[:, start:end] if data.task.mode == "multilabel" else flat[0, start:end])
    return np.concatenate(found, axis=-1)


def _codes(one: CachedPredictions, pieces: Sequence[tuple[int, int, int]], outputs: slice) -> npt.NDArray[np.uint16]:
    """Codes `(K, V)` of pieces of images."""
    parts = []
    for index, start, end in pieces:
        codes = one.codes(index)[outputs]
        parts.append(codes.reshape(len(codes), -1)[:, start:end])
    return np.concatenate(parts, axis=1)
