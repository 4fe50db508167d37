"""Boundary IoU: against the authors' formula on OpenCV and SciPy, and by hand."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.boundary import BoundaryScores, boundary_width, erode
from smp_ensemble.typing import IGNORE_INDEX, MODES, Mode, Task

TASKS = {
    "binary": Task("binary", ("background", "roof")),
    "multiclass": Task("multiclass", ("water", "grass", "road")),
    "multilabel": Task("multilabel", ("tree", "shadow", "car")),
}


def random_labels(mode: Mode, seed: int, size: tuple[int, int, int] = (3, 60, 41)) -> torch.Tensor:
    """Smooth random regions, so that masks are thick enough to have an inside."""
    n, h, w = size
    generator = torch.Generator().manual_seed(seed)
    channels = {"binary": 1, "multiclass": 3, "multilabel": 3}[mode]
    noise = torch.randn(n, channels, h // 10 + 2, w // 10 + 2, generator=generator)
    field = F.interpolate(noise, (h, w), mode="bilinear")
    labels = field.argmax(1) if mode == "multiclass" else (field > -0.3).long()
    return (labels[:, 0] if mode == "binary" else labels).to(torch.uint8)


def scores_of(mode: Mode, *batches: tuple[torch.Tensor, torch.Tensor], ratio: float = 0.02) -> dict[str, float]:
    metric = BoundaryScores(TASKS[mode], ratio)
    for decision, target in batches:
        metric.update(decision, target)
    return {name: float(value) for name, value in metric.compute().items()}


def class_masks(mode: Mode, labels: torch.Tensor) -> np.ndarray:
    """uint8 `(K, N, H, W)`."""
    array = labels.numpy()
    if mode == "binary":
        return (array == 1)[None].astype(np.uint8)
    if mode == "multiclass":
        return np.stack([array == k for k in range(3)]).astype(np.uint8)
    return (array == 1).swapaxes(0, 1).astype(np.uint8)


def authors_boundary(mask: np.ndarray, ratio: float) -> np.ndarray:
    """The paper's region, on OpenCV: a border of zeros, then d erosions by 3x3."""
    h, w = mask.shape
    d = max(1, round(ratio * np.sqrt(h**2 + w**2)))
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return mask - cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1 : h + 1, 1 : w + 1]


def pooled_by_hand(mode: Mode, decision: torch.Tensor, target: torch.Tensor, ratio: float) -> list[float]:
    scores = []
    for decisions, truths in zip(class_masks(mode, decision), class_masks(mode, target), strict=True):
        regions = [
            (authors_boundary(a, ratio), authors_boundary(b, ratio)) for a, b in zip(decisions, truths, strict=True)
        ]
        scores.append(sum((a & b).sum() for a, b in regions) / sum((a | b).sum() for a, b in regions))
    return scores


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("seed", "ratio"), [(0, 0.02), (1, 0.05), (2, 0.005)])
def test_equals_the_authors_formula(mode: Mode, seed: int, ratio: float) -> None:
    decision, target = random_labels(mode, seed), random_labels(mode, seed + 100)
    expected = pooled_by_hand(mode, decision, target, ratio)
    scores = scores_of(mode, (decision, target), ratio=ratio)
    assert scores["boundary_iou"] == pytest.approx(np.mean(expected), rel=1e-6)
    for name, value in zip(TASKS[mode].output_names, expected, strict=True):
        assert scores[f"boundary_iou/{name}"] == pytest.approx(value, rel=1e-6)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.8, 0.97, 1.0]),
)
@settings(max_examples=60)
def test_one_square_is_as_good_as_many_small_ones(height, width, iterations, seed, share) -> None:
    """Erosion is the same by 3x3 again and again (SciPy, max pooling) and by one square of 2d + 1 pixels."""
    mask = torch.from_numpy(np.random.default_rng(seed).random((height, width)) < share)
    found = erode(mask, iterations)
    assert np.array_equal(found, binary_erosion(mask.numpy(), np.ones((3, 3)), iterations=iterations))
    hole = 1 - mask[None, None].float()
    hole = F.pad(hole, [iterations] * 4, value=1.0)
    once = F.max_pool2d(hole, 2 * iterations + 1, stride=1)
    for _ in range(iterations):
        hole = F.max_pool2d(hole, 3, stride=1)
    assert torch.equal(once, hole)
    assert torch.equal(found, hole[0, 0] == 0)


def test_width_of_the_region() -> None:
    assert boundary_width(256, 256) == 7  # 0.02 * 362.04 = 7.24
    assert boundary_width(1000, 1500) == 36  # 0.02 * 1802.8 = 36.06
    assert boundary_width(4, 4) == 1
    assert boundary_width(30, 40, 0.1) == 5


def test_a_shifted_square_by_hand() -> None:
    """Two 5x5 squares, one column apart: rings of 16 pixels share the 4 inner columns' top and bottom, and no sides."""
    target, decision = (torch.zeros(1, 9, 9, dtype=torch.int64) for _ in range(2))
    target[0, 2:7, 1:6] = 1
    decision[0, 2:7, 2:7] = 1
    shared = 2 * 4  # rows 2 and 6, columns 2..5; the sides are columns 1, 5 and 2, 6
    assert scores_of("binary", (decision, target))["boundary_iou"] == pytest.approx(shared / (16 + 16 - shared))


