"""IoU, Dice and accuracy, pooled over all valid pixels of a data set: counts are added up, then divided once.

A mean of per-image scores would weigh a pixel by the size of the object it belongs to, and would have to invent a score
for images without the class. Counts are int64, so the result does not depend on the order of batches or on their sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torchmetrics import Metric

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.decision import decide
from smp_ensemble.metrics.inputs import check_probabilities, check_target

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.typing import Mode, Task


class Counts(NamedTuple):
    """Pixel counts, int64: true positives, false positives, false negatives `(K,)`, and valid entries `()`."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    valid: Tensor


def _validate(task: Task, threshold: float) -> None:
    if task.mode == "multiclass" and len(task.class_names) < 2:
        raise ConfigError(
            f"expected two or more classes in multiclass mode, came {task.class_names}: use mode 'binary'"
        )
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"expected a threshold in 0..1, came {threshold}")


def confusion_counts(decision: Tensor, target: Tensor, mode: Mode, num_outputs: int) -> Counts:
    """Counts hits and errors of hard decisions per class, ignored pixels left out.

    Args:
        decision: Class ids `(N, H, W)`; zeros and ones in binary mode; `(N, K, H, W)` in multilabel mode.
        target: The same shape, integers, with 255 where a pixel is ignored.
        mode: What is predicted.
        num_outputs: K, the number of output channels: 1 in binary mode, where only the foreground is counted.

    Raises:
        DataError: Shapes differ, or class ids are out of range.

    Example:
        >>> truth = torch.tensor([[[0, 1, 1, 255]]])
        >>> counts = confusion_counts(torch.tensor([[[1, 1, 0, 1]]]), truth, "binary", 1)
        >>> [int(count) for count in counts]
        [1, 1, 1, 3]
    """
    if decision.shape != target.shape:
        raise DataError(f"expected decisions of the target's shape {tuple(target.shape)}, came {tuple(decision.shape)}")
    return _update(decision, target, mode, num_outputs)


def _update(decision: Tensor, target: Tensor, mode: Mode, num_outputs: int) -> Counts:
    valid = check_target(target, num_outputs if mode == "multiclass" else 2)
    if mode == "multiclass":
        cells = num_outputs * num_outputs
        cell = torch.where(valid, target.long() * num_outputs + decision, cells)
        matrix = torch.bincount(cell.flatten(), minlength=cells + 1)[:-1].view(num_outputs, num_outputs)
        hits = matrix.diagonal()
        return Counts(hits.clone(), matrix.sum(0) - hits, matrix.sum(1) - hits, matrix.sum())
    true, predicted = target == 1, valid & (decision == 1)
    tp, positive, chosen = (
        mask.transpose(0, 1).flatten(1).sum(1) if mode == "multilabel" else mask.sum().view(1)
        for mask in (true & predicted, true, predicted)
    )
    return Counts(tp, chosen - tp, positive - tp, valid.sum())


def scores_of(counts: Counts, task: Task) -> dict[str, Tensor]:
    """What `SegmentationScores.compute` gives, from counts that were added up elsewhere."""
    tp, fp, fn, valid = counts
    present = ((tp + fp + fn) > 0).tolist()
    iou, dice = tp / (tp + fp + fn), 2 * tp / (2 * tp + fp + fn)
    right = tp.sum() if task.mode == "multiclass" else valid - (fp + fn).sum()
    scores = {"iou": iou.nanmean(), "dice": dice.nanmean(), "accuracy": right / valid}
    for index, name in enumerate(task.output_names):
        if present[index]:
            scores |= {f"iou/{name}": iou[index], f"dice/{name}": dice[index]}
    return scores


class SegmentationScores(Metric):
    """Pooled IoU, Dice and accuracy over everything that `update` saw.

    `compute` gives `iou`, `dice`, `accuracy` and, per class, `iou/<class>` and `dice/<class>`. In binary mode they are
    the foreground's, so `iou` equals `iou/<foreground>`; else `iou` and `dice` are means over classes. A class that is
    neither predicted nor true anywhere has no score: it is left out of the mean and has no entry. Where no class
    remains, `iou` and `dice` are NaN, and so is `accuracy` without a single valid pixel. `accuracy` is the share of
    right decisions among valid pixels, in multilabel mode among valid (pixel, class) pairs.

    Args:
        task: Mode and class names.
        threshold: From which probability on a pixel is foreground; may be set later, too.

    Raises:
        ConfigError: The threshold is outside 0..1, or a multiclass task has fewer than two classes.

    Example:
        >>> from smp_ensemble.typing import Task
        >>> scores = SegmentationScores(Task("binary", ("background", "roof")))
        >>> scores.update(torch.tensor([[[[0.9, 0.8, 0.1]]]]), torch.tensor([[[1, 0, 255]]]))
        >>> {name: round(float(value), 3) for name, value in scores.compute().items()}
        {'iou': 0.5, 'dice': 0.667, 'accuracy': 0.5, 'iou/roof': 0.5, 'dice/roof': 0.667}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    tp: Tensor
    fp: Tensor
    fn: Tensor
    valid: Tensor

    def __init__(self, task: Task, threshold: float = 0.5) -> None:
        super().__init__()
        _validate(task, threshold)
        self.task = task
        self.threshold = threshold
        for name in ("tp", "fp", "fn"):
            self.add_state(name, torch.zeros(task.num_outputs, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Args:
            probabilities: Shape `(N, K, H, W)`.
            target: Class ids `(N, H, W)`, zeros and ones `(N, K, H, W)` in multilabel mode; 255 where ignored.

        Raises:
            DataError: Shapes do not fit, values are not probabilities, or class ids are out of range.
        """
        mode, outputs = self.task.mode, self.task.num_outputs
        probabilities = check_probabilities(probabilities, target, mode, outputs)
        counts = _update(decide(probabilities, mode, self.threshold), target, mode, outputs)
        self.tp += counts.tp
        self.fp += counts.fp
        self.fn += counts.fn
        self.valid += counts.valid

    def compute(self) -> dict[str, Tensor]:
        """The scores of everything seen so far."""
        return scores_of(Counts(self.tp, self.fp, self.fn, self.valid), self.task)
