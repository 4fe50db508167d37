"""The public checks accept what is right and name what is broken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from smp_ensemble import registry
from smp_ensemble.ensembling.combiners import GROUP, Mean, Vote, combiner_class
from smp_ensemble.ensembling.stacking import Stacking
from smp_ensemble.testing import check_combiner, check_trainer
from smp_ensemble.training.averagers import UniformAverage
from smp_ensemble.training.schedules import CosineRestarts
from smp_ensemble.training.trainers import FGE, SSE, SWA, Boost, Single
from smp_ensemble.typing import MODES


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", registry.names(GROUP))
def test_built_in_combiners_pass(name, mode):
    check_combiner(combiner_class(name), mode)


class Sloppy(Mean):
    """A mean with one promise broken in each subclass."""


class Shifted(Sloppy):
    def compute(self):
        return super().compute() + 0.1


class NotSummingUp(Sloppy):
    def compute(self):
        return super().compute().square()


class Invalid(Sloppy):
    def compute(self):
        return super().compute() / 0 * 0


class Flat(Sloppy):
    def compute(self):
        return super().compute().flatten(1)


class FirstCounts(Sloppy):
    def update(self, probabilities, weight=1.0):
        super().update(probabilities, 2 * weight if self._sum is None else weight)


class WeightsAreScaled(Sloppy):
    def update(self, probabilities, weight=1.0):
        super().update(probabilities, weight**2 + 0.1)


class InPlace(Sloppy):
    def update(self, probabilities, weight=1.0):
        super().update(probabilities.mul_(0.5), weight)


class Hoarding(Sloppy):
    def __init__(self, context):
        super().__init__(context)
        self.kept = []

    def update(self, probabilities, weight=1.0):
        self.kept.append(probabilities)
        super().update(probabilities, weight)


class Forgetting(Sloppy):
    def compute(self):
        found = super().compute()
        self._sum = self._sum * 0.5
        return found


class Shared(Sloppy):
    total = None

    def update(self, probabilities, weight=1.0):
        super().update(probabilities, weight)
        Shared.total = probabilities.clone() if Shared.total is None else 0.5 * (Shared.total + probabilities)

    def compute(self):
        return Shared.total.clone()


class Largest(Sloppy):
    def compute(self):
        return super().compute().sqrt()


class ContraryVote(Vote):
    def compute(self):
        return 1 - super().compute()


class RejectsAll(Sloppy):
    reject = 1.0


class Unnamed(Stacking):
    @staticmethod
    def fit(sample):
        return [torch.zeros(1)]


class Moody(Stacking):
    @staticmethod
    def fit(sample):
        return {name: tensor + torch.rand(()) for name, tensor in Stacking.fit(sample).items()}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Shifted, r"Shifted.compute must give values in 0..1, got 0.1.* to 1.1"),
        (Invalid, r"must give values in 0..1, got nan to nan"),
        (Flat, r"must give shape \(2, 3, 6, 5\), got \(2, 90\)"),
        (FirstCounts, "the order of members must not matter"),
        (WeightsAreScaled, "the scale of weights must not matter"),
        (InPlace, "update must leave what it is given as it is"),
        (Hoarding, "must not keep members' probabilities, so that memory does not grow: kept 4"),
        (Forgetting, "compute must give the same when it is asked again"),
        (Shared, "must be made anew for each batch"),
        (Largest, "copies of one model must give what that model gives"),
        (ContraryVote, "copies of one model must decide as that model does"),
        (RejectsAll, "RejectsAll.reject must be 0 or below 1, got 1.0"),
        (Unnamed, "Unnamed.fit must give tensors by name, got"),
        (Moody, "Moody.fit must give the same for the same pixels"),
    ],
)
def test_a_broken_combiner_is_refused(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_combiner(kind, "multilabel")


def test_classes_that_do_not_sum_to_1_are_refused_where_they_compete():
    with pytest.raises(AssertionError, match="classes that sum to 1 in multiclass mode, off by"):
        check_combiner(NotSummingUp, "multiclass")
