"""Everything that is measured of an ensemble and its members on one data set, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.temperature import apply_temperature
from smp_ensemble.evaluation.adaptive_measuring import AdaptiveMeter
from smp_ensemble.evaluation.measurement import Example, Measurement, ModelMeasurement, Score
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.metrics.boundary import BoundaryScores
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import Counts, confusion_counts, scores_of
from smp_ensemble.metrics.decision import certainty, decide
from smp_ensemble.metrics.diversity import DiversityScores
from smp_ensemble.metrics.selective import SelectiveScores
from smp_ensemble.metrics.uncertainty import UncertaintyMaps, image_scores
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.evaluation.adaptive_measuring import AdaptiveStream
    from smp_ensemble.evaluation.predictions import Batch, Predictions
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.metrics.diversity import DiversityBatch
    from smp_ensemble.typing import Task

EXAMPLES = 3
"""So many of the best images are shown, and of the worst."""


def member_names(ensemble: Ensemble) -> list[str]:
    """What people may call the members: the start of their tracked snapshot's id, else `member 0`, `member 1`, ..."""
    sources = [member.source if isinstance(member, Member) else "" for member in ensemble.members]
    return [source.removeprefix("models:/")[:12] or f"member {index}" for index, source in enumerate(sources)]


def measure_all(predictions: Predictions, *, split: str, names: Sequence[str] = ()) -> Measurement:
    """Measures the ensemble as it would be served, and each member as it would be served alone.

    A member's threshold and temperature are its own (`Member.threshold`, `Member.temperature`), so that the ensemble is
    compared with members at their best. Post-processing and rejection are the ensemble's alone.

    Args:
        predictions: Of this data set; read once.
        split: What the data set is for.
        names: Of the members, for people; empty: `member 0`, `member 1`, ...
    """
    ensemble, data = predictions.ensemble, predictions.data
    task, several = data.task, len(ensemble.members) > 1
    labels = list(names) or [f"member {index}" for index in range(len(ensemble.members))]
    alone = [_Alone(label, member, task, len(data)) for label, member in zip(labels, ensemble.members, strict=True)]
    whole = _ModelMeter("ensemble" if several else labels[0], task, ensemble.threshold, len(data))
    before = CalibrationScores(task) if ensemble.temperature != 1 else None
    diversity = DiversityScores(task, len(alone), ensemble.weights) if several else None
    uncertainty = np.zeros((len(data), 3))
    as_fitted = predictions.engine.views == ensemble.views and predictions.engine.passes == 1
    adaptive = AdaptiveMeter(ensemble, task) if ensemble.adaptive is not None and as_fitted else None
    for batch in predictions:
        counted = diversity.batch(batch.truth) if diversity is not None else None
        maps = UncertaintyMaps(task.mode, ensemble.threshold)
        early = adaptive.batch(len(batch.images)) if adaptive is not None else None
        watching = alone if several else ()
        stream = _watched(predictions.of_members(batch), watching, batch, counted, maps, ensemble, early)
        pooled = ensemble.pool(stream)
        if counted is not None:
            counted.close()
        if before is not None:
            before.update(pooled, batch.truth)
        combined = apply_temperature(pooled, ensemble.temperature, task.mode)
        masks = _masks(ensemble, batch, combined)
        whole.update(batch, combined, ensemble.decide(combined, reject=0.0), masks)
        if adaptive is not None and early is not None:
            stopped, used = early.result()
            adaptive.update(used, _masks(ensemble, batch, stopped), masks, batch.truth)
        uncertainty[batch.indices] = image_scores(maps.compute(combined), batch.known_pixels()).numpy()
    return Measurement(
        task=task,
        data=data.reference(),
        split=split,
        images=data.names,
        groups=data.groups,
        members=[one.meter.result() for one in alone] if several else [],
        ensemble=whole.result(),
        uncalibrated=before.reliability() if before is not None else None,
        diversity=diversity.diversity() if diversity is not None else None,
        uncertainty=uncertainty,
        adaptive=adaptive.score() if adaptive is not None else None,
    )


