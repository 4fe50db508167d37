"""Scores of means of quantised probabilities, from counts: what selection by score spends its time on.

A probability is one byte, `floor(256 p)`. The mean of s candidates is kept as their sum, so that nothing is rounded: it
reaches the threshold `j / 256` where the sum reaches `s j`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from smp_ensemble.typing import Mode

LEVELS = 256
MOST_ADDITIONS = 65535 // 255
"""Sums are 16 bits."""

_LOSS = -np.log((np.arange(LEVELS) + 0.5) / LEVELS)
"""Of a pixel whose truth got `(q + 0.5) / 256`."""


@dataclass(frozen=True)
class Block:
    """Some valid pixels, those of one true class after those of the class before.

    Attributes:
        codes: uint8 `(N, K, V)`: of each candidate, output and pixel, `floor(256 p)`.
        counts: Pixels of each true class; background and foreground where K is 1.
        output: Which class K = 1 stands for, in multilabel mode.
    """

    codes: npt.NDArray[np.uint8]
    counts: Sequence[int]
    output: int = 0

    def base(self, counts: Sequence[int]) -> npt.NDArray[np.uint16]:
        """`sum counts_i codes_i`, `(K, V)`."""
        total = np.zeros(self.codes.shape[1:], np.uint16)
        for index, count in enumerate(counts):
            if count:
                total += self.codes[index] * np.uint16(count)
        return total


def quantise(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """`floor(256 p)`, and 255 for 1.

    Example:
        >>> quantise(np.array([0.0, 0.5, 0.996, 1.0])).tolist()
        [0, 128, 254, 255]
    """
    codes: npt.NDArray[np.uint8] = np.minimum(probabilities * LEVELS, LEVELS - 1).astype(np.uint8)
    return codes


def decide(codes: npt.NDArray[np.uint8], cuts: npt.NDArray[np.int64] | None) -> npt.NDArray[np.uint8]:
    """Decisions `(N, V)` of codes `(N, K, V)`: codes from `cuts` `(N,)` on, or the likeliest class where it is None."""
    if cuts is not None:
        return (codes[:, 0] >= cuts[:, None]).astype(np.uint8)
    return np.stack([_argmax(one.astype(np.uint16)) for one in codes])


def count_sums(
    blocks: Iterable[Block], counts: Sequence[int], add: Sequence[int], mode: Mode, outputs: int, metric: str
) -> npt.NDArray[np.int64]:
    """What `score_counts` needs of each mean of the candidates so far and one more; different blocks' may be added up.

    Args:
        blocks: Of the data, all or some.
        counts: How often each candidate is in the sum.
        add: Candidates to add, each for itself.
        mode: Says how pixels are decided.
        outputs: K.
        metric: `iou`, `dice` or `nll`.

    Returns:
        True positives, false positives and false negatives, `(len(add), 3, K)`, where the likeliest class decides; else
        histograms of probabilities, `(len(add), K, 2, 256)`.
    """
    size = sum(counts) + 1
    if mode == "multiclass" and metric != "nll":
        hits = np.zeros((len(add), 3, outputs), np.int64)
        for block, place, total in _sums(blocks, counts, add):
            hits[place] += _confusion(total, block.counts)
        return hits
    histograms = np.zeros((len(add), outputs, 2, LEVELS), np.int64)
    for block, place, total in _sums(blocks, counts, add):
        if mode == "multiclass":
            for index, segment in enumerate(_segments(block.counts)):
                histograms[place, 0, 1] += _histogram(total[index, segment], size)
        else:
            for truth, segment in enumerate(_segments(block.counts)):
                histograms[place, block.output, truth] += _histogram(total[0, segment], size)
    return histograms


def score_counts(found: npt.NDArray[np.int64], mode: Mode, metric: str) -> npt.NDArray[np.float64]:
    """The metric of what `count_sums` counted, `(n,)`."""
    if mode == "multiclass" and metric != "nll":
        return _mean_overlap(found[:, 0], found[:, 1], found[:, 2], metric)
    if metric == "nll":
        losses = found[:, :, 1] * _LOSS + found[:, :, 0] * _LOSS[::-1]  # no BLAS: equal rows, equal sums
        pixels = found.sum(axis=(1, 2, 3))
        return np.asarray(losses.sum(axis=(1, 2)) / np.maximum(pixels, 1), np.float64)
    # Pixels at or above each threshold, in the order (addition, output, truth, threshold).
    above = found[..., ::-1].cumsum(axis=-1)[..., ::-1]
    if mode == "binary":
        return overlap_curve(above)[:, 0, 1:].max(axis=-1) if metric == "iou" else _dice(overlap_curve(above)[:, 0, 1:])
    false, true = above[:, :, 0, LEVELS // 2], above[:, :, 1, LEVELS // 2]
    return _mean_overlap(true, false, above[:, :, 1, 0] - true, metric)


def best_cuts(blocks: Iterable[Block], candidates: int) -> npt.NDArray[np.int64]:
    """In binary mode: the code from which on each candidate alone has the best IoU, `(N,)`; the one nearest to 128."""
    histograms = np.zeros((candidates, 1, 2, LEVELS), np.int64)
    for block, place, total in _sums(blocks, [0] * candidates, range(candidates)):
        for truth, segment in enumerate(_segments(block.counts)):
            histograms[place, 0, truth] += _histogram(total[0, segment], 1)
    curves = overlap_curve(histograms[..., ::-1].cumsum(axis=-1)[..., ::-1])[:, 0]
    order = sorted(range(1, LEVELS), key=lambda code: (abs(code - LEVELS // 2), code))
    return np.asarray(np.array(order)[curves[:, order].argmax(axis=1)], np.int64)


def overlap_curve(above: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU `(..., 256)` at each threshold from pixels `(..., 2, 256)` at or above it; 0 where there is no foreground."""
    true, false, all_true = above[..., 1, :], above[..., 0, :], above[..., 1, :1]
    return np.asarray(true / np.maximum(all_true + false, 1), np.float64)