def test_the_edge_of_the_image_is_a_contour() -> None:
    full = torch.ones(1, 6, 6, dtype=torch.int64)
    edge = full.clone()
    edge[0, 1:5, 1:5] = 0
    assert scores_of("binary", (full, edge)) == {"boundary_iou": 1.0, "boundary_iou/roof": 1.0}


@pytest.mark.parametrize("mode", MODES)
def test_ignored_and_rejected_pixels_do_not_matter(mode: Mode) -> None:
    """Whatever is decided where the truth is ignored, or true where the decision is rejected."""
    decision, target = random_labels(mode, 3), random_labels(mode, 4)
    blank = torch.rand(target.shape, generator=torch.Generator().manual_seed(0)) < 0.02
    ignored = target.masked_fill(blank, IGNORE_INDEX)
    first = scores_of(mode, (decision, ignored))
    assert first == scores_of(mode, (torch.where(blank, random_labels(mode, 9), decision), ignored))
    assert first == scores_of(mode, (decision.masked_fill(blank, IGNORE_INDEX), target))
    assert first == scores_of(mode, (decision.masked_fill(blank, IGNORE_INDEX), ignored))
    assert first != scores_of(mode, (decision, target))


def test_an_ignored_area_makes_no_contour() -> None:
    """A roof of 12x12 with an ignored block in its middle, and one whose right half is ignored up to its outline."""
    target = torch.zeros(1, 20, 20, dtype=torch.int64)
    target[0, 4:16, 4:16] = 1
    holed = target.clone()
    holed[0, 8:12, 8:12] = IGNORE_INDEX
    metric = BoundaryScores(TASKS["binary"])
    metric.update(target, holed)
    assert int(metric.union) == 4 * 11  # the ring of the whole roof
    halved = target.clone()
    halved[0, :, 10:] = IGNORE_INDEX
    metric.reset()
    metric.update(target, halved)
    assert int(metric.union) == 12 + 5 + 5  # its left side, top and bottom; nothing along the ignored half


def test_ignored_background_leaves_no_contour_beside_it() -> None:
    target = torch.full((1, 9, 9), IGNORE_INDEX)
    target[0, 3:6, 3:6] = 1
    assert math.isnan(scores_of("binary", (torch.ones_like(target), target))["boundary_iou"])


def test_images_of_other_sizes_have_their_own_depth() -> None:
    batches = [
        (random_labels("multiclass", seed, size), random_labels("multiclass", seed + 50, size))
        for seed, size in enumerate([(2, 40, 90), (1, 150, 120), (3, 20, 20)])
    ]
    metric = BoundaryScores(TASKS["multiclass"])
    intersections, unions = np.zeros(3), np.zeros(3)
    for decision, target in batches:
        metric.update(decision, target)
        ours, truths = class_masks("multiclass", decision), class_masks("multiclass", target)
        for k in range(3):
            for one, other in zip(ours[k], truths[k], strict=True):
                a, b = authors_boundary(one, 0.02), authors_boundary(other, 0.02)
                intersections[k] += (a & b).sum()
                unions[k] += (a | b).sum()
    assert metric.intersection.tolist() == intersections.tolist()
    assert metric.union.tolist() == unions.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_batches_and_merging_do_not_matter(mode: Mode) -> None:
    decision, target = random_labels(mode, 5), random_labels(mode, 6)
    target[:, ..., 10:14, :] = IGNORE_INDEX
    whole = scores_of(mode, (decision, target))
    assert whole == scores_of(mode, *[(decision[i : i + 1], target[i : i + 1]) for i in (2, 0, 1)])
    parts = [BoundaryScores(TASKS[mode]) for _ in range(2)]
    parts[0].update(decision[:1], target[:1])
    parts[1].update(decision[1:], target[1:].long())
    parts[0].merge_state(parts[1])
    assert {name: float(value) for name, value in parts[0].compute().items()} == whole


def test_absent_classes_are_left_out_and_nothing_is_nan() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, :4] = 2
    assert scores_of("multiclass", (labels, labels)) == {
        "boundary_iou": 1.0,
        "boundary_iou/water": 1.0,
        "boundary_iou/road": 1.0,
    }
    blank = torch.full_like(labels, IGNORE_INDEX)
    for batch in ((labels, blank), (blank, labels), (labels[:0], labels[:0])):
        empty = scores_of("multiclass", batch)
        assert set(empty) == {"boundary_iou"}
        assert math.isnan(empty["boundary_iou"])


def test_a_class_that_is_only_predicted_scores_zero() -> None:
    decision = torch.ones(1, 5, 5, dtype=torch.int64)
    assert scores_of("binary", (decision, torch.zeros_like(decision)))["boundary_iou"] == 0.0


def test_errors_say_what_came() -> None:
    metric = BoundaryScores(TASKS["multiclass"])
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(DataError, match=r"target's shape \(1, 4, 4\), came \(1, 4, 3\)"):
        metric.update(labels[..., :3], labels)
    with pytest.raises(DataError, match=r"decisions 0..2 or 255 \(rejected\), came 3"):
        metric.update(labels + 3, labels)
    with pytest.raises(DataError, match=r"class ids 0..2 .* came 3"):
        metric.update(labels, labels + 3)
    with pytest.raises(DataError, match="came torch.float32: decide before"):
        metric.update(labels.float(), labels)
    with pytest.raises(ConfigError, match="dilation ratio above 0, came 0"):
        BoundaryScores(TASKS["binary"], 0.0)
