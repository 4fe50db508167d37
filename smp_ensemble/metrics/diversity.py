"""How members differ, and what the ensemble gains by it: counted pixel by pixel, one member's probabilities at a time.

References:
    Kuncheva & Whitaker, "Measures of Diversity in Classifier Ensembles and Their Relationship with the Ensemble
    Accuracy", Machine Learning 51, 2003: disagreement, correlation of errors, double fault.
    Krogh & Vedelsby, "Neural Network Ensembles, Cross Validation, and Active Learning", NIPS 1994: ambiguity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torchmetrics import Metric

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.inputs import check_probabilities, check_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.typing import Task

_UNIT = 2**24
"""Squared errors are summed in int64 in units of 2**-24, as in `calibration.py`: the same in any order."""


@dataclass(frozen=True)
class Diversity:
    """How M members differ, over the valid pixels of a data set; in multilabel mode over pairs of pixel and class.

    Attributes:
        disagreement: Share where two members decide differently: float64 `(M, M)`, 0 on the diagonal.
        error_correlation: Correlation (phi) of where two members are wrong: float64 `(M, M)`, 1 on the diagonal. 0: as
            if they erred independently. NaN, also on the diagonal, for a member that is never wrong or always.
        double_fault: Share where both are wrong: float64 `(M, M)`, the error rates on the diagonal.
        errors: Share where each member is wrong: float64 `(M,)`.
        member_error: The members' Brier scores (squared error, summed over the classes of a multiclass pixel), averaged
            with their weights.
        ensemble_error: The Brier score of the members' weighted mean.
        ambiguity: Squared distance of the members from their mean, averaged with their weights. It is what averaging
            gains: `ensemble_error = member_error - ambiguity`, for any members.
    """

    disagreement: npt.NDArray[np.float64]
    error_correlation: npt.NDArray[np.float64]
    double_fault: npt.NDArray[np.float64]
    errors: npt.NDArray[np.float64]
    member_error: float
    ensemble_error: float
    ambiguity: float


class Counts(NamedTuple):
    """Int64: valid pixels `()`, those where two differ or both are wrong `(M, M)`, fixed-point squared errors `()`."""

    pixels: Tensor
    differ: Tensor
    both_wrong: Tensor
    member_error: Tensor
    ensemble_error: Tensor
    ambiguity: Tensor


class DiversityBatch:
    """One batch, to which members are added in order; it keeps a byte per member and pixel, and two sums.

    `DiversityScores.batch` makes it.
    """

    def __init__(self, task: Task, weights: Sequence[float], target: Tensor, done: Callable[[Counts], None]) -> None:
        self._task = task
        self._weights = weights
        self._target = target
        self._done = done
        self._ids = len(task.class_names) if task.mode == "multiclass" else 2
        self._valid = check_target(target, self._ids)
        self._decisions: list[Tensor] = []
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, probabilities: Tensor, decision: Tensor) -> None:
        """Takes the next member.

        Args:
            probabilities: Its probabilities `(N, K, H, W)`.
            decision: What it decides at its own threshold: integers of the target's shape, class ids or zeros and ones.

        Raises:
            DataError: Shapes do not fit, values are not probabilities, or decisions are no class ids.
            ConfigError: All members were added before.
        """
        place, mode = len(self._decisions), self._task.mode
        if place == len(self._weights):
            raise ConfigError(f"expected {place} members in a batch, came another one: open a new batch")
        probabilities = check_probabilities(probabilities, self._target, mode, self._task.num_outputs)
        self._check_decision(decision)
        self._decisions.append(decision[self._valid].to(torch.uint8))
        weight = self._weights[place]
        exact = (probabilities[:, 0] if mode == "binary" else probabilities).double()
        square = exact.square().sum(dim=1) if mode == "multiclass" else exact.square()
        if self._mean is None or self._square is None:
            self._mean, self._square = exact * weight, square * weight
        else:
            self._mean.add_(exact, alpha=weight)
            self._square.add_(square, alpha=weight)

    def close(self) -> None:
        """Counts the batch once every member was added.

        Raises:
            ConfigError: The number of members is another.
        """
        if len(self._decisions) != len(self._weights) or self._mean is None or self._square is None:
            raise ConfigError(f"expected {len(self._weights)} members in a batch, came {len(self._decisions)}")
        differ, both_wrong = _pairs(self._decisions, self._target[self._valid].to(torch.uint8))
        label = torch.where(self._valid, self._target, 0).long()
        if self._task.mode == "multiclass":
            chosen, own = self._mean.gather(1, label.unsqueeze(1))[:, 0], self._mean.square().sum(dim=1)
            truth = torch.ones_like(chosen)
        else:
            chosen, own, truth = self._mean * label, self._mean.square(), label
        errors = (self._square - 2 * chosen + truth, own - 2 * chosen + truth, self._square - own)
        fixed = (torch.where(self._valid, (error * _UNIT).round().long(), 0).sum() for error in errors)
        self._done(Counts(self._valid.sum(), differ, both_wrong, *fixed))
        self._decisions, self._mean, self._square = [], None, None  # closing twice is an error

    def _check_decision(self, decision: Tensor) -> None:
        shape = tuple(self._target.shape)
        if decision.shape != shape:
            raise DataError(f"expected decisions of the target's shape {shape}, came {tuple(decision.shape)}")
        if decision.is_floating_point() or decision.is_complex() or decision.dtype == torch.bool:
            raise DataError(f"expected decisions as integer class ids, came {decision.dtype}: decide before")
        wrong = (decision < 0) | (decision >= self._ids)
        if bool(wrong.any()):
            raise DataError(
                f"expected decisions 0..{self._ids - 1}, came {int(decision[wrong][0])}: members reject no pixels"
            )


def _pairs(decisions: Sequence[Tensor], truth: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels where two of M members differ, and where both are wrong, `(M, M)`, from their decisions `(P,)`.

    Comparing bytes pair by pair is exact, and faster than products of float32 rows.
    """
    wrong = [decision != truth for decision in decisions]
    differ, both = (torch.zeros(len(wrong), len(wrong), dtype=torch.int64, device=truth.device) for _ in range(2))
    for i in range(len(wrong)):
        for j in range(i + 1):
            differ[i, j] = differ[j, i] = torch.count_nonzero(decisions[i] != decisions[j])
            both[i, j] = both[j, i] = torch.count_nonzero(wrong[i] & wrong[j])
    return differ, both


