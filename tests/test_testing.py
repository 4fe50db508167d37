"""The public checks accept what is right and name what is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from smp_ensemble.testing import check_trainer
from smp_ensemble.training.averagers import UniformAverage
from smp_ensemble.training.schedules import CosineRestarts
from smp_ensemble.training.trainers import FGE, SSE, SWA, Boost, Single


@pytest.mark.parametrize("trainer", [Single(), SSE(), SSE(cycles=1, min_factor=0.1), SWA(), FGE(), Boost()])
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


class Late(UniformAverage):
    def is_due(self, step, epochs, steps_per_epoch):
        return False


class Aliased(UniformAverage):
    def update(self, network, step):
        self.network = network
        self.count += 1

    def weights(self):
        return self.network.state_dict()

    def state_dict(self):
        return {"network": self.network}

    def load_state_dict(self, state):
        self.network = state["network"]


class Meddling(UniformAverage):
    def update(self, network, step):
        super().update(network, step)
        with torch.no_grad():
            network.weight.fill_(0)


class Forgetful(UniformAverage):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "weights": {name: 0 * one for name, one in state["weights"].items()}})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Late, "must take in a network before the first snapshot"),
        (Aliased, r"weights\(\) must give the average, whatever the network does"),
        (Meddling, "update must leave the network as it is"),
        (Forgetful, r"load_state_dict\(state_dict\(\)\) must give the average"),
        (dict, "must have is_due, load_state_dict, state_dict, update, weights"),
    ],
)
def test_a_broken_average_is_refused(kind, message):
    class Broken(SWA):
        def averager(self):
            return kind()

    with pytest.raises(AssertionError, match=message):
        check_trainer(Broken())


def test_an_average_shared_between_trainings_is_refused():
    shared = UniformAverage()

    class Sharing(SWA):
        def averager(self):
            return shared

    with pytest.raises(AssertionError, match="a new one at each call"):
        check_trainer(Sharing())


def test_weights_that_cannot_be_drawn_by_are_refused():
    class Silent(Boost):
        def image_weights(self, losses):
            return np.zeros_like(losses)

    with pytest.raises(AssertionError, match=r"image_weights\(\[0.0, 0.5, 2.0\]\) must give 3 finite numbers"):
        check_trainer(Silent())
