"""The threshold curve equals deciding at each threshold, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import jaccard_score

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.metrics.threshold import ThresholdCurve
from smp_ensemble.typing import IGNORE_INDEX, Task


def random_batch(seed: int, dtype: torch.dtype = torch.float32, bins: int = 256):
    """Probabilities of which half lie on a threshold or one step of floating point beside it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, 24, 24)
    free = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    on = (torch.randint(0, bins + 1, shape, generator=generator).double() / bins).to(dtype)
    beside = torch.nextafter(on, torch.randint(0, 2, shape, generator=generator).to(dtype)).clamp(0, 1)
    pick = torch.randint(0, 4, shape, generator=generator)
    probabilities = torch.where(pick < 2, free, torch.where(pick == 2, on, beside))
    target = (torch.rand(shape, generator=generator) < 0.2 + 0.6 * probabilities.float()).long()[:, 0]
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE_INDEX
    return probabilities, target


@pytest.mark.parametrize("bins", [256, 100, 7, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equals_brute_force_bit_for_bit(bins: int, dtype: torch.dtype) -> None:
    probabilities, target = random_batch(bins, dtype, bins)
    curve = ThresholdCurve(bins)
    curve.update(probabilities, target)
    exact = probabilities if dtype == torch.float64 else probabilities.float()
    for j, iou in enumerate(curve.iou().tolist()):
        decided, valid = exact[:, 0] >= j / bins, target != IGNORE_INDEX
        hits = int((decided & (target == 1)).sum())
        assert iou == hits / int((valid & (decided | (target == 1))).sum())


def test_equals_scikit_learn() -> None:
    probabilities, target = random_batch(0)
    curve = ThresholdCurve()
    curve.update(probabilities, target)
    valid = target != IGNORE_INDEX
    for j in (1, 77, 128, 255):
        expected = jaccard_score(target[valid], probabilities[:, 0][valid] >= j / 256)
        assert float(curve.iou()[j]) == pytest.approx(expected, abs=1e-12)


def test_the_best_threshold_gives_the_best_iou() -> None:
    """What the curve promises is what a mask at that threshold scores."""
    probabilities, target = random_batch(3)
    curve = ThresholdCurve(100)
    curve.update(probabilities, target)
    threshold, iou = curve.best()
    assert iou == max(curve.iou()[1:].tolist())
    scores = SegmentationScores(Task("binary", ("background", "roof")), threshold)
    scores.update(probabilities, target)
    assert float(scores.compute()["iou"]) == pytest.approx(iou, abs=1e-6)


def test_ties_go_to_the_threshold_nearest_one_half() -> None:
    target = torch.tensor([[[1, 0]]])
    for high, low, expected in ((0.9, 0.1, 0.5), (0.4, 0.1, 0.375), (0.9, 0.6, 0.625)):
        curve = ThresholdCurve(8)
        curve.update(torch.tensor([high, low]).view(1, 1, 1, 2), target)
        assert curve.best() == (expected, 1.0)


def test_threshold_zero_is_never_the_best() -> None:
    curve = ThresholdCurve(4)
    curve.update(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 4, dtype=torch.int64))
    assert curve.iou()[0] == 1.0
    assert curve.best() == (0.5, 0.0)


def test_batches_do_not_matter() -> None:
    probabilities, target = random_batch(4)
    whole, parts = ThresholdCurve(), ThresholdCurve()
    whole.update(probabilities, target)
    for batch in zip(probabilities.split(1), target.split(1), strict=True):
        parts.update(*batch)
        parts.update(batch[0], torch.full_like(batch[1], IGNORE_INDEX))
    assert torch.equal(whole.iou(), parts.iou())


def test_without_foreground_there_is_no_best() -> None:
    curve = ThresholdCurve(4)
    curve.update(torch.full((1, 1, 1, 2), 0.3), torch.full((1, 1, 2), IGNORE_INDEX))
    assert all(math.isnan(iou) for iou in curve.iou().tolist())
    with pytest.raises(DataError, match="foreground pixels to choose a threshold by"):
        curve.best()
    with pytest.raises(ConfigError, match="two or more bins, came 1"):
        ThresholdCurve(1)
