"""Methods by name, with their options checked."""

from __future__ import annotations

import dataclasses

import pytest

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.trainers import SSE, Single, describe, make_trainer


def test_methods_by_name():
    assert make_trainer("single") == Single()
    assert make_trainer("snapshot", {"cycles": 3}) == SSE(cycles=3)


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SSE().cycles = 2


def test_description_is_what_mlflow_keeps():
    assert describe(SSE(cycles=4)) == {"trainer": "snapshot", "cycles": 4, "min_factor": 0.0}


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
    ],
)
def test_what_does_not_fit_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(name, options)
