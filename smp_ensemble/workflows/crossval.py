"""Cross-validated scores: of each training on the images that it left out, and of a whole plan."""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.evaluation.guards import check_leaks
from smp_ensemble.evaluation.scoring import Meter, measure, pooled
from smp_ensemble.exceptions import LeakError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.workflows.loading import load_snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.evaluation.measurement import Score
    from smp_ensemble.typing import Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeftOutScores:
    """What one training scores on the images that it left out; `cv_iou`, `cv_dice`, `cv_ece`, ..., at threshold 0.5.

    Attributes:
        snapshots: Of each snapshot, in their order.
        combined: Of the mean of their probabilities.
        meter: The combined one's pixels, to be pooled with those of other folds.
    """

    snapshots: list[dict[str, float]]
    combined: dict[str, float]
    meter: Meter


def score_left_out(
    snapshots: Sequence[Snapshot],
    data: SegmentationDataset,
    *,
    batch_size: int = 8,
    precision: str = "auto",
    accelerator: str = "auto",
) -> LeftOutScores | None:
    """Scores a training's snapshots, and the mean of their probabilities, on the images that it left out.

    Nothing is tuned on these images, so the threshold is 0.5.

    Returns:
        None, and a warning, where they were trained on after all: before, in the training that `init` came from.
    """
    task = data.task
    members = [load_snapshot(snapshot.uri, task) for snapshot in snapshots]
    try:
        check_leaks(members, data, "left-out")
    except LeakError as error:
        logger.warning("no cross-validated scores: %s", error)
        return None
    ensemble = Ensemble(members, mode=task.mode, class_names=task.class_names)
    engine = Engine(ensemble, choose_device(accelerator), precision)
    meters = measure(engine, data, batch_size=batch_size, label="left-out")
    *alone, combined = [_named(meter.score()) for meter in meters]
    return LeftOutScores(alone, combined, meters[-1])


def summarize(found: Sequence[LeftOutScores]) -> dict[str, float]:
    """Scores of a plan, from its trainings' combined ones.

    Returns:
        `cv_iou_mean` and `cv_iou_std`, the mean and the sample standard deviation over trainings; and `cv_iou`, of all
        left-out pixels together, each predicted by the training that left it out. The same for every other score. An
        image that several bootstrap samples left out counts once for each.
    """
    if not found:
        return {}
    summary = _named(pooled([one.meter for one in found]))
    for name in list(summary):
        values = [one.combined[name] for one in found if math.isfinite(one.combined.get(name, math.nan))]
        if values:
            summary[f"{name}_mean"] = statistics.fmean(values)
        if len(values) > 1:
            summary[f"{name}_std"] = statistics.stdev(values)
    return summary


def _named(score: Score) -> dict[str, float]:
    """As they stand in MLflow; the threshold is 0.5, so `iou_at_half` says nothing new."""
    return {f"cv_{name}": value for name, value in score.metrics.items() if name != "iou_at_half"}
