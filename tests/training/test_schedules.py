"""Schedules against values written apart, against torch's warm restarts, and as laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.schedules import CosineCheckpoints, CosineRestarts, PlateauThenConstant, TriangularCycles


@st.composite
def restarts(draw):
    epochs = draw(st.integers(1, 60))
    return CosineRestarts(epochs, draw(st.integers(1, 9)), draw(st.integers(1, epochs)), draw(st.floats(0, 1)))


def paper_rate(t: int, total: int, cycles: int) -> float:
    """Snapshot Ensembles, eq. 2, with t from 1 and a rate of 1."""
    length = math.ceil(total / cycles)
    return 0.5 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)


def test_golden_values_of_one_cycle_of_four_steps():
    schedule = CosineRestarts(epochs=2, steps_per_epoch=2, cycles=1)
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [schedule.factor(step) for step in range(4)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("epochs", "steps", "cycles"), [(200, 7, 5), (24, 62, 4), (12, 1, 12)])
def test_equals_the_paper_where_cycles_divide_the_epochs(epochs, steps, cycles):
    schedule = CosineRestarts(epochs, steps, cycles)
    total = epochs * steps
    for step in range(total):
        assert schedule.factor(step) == pytest.approx(paper_rate(step + 1, total, cycles), abs=1e-12)


@pytest.mark.parametrize(("epochs", "steps", "cycles"), [(20, 5, 4), (9, 3, 3), (6, 2, 1)])
def test_equals_torch_warm_restarts(epochs, steps, cycles):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=epochs * steps // cycles)
    schedule = CosineRestarts(epochs, steps, cycles)
    for step in range(epochs * steps):
        assert 0.3 * schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


def test_min_factor_equals_torch_eta_min():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    reference = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=6, eta_min=0.02)
    schedule = CosineRestarts(4, 3, 2, min_factor=0.1)
    for step in range(12):
        assert 0.2 * schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


def test_cycles_that_do_not_divide_the_epochs_start_high_and_end_low():
    """200 epochs in 6 cycles: the authors' own code starts a cycle at 0.0376 of 0.2 and ends the run at 0.0377."""
    schedule = CosineRestarts(200, 10, 6)
    assert [step // 10 for step in schedule.snapshot_steps] == [33, 67, 100, 133, 167, 200]
    for start, end in zip((0, *schedule.snapshot_steps), schedule.snapshot_steps, strict=False):
        assert schedule.factor(start) == 1.0
        assert schedule.factor(end - 1) < 1e-4


def test_no_cycle_is_empty_where_the_formula_leaves_one():
    """ceil(9 / 4) gives cycles of 3, 3, 3 and 0 steps."""
    schedule = CosineRestarts(9, 1, 4)
    assert schedule.snapshot_steps == (2, 4, 7, 9)


@given(restarts())
def test_laws(schedule):
    total = schedule.epochs * schedule.steps_per_epoch
    assert schedule.total_steps == total
    assert len(schedule.snapshot_steps) == schedule.cycles
    assert schedule.snapshot_steps[-1] == total
    starts = (0, *schedule.snapshot_steps[:-1])
    for start, end in zip(starts, schedule.snapshot_steps, strict=True):
        factors = [schedule.factor(step) for step in range(start, end)]
        assert factors[0] == 1.0
        assert factors == sorted(factors, reverse=True)
        assert min(factors) >= schedule.min_factor - 1e-12
        assert end % schedule.steps_per_epoch == 0
    assert [step for step in range(total + 1) if schedule.is_snapshot(step)] == list(schedule.snapshot_steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 5), r"5 cycles do not fit into 4 epochs.*cycles=4"),
        ((0, 2, 1), "at least 1, got 0, 2 and 1"),
        ((4, 2, 2, 1.5), "min_factor must lie in 0..1, got 1.5"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CosineRestarts(*arguments)


def fge_rate(iteration: int, length: int, high: float, low: float) -> float:
    """Garipov et al., section 5, from iteration 1: t(i) = (mod(i - 1, c) + 1) / c, and both branches as printed."""
    t = ((iteration - 1) % length + 1) / length
    return (1 - 2 * t) * high + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1) * high


