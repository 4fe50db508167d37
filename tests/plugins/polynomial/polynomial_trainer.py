"""Polynomial decay with a snapshot at the end of each half: a method that smp_ensemble does not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class PolynomialDecay:
    """The rate falls as `(1 - step / steps)^power`; snapshots half way and at the end."""

    epochs: int
    steps_per_epoch: int
    power: float

    @property
    def snapshot_steps(self):
        return tuple(sorted({max(1, self.epochs // 2) * self.steps_per_epoch, self.total_steps}))

    @property
    def total_steps(self):
        return self.epochs * self.steps_per_epoch

    def factor(self, step):
        return max(0.0, 1 - step / self.total_steps) ** self.power

    def is_snapshot(self, step):
        return step in self.snapshot_steps


@dataclass(frozen=True)
class Polynomial:
    """DeepLab's "poly" rate."""

    name: ClassVar[str] = "polynomial"
    reference: ClassVar[str] = "Chen et al., TPAMI 2018, arXiv:1606.00915, section 4.1"

    power: float = 0.9

    def schedule(self, epochs, steps_per_epoch):
        return PolynomialDecay(epochs, steps_per_epoch, self.power)

    def averager(self):
        return None
