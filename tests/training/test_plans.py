from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.plans import PlannedTraining, make_plan


def test_without_a_plan_there_is_one_training():
    assert make_plan(seed=4) == (PlannedTraining("seed-4", 4, None),)


@given(st.integers(2, 9), st.integers(0, 99), st.sampled_from(["folds", "bootstrap"]))
def test_each_part_trains_once_and_with_one_seed(parts, seed, kind):
    plan = make_plan(**{kind: parts}, seed=seed)
    assert [one.fold for one in plan] == list(range(parts))
    assert {one.seed for one in plan} == {seed}
    assert len({one.label for one in plan}) == parts
    for index in range(parts):
        assert make_plan(**{kind: parts}, fold=index, seed=seed) == (plan[index],)


@given(st.integers(1, 9), st.integers(0, 99))
def test_seeds_are_counted_up_and_each_is_a_training_of_its_own(seeds, seed):
    plan = make_plan(seeds=seeds, seed=seed)
    assert [one.seed for one in plan] == list(range(seed, seed + seeds))
    assert {one.fold for one in plan} == {None}
    for one in plan:
        assert make_plan(seed=one.seed) == (one,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 5, "seeds": 2}, "folds=5 and seeds=2: expected one of them; choose one"),
        ({"folds": 5, "bootstrap": 3, "seeds": 2}, "folds=5 and bootstrap=3 and seeds=2: expected one of them"),
        ({"bootstrap": 3, "folds": 5, "fold": 0}, "folds=5 and bootstrap=3: expected one of them"),
        ({"seeds": 2, "fold": 1}, "fold=1 is one of what: pass folds=N or bootstrap=N too"),
        ({"fold": 1}, "fold=1 is one of what"),
        ({"folds": 1}, "folds: expected at least 2, found 1"),
        ({"folds": 3, "fold": 3}, r"fold: expected 0\.\.2 for 3 folds, found 3"),
        ({"bootstrap": 3, "fold": -1}, r"fold: expected 0\.\.2 for 3 bootstrap samples, found -1"),
        ({"seeds": 0}, "seeds: expected at least 1, found 0"),
    ],
)
def test_plans_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(**options)
