"""Scores of an ensemble and of each of its members, in one pass over the data, and meters that add up."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from smp_ensemble.evaluation.measurement import Score
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import SegmentationScores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.typing import Task

DEFAULT_THRESHOLD = 0.5


class Meter:
    """The metrics that every snapshot has, of one model at one threshold.

    It holds sums over pixels, so it is small, and meters add up: see `pooled`.
    """

    def __init__(self, task: Task, threshold: float = DEFAULT_THRESHOLD) -> None:
        self._task = task
        self._threshold = threshold
        self._scores = SegmentationScores(task, threshold)
        self._half = SegmentationScores(task) if task.mode == "binary" else None
        self._calibration = CalibrationScores(task)
        for metric in (self._scores, self._half, self._calibration):
            if metric is not None:
                metric.compute_with_cache = False  # what is merged in later counts too

    def merge(self, other: Meter) -> None:
        """Adds all pixels that another meter for the same task has seen."""
        self._scores.merge_state(other._scores)
        self._calibration.merge_state(other._calibration)
        if self._half is not None and other._half is not None:
            self._half.merge_state(other._half)

    def update(self, probabilities: Tensor, target: Tensor) -> None:
        """Takes probabilities `(N, K, H, W)` and their truth, as the metrics do."""
        self._scores.update(probabilities, target)
        self._calibration.update(probabilities, target)
        if self._half is not None:
            self._half.update(probabilities, target)

    def score(self) -> Score:
        """The scores of all pixels seen so far."""
        found = {name: float(value) for name, value in self._scores.compute().items()}
        metrics = {name: value for name, value in found.items() if name.split("/")[0] in {"iou", "dice"}}
        metrics |= {name: float(value) for name, value in self._calibration.compute().items()}
        if self._half is not None:
            metrics["iou_at_half"] = float(self._half.compute()["iou"])
        return Score(self._threshold, metrics)


def score(
    engine: Engine,
    data: SegmentationDataset,
    *,
    batch_size: int = 8,
    threshold: float = DEFAULT_THRESHOLD,
    label: str = "",
) -> list[Score]:
    """Scores of each member and, last, of the ensemble; see `measure`."""
    meters = measure(engine, data, batch_size=batch_size, threshold=threshold, label=label)
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
    threshold: float = DEFAULT_THRESHOLD,
    label: str = "",
) -> list[Meter]:
    """A meter for each member and, last, for the ensemble. Memory holds one member's probabilities and one sum.

    Args:
        engine: Runs the ensemble.
        data: Images and masks.
        batch_size: Images at once.
        threshold: Of all of them, in binary and multilabel mode; nothing is tuned here.
        label: Of the progress bar.
    """
    predictions = Predictions(engine, data, batch_size=batch_size, label=label)
    meters = [Meter(data.task, threshold) for _ in range(len(engine.ensemble.members) + 1)]
    for batch in predictions:
        stream = _measured(predictions.of_members(batch), meters, batch.truth)
        meters[-1].update(engine.ensemble.combine(stream), batch.truth)
    return meters


def _measured(probabilities: Iterator[Tensor], meters: Sequence[Meter], truth: Tensor) -> Iterator[Tensor]:
    """Hands on each member's probabilities after its meter has seen them."""
    for meter in meters[:-1]:
        one = next(probabilities)
        meter.update(one, truth)
        yield one
        del one  # before the next member runs