@pytest.mark.parametrize(
    ("cycle_epochs", "collected"), [(2, (1, 3, 5, 7, 9, 11, 13, 15, 17, 19)), (4, (2, 6, 10, 14, 18))]
)
def test_fge_rates_and_collected_epochs_are_the_papers(cycle_epochs, collected):
    steps = 5
    schedule = TriangularCycles(20, steps, cycle_epochs, high=0.05, low=1e-4)
    for step in range(20 * steps):
        expected = fge_rate(step + 1, cycle_epochs * steps, 0.05, 1e-4)
        assert schedule.factor(step) == pytest.approx(expected, abs=1e-15)
    assert schedule.snapshot_epochs == collected
    # in the authors' words: after epoch e, counted from 0, with e mod c + 1 == c / 2
    assert collected == tuple(epoch + 1 for epoch in range(20) if epoch % cycle_epochs + 1 == cycle_epochs // 2)
    lowest = min(schedule.factor(step) for step in range(20 * steps))
    assert [schedule.factor(step - 1) for step in schedule.snapshot_steps] == pytest.approx([lowest] * len(collected))
    assert lowest == pytest.approx(1e-4)


def test_fge_golden_values_of_one_cycle():
    schedule = TriangularCycles(4, 2, 4, high=0.9, low=0.1)
    assert [schedule.factor(step) for step in range(8)] == pytest.approx([0.7, 0.5, 0.3, 0.1, 0.3, 0.5, 0.7, 0.9])


@pytest.mark.parametrize("cycle_epochs", [-2, 0, 1, 3, 5])
def test_fge_refuses_cycles_without_a_middle(cycle_epochs):
    with pytest.raises(ConfigError, match=f"an even number of cycle_epochs, 2 or more, got {cycle_epochs}"):
        TriangularCycles(20, 5, cycle_epochs)


def swa_rate(epoch: int, start: int, ratio: float) -> float:
    """The authors' `schedule(epoch)` with a rate of 1, written apart."""
    t = epoch / start
    if t <= 0.5:
        return 1.0
    return 1.0 - (1.0 - ratio) * (t - 0.5) / 0.4 if t <= 0.9 else ratio


def test_swa_rates_are_the_authors_at_every_epoch():
    schedule = PlateauThenConstant(300, 3, swa_lr=0.5, start_epoch=161)
    for epoch in range(300):
        assert schedule.factor(3 * epoch) == pytest.approx(swa_rate(epoch, 161, 0.5), abs=1e-12)
    assert schedule.snapshot_steps == (900,)


def test_cyclic_swa_falls_from_one_rate_to_the_other_in_each_cycle():
    schedule = PlateauThenConstant(6, 2, swa_lr=0.8, start_epoch=2, cycle_epochs=2, cyclic=True, low=0.2)
    assert [schedule.factor(step) for step in range(4, 12)] == pytest.approx([0.65, 0.5, 0.35, 0.2] * 2)


def test_checkpoints_are_counted_back_from_the_last_epoch():
    schedule = CosineCheckpoints(13, 2, every_epochs=5)
    assert schedule.snapshot_epochs == (3, 8, 13)
    plain = CosineRestarts(13, 2, 1)
    assert [schedule.factor(step) for step in range(26)] == [plain.factor(step) for step in range(26)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TriangularCycles(4, 2, 4, start_epoch=3), "need at least 2 epochs after the start, got 1 of 4"),
        (lambda: TriangularCycles(4, 2, 2, high=0.1, low=0.2), "low=0.2, high=0.1"),
        (lambda: PlateauThenConstant(4, 2, start_epoch=4), "start before the last of 4 epochs"),
        (lambda: PlateauThenConstant(4, 2, start_epoch=2, cycle_epochs=3), "cycle_epochs from 1 to the 2 epochs"),
        (lambda: PlateauThenConstant(4, 2, swa_lr=1.5), "swa_lr must lie in 0..1"),
        (lambda: PlateauThenConstant(4, 2, cyclic=True, low=0.5), "from 0 to swa_lr=0.2, got 0.5"),
        (lambda: CosineCheckpoints(4, 2, every_epochs=5), "every_epochs from 1 to the 4 epochs"),
        (lambda: CosineCheckpoints(4, 0), "at least 1, got 4 and 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
