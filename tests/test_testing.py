"""The public checks accept what is right and name what is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from smp_ensemble.testing import check_trainer
from smp_ensemble.training.schedules import CosineRestarts
from smp_ensemble.training.trainers import SSE, Single


@pytest.mark.parametrize("trainer", [Single(), SSE(), SSE(cycles=1, min_factor=0.1)])
def test_built_in_trainers_pass(trainer):
    check_trainer(trainer)


def test_a_thawed_dataclass_is_refused():
    @dataclass
    class Thawed(SSE.__mro__[-1]):
        name: ClassVar[str] = "thawed"
        reference: ClassVar[str] = "none"

        def schedule(self, epochs, steps_per_epoch):
            return CosineRestarts(epochs, steps_per_epoch)

        def averager(self):
            return None

    with pytest.raises(AssertionError, match="must be frozen"):
        check_trainer(Thawed())


def test_an_impure_schedule_is_refused():
    class Drifting(CosineRestarts):
        calls = 0

        def factor(self, step):
            Drifting.calls += 1
            return super().factor(step) + 1e-3 * Drifting.calls

    @dataclass(frozen=True)
    class Impure:
        name: ClassVar[str] = "impure"
        reference: ClassVar[str] = "none"

        def schedule(self, epochs, steps_per_epoch):
            return Drifting(epochs, steps_per_epoch)

        def averager(self):
            return None

    with pytest.raises(AssertionError, match="pure function"):
        check_trainer(Impure())