def _dice(overlap: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    best = overlap.max(axis=-1)
    return np.asarray(2 * best / (1 + best), np.float64)


def _sums(
    blocks: Iterable[Block], counts: Sequence[int], add: Sequence[int]
) -> Iterator[tuple[Block, int, npt.NDArray[np.uint16]]]:
    """For each block and each addition its place and the sums `(K, V)`, which the next one overwrites."""
    for block in blocks:
        base = block.base(counts)
        total = np.empty_like(base)
        for place, candidate in enumerate(add):
            np.add(base, block.codes[candidate], out=total)
            yield block, place, total


def _segments(counts: Sequence[int]) -> list[slice]:
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _histogram(sums: npt.NDArray[np.uint16], size: int) -> npt.NDArray[np.int64]:
    """Pixels by `floor(sum / size)`."""
    found = np.bincount(sums, minlength=size * LEVELS)
    return np.asarray(found.reshape(LEVELS, size).sum(axis=1), np.int64)


def _argmax(sums: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """The first of the largest in `(K, V)`: `argmax(axis=0)`, several times as fast."""
    best, found = sums[0].copy(), np.zeros(sums.shape[1], np.uint8)
    for index in range(1, len(sums)):
        better = sums[index] > best
        np.maximum(best, sums[index], out=best)
        # Classes come in ascending order, so the last one that was better is the largest number.
        np.maximum(found, better.view(np.uint8) * np.uint8(index), out=found)
    return found


def _confusion(total: npt.NDArray[np.uint16], counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """True positives, false positives and false negatives of each class, `(3, K)`."""
    decided = _argmax(total)
    chosen = np.array([np.count_nonzero(decided == index) for index in range(len(total))])
    hits = np.array([np.count_nonzero(decided[segment] == index) for index, segment in enumerate(_segments(counts))])
    return np.stack([hits, chosen - hits, np.asarray(counts) - hits])


def _mean_overlap(
    tp: npt.NDArray[np.int64], fp: npt.NDArray[np.int64], fn: npt.NDArray[np.int64], metric: str
) -> npt.NDArray[np.float64]:
    """Means over classes `(n,)` of counts `(n, K)`; a class that is neither true nor predicted is left out."""
    twice = 2 if metric == "dice" else 1
    there = (tp + fp + fn) > 0
    values = np.where(there, twice * tp / np.maximum(twice * tp + fp + fn, 1), 0.0)
    return np.asarray(values.sum(axis=1) / np.maximum(there.sum(axis=1), 1), np.float64)
