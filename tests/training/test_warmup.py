"""A warm-up changes the first rates and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.schedules import CosineRestarts
from smp_ensemble.training.warmup import Warmup, warmed_up


@given(st.integers(0, 11))
def test_the_first_rates_climb_and_all_others_stay(warmup_steps):
    plain = CosineRestarts(6, 4, 2)
    schedule = Warmup(plain, warmup_steps)
    assert schedule.snapshot_steps == plain.snapshot_steps
    assert schedule.total_steps == 24
    for step in range(24):
        expected = plain.factor(step) * min(1.0, (step + 1) / max(warmup_steps, 1))
        assert schedule.factor(step) == pytest.approx(expected, abs=1e-15)
        assert schedule.is_snapshot(step) == plain.is_snapshot(step)


@pytest.mark.parametrize("warmup_steps", [-1, 12, 30])
def test_a_warm_up_that_reaches_the_first_snapshot_is_refused(warmup_steps):
    with pytest.raises(ConfigError, match=f"first snapshot after 12 steps, got {warmup_steps}"):
        Warmup(CosineRestarts(6, 4, 2), warmup_steps)


def test_a_warm_up_in_epochs_is_rounded_to_steps_and_none_changes_nothing():
    plain = CosineRestarts(6, 4, 2)
    assert warmed_up(plain, 1.4, 4) == Warmup(plain, 6)
    assert warmed_up(plain, 0.1, 4) is plain
    with pytest.raises(ConfigError, match="first snapshot after 12 steps, got -4"):
        warmed_up(plain, -1.0, 4)