def _masks(ensemble: Ensemble, batch: Batch, combined: Tensor) -> Tensor:
    if not ensemble.postprocess.active:
        return ensemble.decide(combined)
    masks = [
        make_mask(ensemble, image, probabilities)
        for image, probabilities in zip(batch.images, combined.numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(masks))


class _ModelMeter:
    """All metrics of one model; sums over pixels, and counts for each image."""

    def __init__(self, name: str, task: Task, threshold: float, images: int) -> None:
        self._name = name
        self._task = task
        self._threshold = threshold
        self._counts = np.zeros((images, task.num_outputs, 3), dtype=np.int64)
        self._accepted = self._valid = 0
        self._half = np.zeros(2, dtype=np.int64)
        self._calibration = CalibrationScores(task)
        self._boundary = BoundaryScores(task)
        self._selective = SelectiveScores()

    def update(self, batch: Batch, probabilities: Tensor, decision: Tensor, mask: Tensor) -> None:
        """Takes a batch.

        Args:
            batch: Images and truth.
            probabilities: Calibrated, `(N, K, H, W)`.
            decision: Before rejection and post-processing, which say nothing about probabilities.
            mask: What is served; 255 where rejected.
        """
        mode, outputs, truth = self._task.mode, self._task.num_outputs, batch.truth
        mask = mask.long()
        valid = truth != IGNORE_INDEX
        covered = truth.masked_fill(mask == IGNORE_INDEX, IGNORE_INDEX)
        for place, index in enumerate(batch.indices):
            counts = confusion_counts(mask[place][None], covered[place][None], mode, outputs)
            self._counts[index] = np.stack([part.numpy() for part in counts[:3]], axis=1)
        self._valid += int(valid.sum())
        self._accepted += int((covered != IGNORE_INDEX).sum())
        self._calibration.update(probabilities, truth)
        self._boundary.update(mask, truth)
        sure = certainty(probabilities, decision, mode)
        self._selective.update((1 - sure).clamp_min(0), valid & (decision.long() != truth), valid)
        if mode == "binary":
            half, true = probabilities[:, 0] >= 0.5, truth == 1
            self._half += [int((half & true).sum()), int(((half | true) & valid).sum())]

    def result(self) -> ModelMeasurement:
        """What was measured."""
        tp, fp, fn = (torch.from_numpy(self._counts[..., part].sum(axis=0)) for part in range(3))
        found = scores_of(Counts(tp, fp, fn, torch.tensor(self._accepted)), self._task)
        metrics = {name: float(value) for name, value in found.items() if name.split("/")[0] in {"iou", "dice"}}
        for metric in (self._boundary, self._calibration, self._selective):
            metrics |= {name: float(value) for name, value in metric.compute().items()}
        if self._task.mode == "binary":
            hits, union = self._half.tolist()
            metrics["iou_at_half"] = hits / union if union else float("nan")
        metrics["coverage"] = self._accepted / self._valid if self._valid else float("nan")
        return ModelMeasurement(
            self._name,
            Score(self._threshold, metrics),
            self._counts,
            self._calibration.reliability(),
            self._selective.curve(),
        )


class _Alone:
    """A member measured as if it were served alone."""

    def __init__(self, name: str, member: torch.nn.Module, task: Task, images: int) -> None:
        self._mode = task.mode
        self._temperature = member.temperature if isinstance(member, Member) else 1.0
        self._threshold = member.threshold if isinstance(member, Member) else 0.5
        self.meter = _ModelMeter(name, task, self._threshold, images)

    def update(self, batch: Batch, probabilities: Tensor) -> Tensor:
        """Takes its probabilities at temperature 1, and gives its decision."""
        calibrated = apply_temperature(probabilities, self._temperature, self._mode)
        decision = decide(calibrated, self._mode, self._threshold)
        self.meter.update(batch, calibrated, decision, decision)
        return decision


def _watched(
    probabilities: Iterator[Tensor],
    alone: Sequence[_Alone],
    batch: Batch,
    counted: DiversityBatch | None,
    maps: UncertaintyMaps,
    ensemble: Ensemble,
    early: AdaptiveStream | None,
) -> Iterator[Tensor]:
    """Hands on each member's probabilities after all meters have seen them."""
    largest = max(ensemble.weights)
    for index, weight in enumerate(ensemble.weights):
        one = next(probabilities)
        maps.update(one, weight / largest)
        if alone and counted is not None:
            counted.add(one, alone[index].update(batch, one))
        if early is not None:
            early.update(one)
        yield one
        del one  # before the next member runs


def choose_examples(measurement: Measurement, data: SegmentationDataset, engine: Engine) -> list[Example]:
    """A few of the best and of the worst images, by the ensemble's mean IoU over the classes that are truly there.

    Images without any class to find are left out while there are others: a single wrong pixel gives them the worst
    score of all.
    """
    tp, fp, fn = np.moveaxis(measurement.ensemble.counts.astype(float), -1, 0)
    present, union = tp + fn > 0, tp + fp + fn
    if not present.any():
        present = union > 0
    iou = np.divide(tp, union, out=np.full_like(tp, np.nan), where=present)
    scores = {int(index): float(np.nanmean(iou[index])) for index in np.flatnonzero(present.any(axis=1))}
    ranked = sorted(scores, key=lambda index: (-scores[index], index))
    chosen = list(dict.fromkeys([*ranked[:EXAMPLES], *ranked[-EXAMPLES:]]))
    examples = []
    for index in chosen:
        image, stored = data.read(index)
        (probabilities,) = engine.predict([image])
        (maps,) = engine.uncertainty([image])
        truth = stored if stored.ndim == 2 else stored.transpose(2, 0, 1)
        mask = make_mask(engine.ensemble, image, probabilities)
        examples.append(Example(data.names[index], image, truth, mask, maps[0], scores[index]))
    return examples
