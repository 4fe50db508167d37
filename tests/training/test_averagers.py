"""Running averages against torch's own, against the mean of what was stored, and by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.averagers import ExponentialAverage, UniformAverage, swa_start_epoch


class Scalar(nn.Module):
    """One weight, and a counter that is no weight."""

    def __init__(self, value: float, seen: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(value)))
        self.register_buffer("seen", torch.tensor(seen))


def networks(count: int, seed: int = 0):
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)) for _ in range(count)]


def test_the_mean_of_0_1_2_3_is_1_5():
    average = UniformAverage()
    for step, value in enumerate((0, 1, 2, 3), 1):
        average.update(Scalar(value), step)
    assert average.weights()["weight"].item() == 1.5


def test_a_uniform_average_is_torchs_and_the_mean_of_what_was_stored():
    models = networks(5)
    average, reference = UniformAverage(), AveragedModel(models[0])
    for step, model in enumerate(models):
        average.update(model, step)
        reference.update_parameters(model)
    stored = torch.stack([torch.nn.utils.parameters_to_vector(model.parameters()) for model in models])
    found = torch.cat([average.weights()[name].flatten() for name, _ in models[0].named_parameters()])
    torchs = torch.nn.utils.parameters_to_vector(reference.module.parameters())
    torch.testing.assert_close(found, torchs.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, stored.double().mean(dim=0).float().detach(), rtol=0, atol=1e-6)


def test_an_exponential_average_without_warm_up_is_torchs():
    models = networks(6)
    average = ExponentialAverage(decay=0.9, gamma=1e-9)  # a warm-up that is over at once, but for the first update
    reference = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step, model in enumerate(models):
        average.update(model, step)
        reference.update_parameters(model)
    for name, parameter in reference.module.named_parameters():
        torch.testing.assert_close(average.weights()[name], parameter.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("power", [2 / 3, 0.75])
def test_the_warm_up_is_timms(power):
    average = ExponentialAverage(decay=0.99, gamma=2.0, power=power)
    reference = ModelEmaV3(Scalar(0), decay=0.99, use_warmup=True, warmup_gamma=2.0, warmup_power=power)
    for update in range(1, 2000, 7):
        # timm counts steps from 1 and lets the first one copy
        assert average.decay_at(update) == pytest.approx(reference.get_decay(update + 1), abs=1e-12)


def test_the_first_update_copies():
    average = ExponentialAverage()
    average.update(Scalar(3, seen=2), 1)
    assert average.weights()["weight"].item() == 3
    assert average.decay_at(0) == 0


@pytest.mark.parametrize("make", [UniformAverage, ExponentialAverage])
def test_counters_are_copied_and_stay_whole_numbers(make):
    average = make()
    for step in (1, 2, 3):
        average.update(Scalar(step, seen=5 * step), step)
    assert average.weights()["seen"].dtype == torch.int64
    assert average.weights()["seen"].item() == 15


@pytest.mark.parametrize("make", [UniformAverage, ExponentialAverage])
def test_the_average_of_equal_weights_is_these_weights_bit_for_bit(make):
    (model,) = networks(1)
    average = make()
    for step in range(7):
        average.update(model, step)
    for name, tensor in model.state_dict().items():
        assert torch.equal(average.weights()[name], tensor)


@pytest.mark.parametrize("make", [UniformAverage, ExponentialAverage])
def test_a_resumed_average_goes_on_as_if_nothing_had_happened(make):
    models = networks(6)
    whole, first, second = make(), make(), make()
    for step, model in enumerate(models):
        whole.update(model, step)
    for step, model in enumerate(models[:3]):
        first.update(model, step)
    second.load_state_dict(first.state_dict())
    for step, model in enumerate(models[3:], 3):
        second.update(model, step)
    assert second.count == 6
    for name, tensor in whole.weights().items():
        assert torch.equal(second.weights()[name], tensor)


def test_the_average_is_nobodys_alias():
    model = Scalar(1)
    average = UniformAverage()
    average.update(model, 1)
    with torch.no_grad():
        model.weight.fill_(9)
    assert average.weights()["weight"].item() == 1


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one network, got none"):
        UniformAverage().weights()


@given(st.floats(0, 0.99), st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_the_last_epoch_is_always_in_the_average(start, epochs, cycle_epochs, steps_per_epoch):
    cycle_epochs = min(cycle_epochs, epochs)
    average = UniformAverage(start, cycle_epochs)
    total = epochs * steps_per_epoch
    due = [step for step in range(total + 1) if average.is_due(step, epochs, steps_per_epoch)]
    assert due[-1] == total
    assert due[0] > 0
    assert all(step % steps_per_epoch == 0 for step in due)
    assert {later - earlier for earlier, later in pairwise(due)} <= {cycle_epochs * steps_per_epoch}
    assert due[0] >= swa_start_epoch(start, epochs, cycle_epochs) * steps_per_epoch
    assert due[0] / steps_per_epoch <= max(start * epochs + cycle_epochs, 1)
    # The first epoch from the start on that is whole cycles before the last one; at least one cycle is averaged.
    earliest = min(round(start * epochs), epochs - cycle_epochs)
    first = next(e for e in range(1, epochs + 1) if e >= earliest and (epochs - e) % cycle_epochs == 0)
    assert due[0] == first * steps_per_epoch


def test_an_exponential_average_takes_every_step():
    assert all(ExponentialAverage().is_due(step, 4, 3) for step in range(1, 13))
