"""What stopping early costs: members used, agreement with the whole ensemble, and the IoU, on any data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.inference.adaptive import AdaptiveBatch
from smp_ensemble.metrics.confusion import Counts, confusion_counts, scores_of
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.typing import Task


@dataclass(frozen=True)
class AdaptiveScore:
    """An ensemble that stops early, against the same one whose members all run.

    Attributes:
        tolerance: What its rule promises: at most this share of mask values differs.
        stopped: How many images stopped after 1, 2, ..., M members.
        agreement: Share of mask values that are the same, ignored pixels included; as they are served.
        iou: As the ensemble's.
    """

    tolerance: float
    stopped: tuple[int, ...]
    agreement: float
    iou: float

    @property
    def members(self) -> float:
        """Members that an image saw on average."""
        return sum(count * used for used, count in enumerate(self.stopped, start=1)) / sum(self.stopped)

    def metrics(self, prefix: str) -> dict[str, float]:
        """For a run: `val_adaptive_members`, `val_adaptive_agreement`, `val_adaptive_iou`."""
        return {
            f"{prefix}_adaptive_members": self.members,
            f"{prefix}_adaptive_agreement": self.agreement,
            f"{prefix}_adaptive_iou": self.iou,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports."""
        return {
            "tolerance": self.tolerance,
            "members": self.members,
            "stopped": list(self.stopped),
            "agreement": self.agreement,
            "iou": self.iou,
        }


class AdaptiveMeter:
    """Compares masks of an ensemble that stops early with those of all its members, batch by batch."""

    def __init__(self, ensemble: Ensemble, task: Task) -> None:
        self._ensemble = ensemble
        self._task = task
        self._stopped = [0] * len(ensemble.weights)
        self._same = self._values = 0
        nothing = torch.zeros(task.num_outputs, dtype=torch.int64)
        self._counts = Counts(nothing, nothing, nothing, torch.zeros((), dtype=torch.int64))

    def batch(self, images: int) -> AdaptiveStream:
        """What is to see each member's probabilities of the next batch."""
        return AdaptiveStream(AdaptiveBatch(self._ensemble, images))

    def update(self, used: list[int], mask: Tensor, full: Tensor, truth: Tensor) -> None:
        """Takes a batch.

        Args:
            used: Members that each image saw.
            mask: What is served when it stops early, 255 where rejected.
            full: What all members give.
            truth: 255 where ignored.
        """
        for count in used:
            self._stopped[count - 1] += 1
        self._same += int((mask == full).sum())
        self._values += mask.numel()
        mask = mask.long()
        covered = truth.masked_fill(mask == IGNORE_INDEX, IGNORE_INDEX)
        found = confusion_counts(mask, covered, self._task.mode, self._task.num_outputs)
        self._counts = Counts(*(total + part for total, part in zip(self._counts, found, strict=True)))

    def score(self) -> AdaptiveScore:
        """What was measured."""
        assert self._ensemble.adaptive is not None
        iou = float(scores_of(self._counts, self._task)["iou"])
        return AdaptiveScore(self._ensemble.adaptive.tolerance, tuple(self._stopped), self._same / self._values, iou)


class AdaptiveStream:
    """Shows an `AdaptiveBatch` what it asks for out of all members' probabilities."""

    def __init__(self, batch: AdaptiveBatch) -> None:
        self._batch = batch

    def update(self, probabilities: Tensor) -> None:
        """Takes the next member's probabilities of all images, `(N, K, H, W)`."""
        if self._batch.active:
            self._batch.update(probabilities[self._batch.active])

    def result(self) -> tuple[Tensor, list[int]]:
        """Probabilities `(N, K, H, W)`, and how many members each image saw."""
        return self._batch.compute(), self._batch.used
