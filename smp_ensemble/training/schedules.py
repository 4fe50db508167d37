"""Learning-rate schedules as pure functions of completed optimizer steps; snapshots fall on epoch ends."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from smp_ensemble.exceptions import ConfigError


@dataclass(frozen=True)
class EpochSchedule:
    """What all schedules here share: whole epochs, and snapshots at the ends of some of them.

    Attributes:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps in one epoch.

    Raises:
        ConfigError: A count below 1.
    """

    epochs: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        if min(self.epochs, self.steps_per_epoch) < 1:
            raise ConfigError(
                f"epochs and steps_per_epoch must be at least 1, got {self.epochs} and {self.steps_per_epoch}"
            )

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """Completed epochs after which a snapshot is due, ascending; the last one, if nothing else is said."""
        return (self.epochs,)

    @cached_property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Completed steps after which a snapshot is due."""
        return tuple(epoch * self.steps_per_epoch for epoch in self.snapshot_epochs)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def is_snapshot(self, step: int) -> bool:
        """Whether a snapshot is due after `step` completed steps."""
        return step in self.snapshot_steps


@dataclass(frozen=True)
class CosineRestarts(EpochSchedule):
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
        _check_share("min_factor", self.min_factor)

    @cached_property
    def _boundaries(self) -> tuple[int, ...]:
        """Epochs at which cycles begin and end, from 0 to the last."""
        return tuple(round(cycle * self.epochs / self.cycles) for cycle in range(self.cycles + 1))

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """The end of each cycle."""
        return self._boundaries[1:]

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each group's own rate."""
        _check_step(step)
        if step >= self.total_steps:
            return self.min_factor
        cycle = bisect_right(self._boundaries, step // self.steps_per_epoch) - 1
        start, end = (epoch * self.steps_per_epoch for epoch in self._boundaries[cycle : cycle + 2])
        cosine = 0.5 * (1.0 + math.cos(math.pi * (step - start) / (end - start)))
        return self.min_factor + (1.0 - self.min_factor) * cosine


@dataclass(frozen=True)
class CosineCheckpoints(EpochSchedule):
    """One cosine over the whole training, with a snapshot every few epochs, counted back from the last one.

    Attributes:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps in one epoch.
        every_epochs: Epochs from one snapshot to the next.
        min_factor: What the cosine falls towards, as a factor of the rate.

    Raises:
        ConfigError: A count below 1, more `every_epochs` than epochs, or `min_factor` outside 0..1.

    Example:
        >>> CosineCheckpoints(epochs=10, steps_per_epoch=1, every_epochs=4).snapshot_steps
        (2, 6, 10)
    """

    every_epochs: int = 1
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.every_epochs <= self.epochs:
            raise ConfigError(
                f"expected every_epochs from 1 to the {self.epochs} epochs of the training, got {self.every_epochs}"
            )
        _check_share("min_factor", self.min_factor)

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """The last epoch, and each that is a multiple of `every_epochs` before it."""
        return tuple(range(self.epochs, 0, -self.every_epochs))[::-1]

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each group's own rate."""
        return CosineRestarts(self.epochs, self.steps_per_epoch, 1, self.min_factor).factor(step)


def plateau_then_linear(progress: float, floor: float) -> float:
    """1 until half of the phase, then linear to `floor` at nine tenths of it, then `floor`.

    References:
        Izmailov et al., UAI 2018, arXiv:1803.05407, the authors' `train.py`; Garipov et al. train FGE's first phase so.

    Example:
        >>> [round(plateau_then_linear(progress, 0.2), 3) for progress in (0.0, 0.5, 0.7, 0.9, 1.0)]
        [1.0, 1.0, 0.6, 0.2, 0.2]
    """
    if progress <= 0.5:
        return 1.0
    if progress >= 0.9:
        return floor
    return 1.0 - (1.0 - floor) * (progress - 0.5) / 0.4


@dataclass(frozen=True)
class TriangularCycles(EpochSchedule):
    """FGE's cycles: the rate falls linearly from `high` to `low` in half a cycle and climbs back in the other half.

    Step j of the cycles, counted from 1, of a cycle of C steps has `t = (mod(j - 1, C) + 1) / C` and the factor
    `high * (1 - 2t) + low * 2t` for t up to 1/2, `low * (2 - 2t) + high * (2t - 1)` beyond. Snapshots are taken in the
    middle of each cycle, after the one step at `low`.

    Before `start_epoch` the rate is constant and then falls to `high` (`plateau_then_linear`).

    Attributes:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps in one epoch.
        cycle_epochs: c, an even number: the minimum then falls on an epoch end.
        high: a1, the cycles' maximum, as a factor of the rate.
        low: a2, their minimum.
        start_epoch: Completed epochs after which the cycles begin.

    Raises:
        ConfigError: An odd or too small c, no epoch left for half a cycle, or factors that do not fit.

    References:
        Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018,
        arXiv:1802.10026, section 5.

    Example:
        >>> schedule = TriangularCycles(epochs=4, steps_per_epoch=2, cycle_epochs=2, high=1.0, low=0.0)
        >>> [schedule.factor(step) for step in range(8)]
        [0.5, 0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0]
        >>> schedule.snapshot_steps
        (2, 6)
    """

    cycle_epochs: int = 4
    high: float = 0.5
    low: float = 0.01
    start_epoch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycle_epochs < 2 or self.cycle_epochs % 2:
            raise ConfigError(
                f"expected an even number of cycle_epochs, 2 or more, got {self.cycle_epochs}: the rate is lowest in "
                "the middle of a cycle, and that must be an epoch end"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(
                f"expected 0 <= low <= high <= 1 as factors of the rate, got low={self.low}, high={self.high}"
            )
        left = self.epochs - self.start_epoch
        if self.start_epoch < 0 or left < self.cycle_epochs // 2:
            raise ConfigError(
                f"cycles of {self.cycle_epochs} epochs need at least {self.cycle_epochs // 2} epochs after the "
                f"start, got {max(left, 0)} of {self.epochs}: train longer, start earlier, or use shorter cycles"
            )

    @property
    def snapshot_epochs(self) -> tuple[int, ...]:
        """The middle of each cycle."""
        return tuple(range(self.start_epoch + self.cycle_epochs // 2, self.epochs + 1, self.cycle_epochs))

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each group's own rate."""
        _check_step(step)
        start = self.start_epoch * self.steps_per_epoch
        if step < start:
            return plateau_then_linear(step / start, self.high)
        length = self.cycle_epochs * self.steps_per_epoch
        progress = ((step - start) % length + 1) / length
        share = 2 * progress if progress <= 0.5 else 2 - 2 * progress  # 0 at the maximum, 1 at the minimum
        return self.high * (1 - share) + self.low * share


@dataclass(frozen=True)
class PlateauThenConstant(EpochSchedule):
    """SWA's rates: a plateau, a linear fall, and from `start_epoch` on a constant or cyclic rate.

    With cycles, step j of C counted from 1 has `t = (mod(j - 1, C) + 1) / C` and the factor
    `(1 - t) * swa_lr + t * low`: each cycle falls linearly and its last step is its minimum.

    Attributes:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps in one epoch.
        swa_lr: The factor at the end of the fall, and from then on.
        start_epoch: Completed epochs after which averaging begins.
        cycle_epochs: c, the length of a cycle where the rate is cyclic.
        cyclic: Whether it is.
        low: The minimum of a cycle.

    Raises:
        ConfigError: A count out of range, or factors that do not fit.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
        arXiv:1803.05407, section 3.2, and the authors' `train.py`.

    Example:
        >>> schedule = PlateauThenConstant(epochs=20, steps_per_epoch=1, swa_lr=0.2, start_epoch=10)
        >>> [round(schedule.factor(step), 3) for step in (0, 5, 7, 9, 10, 19)]
        [1.0, 1.0, 0.6, 0.2, 0.2, 0.2]
    """

    swa_lr: float = 0.2
    start_epoch: int = 0
    cycle_epochs: int = 1
    cyclic: bool = False
    low: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_epoch < self.epochs:
            raise ConfigError(
                f"expected averaging to start before the last of {self.epochs} epochs, got start_epoch="
                f"{self.start_epoch}: start earlier, or train longer"
            )
        if not 1 <= self.cycle_epochs <= self.epochs - self.start_epoch:
            raise ConfigError(
                f"expected cycle_epochs from 1 to the {self.epochs - self.start_epoch} epochs after the start, got "
                f"{self.cycle_epochs}"
            )
        _check_share("swa_lr", self.swa_lr)
        if self.cyclic and not 0 <= self.low <= self.swa_lr:
            raise ConfigError(f"expected a cycle's minimum from 0 to swa_lr={self.swa_lr}, got {self.low}")

    def factor(self, step: int) -> float:
        """Rate of the next step after `step` completed ones, as a factor of each group's own rate."""
        _check_step(step)
        start = self.start_epoch * self.steps_per_epoch
        if step < start:
            return plateau_then_linear(step / start, self.swa_lr)
        if not self.cyclic:
            return self.swa_lr
        length = self.cycle_epochs * self.steps_per_epoch
        progress = ((step - start) % length + 1) / length
        return (1 - progress) * self.swa_lr + progress * self.low


def _check_step(step: int) -> None:
    if step < 0:
        raise ConfigError(f"step must not be negative, got {step}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must lie in 0..1, got {value}")
