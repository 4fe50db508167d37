"""Methods by name, with their options checked."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.testing import check_trainer
from smp_ensemble.training.averagers import ExponentialAverage, UniformAverage
from smp_ensemble.training.schedules import PlateauThenConstant, TriangularCycles
from smp_ensemble.training.trainers import EMA, FGE, SSE, SWA, Boost, Checkpoints, Single, describe, make_trainer


def test_methods_by_name():
    assert make_trainer("single") == Single()
    assert make_trainer("snapshot", {"cycles": 3}) == SSE(cycles=3)


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SSE().cycles = 2


def test_description_is_what_mlflow_keeps():
    assert describe(SSE(cycles=4)) == {"trainer": "snapshot", "cycles": 4, "min_factor": 0.0}


@pytest.mark.parametrize(
    "trainer",
    [
        FGE(start=0.0, cycle_epochs=4, high=0.05, low=1e-4),
        FGE(start=0.5, cycle_epochs=6),
        SWA(start=0.0),
        SWA(start=0.5, cycle_epochs=3, cyclic=True),
        EMA(min_factor=0.1),
        Checkpoints(every_epochs=5),
        Boost(cycles=3, strength=0.5),
    ],
    ids=str,
)
def test_promises_hold_with_other_options(trainer):
    check_trainer(trainer)


@given(st.integers(4, 80), st.sampled_from([2, 4, 6]), st.floats(0.01, 0.99), st.integers(1, 4))
def test_fge_after_a_first_phase_ends_at_a_minimum(epochs, cycle_epochs, start, steps_per_epoch):
    method = FGE(start=start, cycle_epochs=cycle_epochs)
    if epochs - round(start * epochs) < cycle_epochs // 2:
        with pytest.raises(ConfigError, match="epochs after the start"):
            method.schedule(epochs, steps_per_epoch)
        return
    schedule = method.schedule(epochs, steps_per_epoch)
    if round(start * epochs) > 0:
        assert schedule.snapshot_steps[-1] == schedule.total_steps
        assert 0 <= schedule.start_epoch - round(start * epochs) < cycle_epochs


def test_fge_from_trained_weights_has_no_first_phase():
    assert FGE(start=0.0, cycle_epochs=4).schedule(20, 3) == TriangularCycles(20, 3, 4, 0.5, 0.01, 0)


def test_swa_rates_and_average_begin_together():
    assert SWA().schedule(20, 3) == PlateauThenConstant(20, 3, 0.2, 15, 1, False, 0.01)
    average = SWA().averager()
    assert isinstance(average, UniformAverage)
    assert [step for step in range(61) if average.is_due(step, 20, 3)] == [45, 48, 51, 54, 57, 60]


def test_each_training_has_an_average_of_its_own():
    method = EMA(decay=0.9)
    assert isinstance(method.averager(), ExponentialAverage)
    assert method.averager() is not method.averager()
    assert [one.averager() for one in (Single(), SSE(), FGE(), Checkpoints(), Boost())] == [None] * 5


def test_boost_follows_the_rates_of_snapshot_ensembles():
    assert Boost(cycles=3).schedule(12, 2) == SSE(cycles=3).schedule(12, 2)


def test_single_is_one_cycle():
    assert Single().schedule(7, 3).snapshot_steps == (21,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapshto", {}, r"unknown trainer 'snapshto': did you mean 'snapshot'\?"),
        ("single", {"cycles": 4}, "trainer 'single' has no option 'cycles'"),
        ("snapshot", {"cylces": 4}, "did you mean 'cycles'"),
        ("snapshot", {"cycles": 2.5}, "must be of type int, got 2.5"),
        ("snapshot", {"cycles": True}, "must be of type int, got True"),
        ("snapshot", {"min_factor": "low"}, "must be of type float, got 'low'"),
        ("swa", {"cyclic": 1}, "must be of type bool, got 1"),
        ("swa", {"cycle_epochs": 0}, "cycle_epochs of 1 or more, got 0"),
        ("swa", {"start": 1.0}, "from 0 to below 1, got 1.0"),
        ("fge", {"start": -0.1}, "from 0 to below 1, got -0.1"),
        ("ema", {"decay": 1.0}, r"a decay in 0..1 \(below 1\)"),
        ("ema", {"gamma": 0.0}, "gamma and power above 0"),
    ],
)
def test_what_does_not_fit_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(name, options)
