"""What is measured of one system on one set of images: sums by group, from which every score and interval follows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smp_ensemble.ensembling.temperature import TemperatureFit, apply_temperature
from smp_ensemble.metrics.boundary import BoundaryScores
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import Counts, confusion_counts, scores_of
from smp_ensemble.metrics.decision import certainty, decide
from smp_ensemble.metrics.selective import SelectiveScores
from smp_ensemble.metrics.threshold import ThresholdCurve
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from smp_ensemble.typing import Mode, Task

AT_ONCE = 16
TINY = 1e-7


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few images at once of each of several tensors; float16 becomes float32."""
    for start in range(0, len(tensors[0]), AT_ONCE):
        parts = (tensor[start : start + AT_ONCE] for tensor in tensors)
        yield tuple(part.float() if part.is_floating_point() else part for part in parts)


def calibrate(probabilities: Tensor, truth: Tensor, mode: Mode) -> tuple[float, float]:
    """Temperature by log-loss and, in binary mode, the threshold with the best IoU: every system alike.

    Args:
        probabilities: On validation data, `(N, K, H, W)`.
        truth: Class ids, `(N, H, W)`; 255 is ignored.
        mode: What is predicted.
    """
    fit = TemperatureFit(mode)
    while not fit.done:
        for part, true in in_parts(probabilities, truth):
            fit.update(part, true)
        fit.step()
    if mode != "binary":
        return fit.temperature, 0.5
    curve = ThresholdCurve().to(probabilities.device)
    for part, true in in_parts(probabilities, truth):
        curve.update(apply_temperature(part, fit.temperature, mode), true)
    return fit.temperature, curve.best()[0]


def log_losses(probabilities: Tensor, truth: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Sum over valid pixels of -log p(truth), and their number, of each image: `(N,)` each."""
    valid = truth != IGNORE_INDEX
    known = truth.masked_fill(~valid, 0)
    if mode == "multiclass":
        of_truth = probabilities.gather(1, known[:, None])[:, 0]
    else:
        of_truth = torch.where(known == 1, probabilities[:, 0], 1 - probabilities[:, 0])
    losses = -of_truth.clamp(TINY, 1).log().masked_fill(~valid, 0)
    return losses.double().sum(dim=(1, 2)), valid.sum(dim=(1, 2))


def measure(
    probabilities: Tensor,
    truth: Tensor,
    groups: Sequence[str],
    task: Task,
    *,
    temperature: float,
    threshold: float,
    whole: bool = True,
) -> dict[str, Any]:
    """Sums by group, and scores of the whole.

    Args:
        probabilities: Before the temperature, `(N, K, H, W)`.
        truth: Class ids, `(N, H, W)`.
        groups: Of each image.
        task: Mode and class names; multilabel is not studied here.
        temperature: Fitted on other data.
        threshold: Fitted on other data.
        whole: Whether boundary, calibration and selective scores are wanted too.

    Returns:
        `groups`: for each, `counts` (true positives, false positives, false negatives of each class) and `nll` (sum and
        pixels); and with `whole` the scores `boundary_iou`, `ece`, `brier`, `aurc` and `error_auroc`.
    """
    names = sorted(set(groups))
    place = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names), task.num_outputs, 3), dtype=np.int64)
    losses = np.zeros((len(names), 2))
    device = probabilities.device
    meters = [CalibrationScores(task), SelectiveScores(), BoundaryScores(task)] if whole else []
    for meter in meters:
        meter.to(device)
    at = 0
    for part, true in in_parts(probabilities, truth):
        calibrated = apply_temperature(part, temperature, task.mode)
        decision = decide(calibrated, task.mode, threshold)
        sums, pixels = (values.tolist() for values in log_losses(calibrated, true, task.mode))
        for offset in range(len(part)):
            index = place[groups[at + offset]]
            one = confusion_counts(decision[offset][None], true[offset][None], task.mode, task.num_outputs)
            counts[index] += np.stack([values.cpu().numpy() for values in one[:3]], axis=1)
            losses[index] += [sums[offset], pixels[offset]]
        if whole:
            valid = true != IGNORE_INDEX
            sure = certainty(calibrated, decision, task.mode)
            meters[0].update(calibrated, true)
            meters[1].update((1 - sure).clamp_min(0), valid & (decision != true), valid)
            meters[2].update(decision, true)
        at += len(part)
    found: dict[str, Any] = {
        "groups": {
            name: {"counts": counts[index].tolist(), "nll": [round(float(losses[index, 0]), 3), int(losses[index, 1])]}
            for name, index in place.items()
        }
    }
    wanted = {"ece", "brier", "aurc", "error_auroc", "boundary_iou"}
    for meter in meters:
        found |= {name: round(float(value), 6) for name, value in meter.compute().items() if name in wanted}
    return found


def iou_of(counts: np.ndarray, task: Task) -> float:
    """Mean IoU of summed counts `(K, 3)`, as the package has it."""
    tp, fp, fn = (torch.from_numpy(np.asarray(counts)[:, part]) for part in range(3))
    return float(scores_of(Counts(tp, fp, fn, torch.tensor(1)), task)["iou"])


def total_counts(measured: dict[str, Any]) -> np.ndarray:
    """Counts `(K, 3)` of all groups."""
    return np.sum([group["counts"] for group in measured["groups"].values()], axis=0)


def mean_loss(measured: dict[str, Any]) -> float:
    """Mean log-loss over all valid pixels, in nats."""
    sums, pixels = np.sum([group["nll"] for group in measured["groups"].values()], axis=0)
    return float(sums / pixels)
