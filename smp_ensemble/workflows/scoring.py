"""Scores of an ensemble and of each of its members, in one pass over the data."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smp_ensemble.data.loading import evaluation_loader
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.metrics.threshold import ThresholdCurve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.typing import Task

DEFAULT_THRESHOLD = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What was measured for one model on one data set.

    Attributes:
        threshold: The decision threshold that the scores are for.
        metrics: `iou`, `iou/<class>`, `dice`, `ece`, `nll`, `brier`; in binary mode also `iou_at_half`, the score at
            threshold 0.5.
    """

    threshold: float
    metrics: dict[str, float]


class Meter:
    """All metrics of one model; with `threshold=None`, in binary mode, at the threshold with the best IoU.

    It holds sums over pixels, so it is small, and meters add up: see `pooled`.
    """

    def __init__(self, task: Task, threshold: float | None) -> None:
        self._task = task
        self._threshold = threshold
        self._curve = ThresholdCurve() if task.mode == "binary" else None
        self._scores = SegmentationScores(task, DEFAULT_THRESHOLD if threshold is None else threshold)
        self._calibration = CalibrationScores(task)
        for metric in (self._curve, self._scores, self._calibration):
            if metric is not None:
                metric.compute_with_cache = False  # what is merged in later counts too

    def merge(self, other: Meter) -> None:
        """Adds all pixels that another meter for the same task has seen."""
        self._scores.merge_state(other._scores)
        self._calibration.merge_state(other._calibration)
        if self._curve is not None and other._curve is not None:
            self._curve.merge_state(other._curve)

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Takes probabilities `(N, K, H, W)` and their truth, as the metrics do."""
        probabilities = probabilities.cpu()
        self._scores.update(probabilities, target)
        self._calibration.update(probabilities, target)
        if self._curve is not None:
            self._curve.update(probabilities, target)

    def score(self) -> Score:
        """The scores of all pixels seen so far."""
        found = {name: float(value) for name, value in self._scores.compute().items()}
        metrics = {name: value for name, value in found.items() if name.split("/")[0] in {"iou", "dice"}}
        metrics |= {name: float(value) for name, value in self._calibration.compute().items()}
        if self._curve is None:
            return Score(self._threshold or DEFAULT_THRESHOLD, metrics)
        curve = self._curve.iou()
        metrics["iou_at_half"] = float(curve[len(curve) // 2])
        if self._threshold is not None:
            return Score(self._threshold, metrics)
        if not float(curve[0]) > 0:  # threshold 0 finds whatever there is to find
            logger.warning("the data holds no foreground to tune a threshold on: %s stands", DEFAULT_THRESHOLD)
            return Score(DEFAULT_THRESHOLD, metrics)
        threshold, iou = self._curve.best()
        name = self._task.output_names[0]
        dice = 2 * iou / (1 + iou)
        metrics |= {"iou": iou, f"iou/{name}": iou, "dice": dice, f"dice/{name}": dice}
        return Score(threshold, metrics)


def score(
    engine: Engine,
    data: SegmentationDataset,
    *,
    batch_size: int = 8,
    thresholds: Sequence[float] | None = None,
    label: str = "",
) -> list[Score]:
    """Scores of each member and, last, of the ensemble; see `measure`."""
    meters = measure(engine, data, batch_size=batch_size, thresholds=thresholds, label=label)
    return [meter.score() for meter in meters]


def pooled(meters: Sequence[Meter]) -> Score:
    """The scores of all pixels that several meters have seen, as if one had seen them all."""
    first, *others = meters
    together = copy.deepcopy(first)
    for other in others:
        together.merge(other)
    return together.score()


def measure(
    engine: Engine,
    data: SegmentationDataset,
    *,
    batch_size: int = 8,
    thresholds: Sequence[float] | None = None,
    label: str = "",
) -> list[Meter]:
    """A meter for each member and, last, for the ensemble. Memory holds one member's probabilities and one sum.

    Args:
        engine: Runs the ensemble.
        data: Images and masks.
        batch_size: Images at once.
        thresholds: For each member and the ensemble; None: tuned on this very data (binary mode), so for
            validation data only.
        label: Of the progress bar.
    """
    members = len(engine.ensemble.members)
    meters = [Meter(data.task, thresholds[index] if thresholds else None) for index in range(members + 1)]
    loader = evaluation_loader(data, batch_size=batch_size, workers=0, divisor=engine.stride)
    for batch in _progress(loader, label):
        target = batch["mask"]
        offset = 0
        for part in engine.parts(batch["image"]):
            truth = target[offset : offset + len(part)]
            offset += len(part)
            combined = engine.ensemble.combine(_measured(engine.member_probabilities(part), meters, truth))
            meters[-1].update(combined, truth)
    return meters


def _measured(probabilities: Iterator[Tensor], meters: Sequence[Meter], truth: Tensor) -> Iterator[Tensor]:
    """Hands on each member's probabilities after its meter has seen them."""
    for meter in meters[:-1]:
        one = next(probabilities)
        meter.update(one, truth)
        yield one
        del one  # before the next member runs


def _progress(loader: Any, label: str) -> Iterator[dict[str, Tensor]]:
    """A progress bar on a terminal, nothing elsewhere."""
    bar: Iterator[dict[str, Tensor]] = iter(tqdm(loader, desc=label, unit="batch", leave=False, disable=None))
    return bar
