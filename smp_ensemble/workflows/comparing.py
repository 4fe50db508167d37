"""A student beside its teacher and the teacher's best member: accuracy kept, and what each of them costs."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.ensembling.views import parse_views
from smp_ensemble.inference.engine import to_tensor
from smp_ensemble.metrics.bootstrap import paired_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.evaluation.measurement import Measurement, ModelMeasurement
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.metrics.bootstrap import Difference

REPETITIONS = 5
"""Timings of each model, in turn; their medians count."""
SHOWN = ("iou", "ece", "nll")
TEACHER, BEST_MEMBER, STUDENT = "teacher", "best member", "student"


@dataclass(frozen=True)
class Comparison:
    """Teacher, best member and student on one data set, each with its own temperature and threshold.

    Attributes:
        split: `val` or `test`.
        teacher: The ensemble.
        best_member: The member of the best validation IoU; the teacher itself where it has no other.
        student: What learned from it.
        gain: Mean IoU of the teacher minus the best member's.
        over_best: Mean IoU of the student minus the best member's.
    """

    split: str
    teacher: ModelMeasurement
    best_member: ModelMeasurement
    student: ModelMeasurement
    gain: Difference
    over_best: Difference

    @property
    def accuracy_kept(self) -> float:
        """The student's IoU as a share of the teacher's; NaN if that is 0."""
        teacher, student = _iou(self.teacher), _iou(self.student)
        return student / teacher if teacher > 0 else math.nan

    @property
    def gain_kept(self) -> float | None:
        """Which share of the teacher's gain over its best member the student has; None: that gain may be none.

        The gain counts where the lower end of its interval is above 0: else the share would be noise over noise.
        """
        return self.over_best.estimate / self.gain.estimate if self.gain.low > 0 else None

    def metrics(self) -> dict[str, float]:
        """The numbers, as a run keeps them; those that are not finite are left out."""
        found = {
            f"{name.replace(' ', '_')}_{self.split}_{metric}": float(one.score.metrics[metric])
            for name, one in self.models()
            for metric in SHOWN
        }
        found[f"accuracy_kept_{self.split}"] = self.accuracy_kept
        if self.gain_kept is not None:
            found[f"gain_kept_{self.split}"] = self.gain_kept
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def models(self) -> list[tuple[str, ModelMeasurement]]:
        """Each with what it is called here."""
        return [(TEACHER, self.teacher), (BEST_MEMBER, self.best_member), (STUDENT, self.student)]

    def sentence(self) -> str:
        """What the student kept, for people."""
        kept = f"{self.split}: the student keeps {100 * self.accuracy_kept:.1f} % of the teacher's IoU"
        gain = f"{self.gain.estimate:+.4f} ({self.gain.low:+.4f} to {self.gain.high:+.4f})"
        if self.gain_kept is None:
            return f"{kept}; the teacher's own gain on its best member, {gain}, may be none: no share of it is told"
        return f"{kept}, and {100 * self.gain_kept:.0f} % of the teacher's gain on its best member, {gain}"

    def values(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            **{name.replace(" ", "_"): dict(one.score.metrics) for name, one in self.models()},
            "thresholds": {name.replace(" ", "_"): one.score.threshold for name, one in self.models()},
            "accuracy_kept": self.accuracy_kept,
            "gain_kept": self.gain_kept,
            "gain": {"estimate": self.gain.estimate, "low": self.gain.low, "high": self.gain.high},
            "student_over_best_member": {
                "estimate": self.over_best.estimate,
                "low": self.over_best.low,
                "high": self.over_best.high,
            },
        }


def compare(split: str, teacher: Measurement, best: int, student: Measurement) -> Comparison:
    """Puts measurements on the same images side by side.

    Args:
        split: What the images are for.
        teacher: Of the teacher and its members.
        best: The member that is the best on validation data.
        student: Of the student alone.
    """
    member = teacher.members[best] if teacher.members else teacher.ensemble
    groups = teacher.groups
    return Comparison(
        split,
        teacher.ensemble,
        member,
        student.ensemble,
        paired_difference(teacher.ensemble.counts, member.counts, groups=groups),
        paired_difference(student.ensemble.counts, member.counts, groups=groups),
    )


def forward_passes(engine: Engine) -> int:
    """Passes of a network that one image costs: members times views times passes."""
    return len(engine.ensemble.members) * len(parse_views(engine.views)) * engine.passes


def time_ratio(teacher: Engine, student: Engine, data: SegmentationDataset, *, batch_size: int) -> float:
    """How many times as long as the student the teacher takes, from raw images in memory to probabilities.

    Both run the same batch in turn, after one run that does not count; the medians are compared.
    """
    first = data.read(0)[0].shape
    images = [data.read(index)[0] for index in range(min(batch_size, len(data)))]
    batch = torch.stack([to_tensor(image) for image in images if image.shape == first])
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for repetition in range(REPETITIONS + 1):
        for place, engine in enumerate((teacher, student)):
            began = time.perf_counter()
            engine(batch).cpu()  # waits for the device
            if repetition:
                seconds[place].append(time.perf_counter() - began)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def table(comparisons: Sequence[Comparison], passes: Mapping[str, int]) -> list[dict[str, Any]]:
    """A line for each model: what it costs and what it scores."""
    rows: list[dict[str, Any]] = []
    for place, (name, _) in enumerate(comparisons[0].models()):
        row: dict[str, Any] = {"model": name, "passes": passes[name]}
        for one in comparisons:
            measured = one.models()[place][1]
            row |= {
                f"{one.split} IoU": measured.score.metrics["iou"],
                f"{one.split} ECE": measured.score.metrics["ece"],
                f"{one.split} NLL": measured.score.metrics["nll"],
            }
        rows.append(row)
    return rows


def _iou(one: ModelMeasurement) -> float:
    return float(one.score.metrics["iou"])
