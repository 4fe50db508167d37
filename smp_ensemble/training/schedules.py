"""Learning-rate schedules as pure functions of completed optimizer steps, in whole-epoch cycles."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from smp_ensemble.exceptions import ConfigError


@dataclass(frozen=True)
class CosineRestarts:
    """Cosine annealing with warm restarts: each cycle starts at factor 1 and falls to its minimum at its last step.

    Boundary k of M cycles is the epoch `round(k * epochs / M)`, so every snapshot falls on an epoch end and no cycle is
    empty, whether or not M divides the epochs. (Cycles of `ceil(steps / M)`, as the formula is often written, can
    leave the last one empty or cut off at a high rate.)

    Attributes:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps in one epoch.
        cycles: M, number of cycles; 1 is plain cosine annealing.
        min_factor: What the cosine falls towards, as a factor of the rate.

    Raises:
        ConfigError: A count below 1, more cycles than epochs, or `min_factor` outside 0..1.

    References:
        Loshchilov and Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, eq. 5.
        Huang et al., "Snapshot Ensembles", ICLR 2017, arXiv:1704.00109, eq. 2.

    Example:
        >>> schedule = CosineRestarts(epochs=4, steps_per_epoch=2, cycles=2)
        >>> [round(schedule.factor(step), 3) for step in range(8)]
        [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146]
        >>> schedule.snapshot_steps
        (4, 8)
    """

    epochs: int
    steps_per_epoch: int
    cycles: int = 1
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        if min(self.epochs, self.steps_per_epoch, self.cycles) < 1:
            raise ConfigError(
                f"epochs, steps_per_epoch and cycles must be at least 1, got {self.epochs}, {self.steps_per_epoch} "
                f"and {self.cycles}"
            )
        if self.cycles > self.epochs:
            raise ConfigError(
                f"{self.cycles} cycles do not fit into {self.epochs} epochs: a cycle takes at least one epoch, "
                f"so use cycles={self.epochs} at most, or more epochs"
            )
        if not 0 <= self.min_factor <= 1:
            raise ConfigError(f"min_factor must lie in 0..1, got {self.min_factor}")

    @cached_property
    def _boundaries(self) -> tuple[int, ...]:
        """Steps at which cycles begin and end, from 0 to the last step."""
        return tuple(
            round(cycle * self.epochs / self.cycles) * self.steps_per_epoch for cycle in range(self.cycles + 1)
        )

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Completed steps after which a snapshot is due: the end of each cycle."""
        return self._boundaries[1:]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self._boundaries[-1]

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each group's own rate."""
        if step < 0:
            raise ConfigError(f"step must not be negative, got {step}")
        if step >= self.total_steps:
            return self.min_factor
        cycle = bisect_right(self._boundaries, step) - 1
        start, end = self._boundaries[cycle : cycle + 2]
        cosine = 0.5 * (1.0 + math.cos(math.pi * (step - start) / (end - start)))
        return self.min_factor + (1.0 - self.min_factor) * cosine

    def is_snapshot(self, step: int) -> bool:
        """Whether a cycle has just ended after `step` completed steps."""
        return step in self.snapshot_steps
