"""Boundary IoU: how well outlines fit, pooled over a data set; IoU hardly sees them on large objects.

References:
    Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, arXiv:2103.16562.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torchmetrics import Metric

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.inputs import check_target
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode, Task


class Counts(NamedTuple):
    """Pixels of boundary regions, int64 `(K,)`: in both masks, and in at least one."""

    intersection: Tensor
    union: Tensor


def boundary_width(height: int, width: int, dilation_ratio: float = 0.02) -> int:
    """d: how many pixels deep the boundary region of a mask is, from the diagonal of its image; at least 1.

    Example:
        >>> boundary_width(256, 256), boundary_width(10, 10)
        (7, 1)
    """
    return max(1, round(dilation_ratio * math.sqrt(height**2 + width**2)))


def erode(mask: Tensor, iterations: int) -> Tensor:
    """Erodes by a 3x3 square, so often; outside the image there is no mask, so its edge is a contour too.

    That is one erosion by a square of `2 * iterations + 1` pixels, hence one along rows and one along columns. Each
    takes the logarithm of that many steps, because the overlap of two neighbouring windows is a longer window.

    Args:
        mask: Bool `(..., H, W)`.
        iterations: How often, 0 or more.

    Returns:
        Bool, same shape.

    Example:
        >>> erode(torch.ones(1, 5, dtype=torch.bool), 1).any().item()
        False
        >>> erode(torch.ones(3, 5, dtype=torch.bool), 1).int().tolist()
        [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    """
    window = 2 * iterations + 1
    mask = F.pad(mask, [iterations] * 4)
    for dim in (-1, -2):
        reached = 1
        while reached < window:
            step = min(reached, window - reached)
            kept = mask.shape[dim] - step
            mask = mask.narrow(dim, 0, kept) & mask.narrow(dim, step, kept)
            reached += step
    return mask


def _check_decision(decision: Tensor, target: Tensor, ids: int) -> None:
    if decision.shape != target.shape:
        raise DataError(f"expected decisions of the target's shape {tuple(target.shape)}, came {tuple(decision.shape)}")
    if decision.is_floating_point() or decision.is_complex() or decision.dtype == torch.bool:
        raise DataError(f"expected decisions as integer class ids, came {decision.dtype}: decide before")
    wrong = (decision != IGNORE_INDEX) & ((decision < 0) | (decision >= ids))
    if bool(wrong.any()):
        raise DataError(
            f"expected decisions 0..{ids - 1} or {IGNORE_INDEX} (rejected), came {int(decision[wrong][0])}: "
            "check the class names against the model"
        )


def _masks(labels: Tensor, index: int, mode: Mode) -> Tensor:
    """The mask of one class, bool `(N, H, W)`."""
    if mode == "multilabel":
        return labels[:, index] == 1
    return labels == (1 if mode == "binary" else index)


def _update(decision: Tensor, target: Tensor, task: Task, dilation_ratio: float) -> Counts:
    """Pixels that do not count are filled in both masks: there they neither end a mask nor stand in the way."""
    ids = len(task.class_names) if task.mode == "multiclass" else 2
    valid = check_target(target, ids)
    _check_decision(decision, target, ids)
    valid = valid & (decision != IGNORE_INDEX)
    depth = boundary_width(target.shape[-2], target.shape[-1], dilation_ratio)
    intersections, unions = [], []
    for index in range(task.num_outputs):
        counted = valid[:, index] if task.mode == "multilabel" else valid
        regions = []
        for labels in (decision, target):
            mask = _masks(labels, index, task.mode) & counted
            regions.append(mask & ~erode(mask | ~counted, depth))
        intersections.append(torch.count_nonzero(regions[0] & regions[1]))
        unions.append(torch.count_nonzero(regions[0] | regions[1]))
    return Counts(torch.stack(intersections), torch.stack(unions))


def _compute(counts: Counts, task: Task) -> dict[str, Tensor]:
    present = (counts.union > 0).tolist()
    iou = counts.intersection / counts.union
    scores = {"boundary_iou": iou.nanmean()}
    return scores | {f"boundary_iou/{name}": iou[k] for k, name in enumerate(task.output_names) if present[k]}


class BoundaryScores(Metric):
    """Boundary IoU of hard decisions, pooled over everything that `update` saw.

    The boundary region of a mask is those of its pixels that are within d pixels of its contour, by rows, columns and
    diagonals, d being `dilation_ratio` of the image's diagonal, rounded, and at least 1; the edge of the image is a
    contour, as in the authors' code. The score of a class is the sum over images of the intersections of the two
    regions, divided by the sum of their unions.

    `compute` gives `boundary_iou` and, per class, `boundary_iou/<class>`, as `SegmentationScores` gives `iou`: in
    binary mode the foreground's, else `boundary_iou` is the mean over classes; a class without any boundary pixel,
    predicted or true, is left out of it and has no entry, and where no class remains it is NaN.

    Ignored pixels (255 in the truth) and rejected ones (255 in the decision) belong to no region. They make no contour
    either: a mask that reaches an area of them counts as going on in it.

    Args:
        task: Mode and class names.
        dilation_ratio: Depth of the boundary region as a share of the image's diagonal.

    Raises:
        ConfigError: The ratio is not above 0.

    References:
        Cheng et al., CVPR 2021, arXiv:2103.16562, and its `mask_to_boundary`, which pads with 0 and erodes d times.

    Example:
        >>> from smp_ensemble.typing import Task
        >>> scores = BoundaryScores(Task("binary", ("background", "roof")))
        >>> truth = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> truth[0, 1:6, 1:6] = 1  # 16 of its 25 pixels are at its contour
        >>> decision = truth.clone()
        >>> decision[0, 3, 3] = 0  # a hole: the 8 pixels around it are a contour now
        >>> scores.update(decision, truth)
        >>> round(float(scores.compute()["boundary_iou"]), 4)  # 16 of 24
        0.6667
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    intersection: Tensor
    union: Tensor

    def __init__(self, task: Task, dilation_ratio: float = 0.02) -> None:
        super().__init__()
        if not 0 < dilation_ratio < math.inf:
            raise ConfigError(f"expected a dilation ratio above 0, came {dilation_ratio}: 0.02 is the default")
        self.task = task
        self.dilation_ratio = dilation_ratio
        for name in ("intersection", "union"):
            self.add_state(name, torch.zeros(task.num_outputs, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decision: Tensor, target: Tensor) -> None:
        """Counts a batch of whole images of one size, without padding: that would move their edges and change d.

        Args:
            decision: Class ids `(N, H, W)`, zeros and ones `(N, K, H, W)` in multilabel mode; 255 where rejected.
            target: The same shape; 255 where ignored. Integers, both.

        Raises:
            DataError: Shapes differ, dtypes are no integers, or class ids are out of range.
        """
        counts = _update(decision, target, self.task, self.dilation_ratio)
        self.intersection += counts.intersection
        self.union += counts.union

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything seen so far."""
        return _compute(Counts(self.intersection, self.union), self.task)