def _compute(counts: Counts) -> dict[str, Tensor]:
    pixels = counts.pixels.double()
    double_fault = counts.both_wrong / pixels
    errors = double_fault.diagonal()
    deviation = (errors * (1 - errors)).sqrt()
    correlation = (double_fault - errors.outer(errors)) / deviation.outer(deviation)
    correlation.clamp_(-1, 1).diagonal()[deviation > 0] = 1.0
    return {
        "disagreement": counts.differ / pixels,
        "error_correlation": correlation,
        "double_fault": double_fault,
        "errors": errors.clone(),
        "member_error": counts.member_error / _UNIT / pixels,
        "ensemble_error": counts.ensemble_error / _UNIT / pixels,
        "ambiguity": counts.ambiguity / _UNIT / pixels,
    }


class DiversityScores(Metric):
    """How members differ, over every valid pixel: open a batch, add each member in order, close it.

    Only one member's probabilities need to be in memory at a time. Without a valid pixel every value is NaN.

    Args:
        task: Mode and class names.
        members: M, how many members each batch has.
        weights: Of the members in the ensemble's mean; their scale does not matter. None: equal ones.

    Raises:
        ConfigError: There is no member, or weights are not M numbers of 0 and more, one of them above 0.

    Example:
        >>> from smp_ensemble.typing import Task
        >>> scores = DiversityScores(Task("binary", ("background", "roof")), members=2)
        >>> batch = scores.batch(torch.tensor([[[1, 1, 0, 0]]]))
        >>> for values in ([0.75, 0.25, 0.0, 0.0], [0.75, 0.75, 0.5, 0.0]):
        ...     probabilities = torch.tensor(values).view(1, 1, 1, 4)
        ...     batch.add(probabilities, (probabilities[:, 0] >= 0.5).long())
        >>> batch.close()
        >>> found = scores.diversity()
        >>> found.disagreement.tolist(), found.errors.tolist()
        ([[0.0, 0.5], [0.5, 0.0]], [0.25, 0.25])
        >>> found.member_error, found.ensemble_error, found.ambiguity
        (0.125, 0.09375, 0.03125)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    pixels: Tensor
    differ: Tensor
    both_wrong: Tensor
    member_error: Tensor
    ensemble_error: Tensor
    ambiguity: Tensor

    def __init__(self, task: Task, members: int, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if members < 1:
            raise ConfigError(f"expected at least one member, came {members}")
        weights = [1.0] * members if weights is None else list(weights)
        total = math.fsum(weights)
        if len(weights) != members or min(weights) < 0 or not 0 < total < math.inf:
            raise ConfigError(f"expected {members} weights of 0 and more, one of them above 0, came {weights}")
        self.task = task
        self.weights = tuple(weight / total for weight in weights)
        for name in ("differ", "both_wrong"):
            self.add_state(name, torch.zeros(members, members, dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("pixels", "member_error", "ensemble_error", "ambiguity"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def batch(self, target: Tensor) -> DiversityBatch:
        """Opens a batch.

        Args:
            target: Class ids `(N, H, W)`, zeros and ones `(N, K, H, W)` in multilabel mode; 255 where ignored.

        Raises:
            DataError: Class ids are out of range.
        """
        return DiversityBatch(self.task, self.weights, target, self.update)

    def update(self, counts: Counts) -> None:
        """Adds the counts of a batch; closing the batch does so."""
        for name, value in counts._asdict().items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """The values of `diversity` by name, float64 tensors."""
        return _compute(Counts(*(getattr(self, name) for name in Counts._fields)))

    def diversity(self) -> Diversity:
        """How the members differ on everything seen so far."""
        found = {name: value.cpu().numpy() for name, value in self.compute().items()}
        pairs = (len(self.weights), len(self.weights))
        return Diversity(
            disagreement=found["disagreement"].reshape(pairs),  # torchmetrics makes (1, 1) a scalar
            error_correlation=found["error_correlation"].reshape(pairs),
            double_fault=found["double_fault"].reshape(pairs),
            errors=found["errors"].reshape(-1),
            member_error=float(found["member_error"]),
            ensemble_error=float(found["ensemble_error"]),
            ambiguity=float(found["ambiguity"]),
        )
