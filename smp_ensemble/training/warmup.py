"""A linear warm-up in front of any schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError

if TYPE_CHECKING:
    from smp_ensemble.typing import Schedule


@dataclass(frozen=True)
class Warmup:
    """Any schedule with a linear warm-up: step s of the first W, counted from 1, has its rate times s/W.

    Attributes:
        schedule: What to warm up.
        warmup_steps: W; 0 leaves the schedule as it is.

    Raises:
        ConfigError: A negative W, or a warm-up that reaches the first snapshot.

    References:
        Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677, section 2.2.

    Example:
        >>> from smp_ensemble.training.schedules import PlateauThenConstant
        >>> schedule = Warmup(PlateauThenConstant(4, 2, swa_lr=1.0), warmup_steps=4)
        >>> [schedule.factor(step) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    schedule: Schedule
    warmup_steps: int

    def __post_init__(self) -> None:
        first = self.schedule.snapshot_steps[0]
        if not 0 <= self.warmup_steps < first:
            raise ConfigError(
                f"expected a warm-up of 0 or more steps that ends before the first snapshot after {first} steps, got "
                f"{self.warmup_steps}"
            )

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Those of the schedule."""
        return self.schedule.snapshot_steps

    @property
    def total_steps(self) -> int:
        """Those of the schedule."""
        return self.schedule.total_steps

    def factor(self, step: int) -> float:
        """The schedule's factor, and in the warm-up a share of it."""
        factor = self.schedule.factor(step)
        return factor * (step + 1) / self.warmup_steps if step < self.warmup_steps else factor

    def is_snapshot(self, step: int) -> bool:
        """The schedule's answer."""
        return self.schedule.is_snapshot(step)


def warmed_up(schedule: Schedule, warmup_epochs: float, steps_per_epoch: int) -> Schedule:
    """The schedule with a warm-up of so many epochs, which may be a fraction; the schedule itself without any step.

    Raises:
        ConfigError: A negative warm-up, or one that reaches the first snapshot.
    """
    steps = round(warmup_epochs * steps_per_epoch)
    return Warmup(schedule, steps) if steps else schedule
