"""Soups of models that hold one number, worked out by hand; and two models in memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.training.soups import greedy_soup, uniform_soup
from smp_ensemble.training.weights import average_weights


class Number(nn.Module):
    """A model with one weight and one counter."""

    def __init__(self, value: float, batches: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("batches", torch.tensor(batches))


def loader_of(values):
    return lambda index: Number(values[index], batches=index)


def near(target: float):
    """Scores a number by its distance from the target."""
    return lambda network, kept: -abs(network.weight.item() - target)


def test_a_greedy_soup_worked_out_by_hand():
    # Target 5, best first. 4 alone: -1. With 7: 5.5, -0.5, kept. With 1: (4 + 7 + 1) / 3 = 4, -1, not kept.
    # With 10: (4 + 7 + 10) / 3 = 7, -2, not kept. With 4: (4 + 7 + 4) / 3 = 5, 0, kept.
    soup = greedy_soup(5, loader_of([4.0, 7.0, 1.0, 10.0, 4.0]), near(5.0))
    assert soup.kept == (0, 1, 4)
    assert soup.trials == pytest.approx((-1, -0.5, -1, -2, 0))
    assert soup.score == pytest.approx(0)
    assert soup.network.weight.item() == pytest.approx(5.0)
    assert soup.network.batches.item() == 0  # the first one's


def test_a_tie_keeps_and_a_worse_score_does_not():
    assert greedy_soup(3, loader_of([3.0, 3.0, 3.0]), near(0.0)).kept == (0, 1, 2)
    assert greedy_soup(3, loader_of([3.0, 3.1, 3.2]), near(0.0)).kept == (0,)
    # 4 and 6 are both at distance 1 from 5: their mean is better. -1 at 4 stays at -1 with (4 + 8) / 2 = 6: a tie.
    assert greedy_soup(2, loader_of([4.0, 8.0]), near(5.0)).kept == (0, 1)


def test_the_judge_hears_which_ingredients_it_scores():
    heard = []

    def judge(network, kept):
        heard.append(kept)
        return {(0, 1): 2.0, (0, 1, 3): 1.0}.get(kept, 0.5 if len(kept) == 1 else 0.0)

    greedy_soup(4, loader_of([0.0] * 4), judge)
    assert heard == [(0,), (0, 1), (0, 1, 2), (0, 1, 3)]


def test_what_the_judge_refreshes_is_what_the_soup_holds():
    class Refreshed(Number):
        def __init__(self, value):
            super().__init__(value)
            self.register_buffer("mean", torch.tensor([100.0]))

    def judge(network, kept):
        if len(kept) > 1:
            network.mean.fill_(network.weight.item() * 10)
        return float(len(kept))

    soup = greedy_soup(3, lambda index: Refreshed(float(index)), judge)
    assert soup.network.mean.item() == pytest.approx(10.0)


values = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8)


@given(values, st.floats(-10, 10))
def test_a_greedy_soup_is_the_average_of_what_it_kept_and_no_worse_than_the_first(numbers, target):
    soup = greedy_soup(len(numbers), loader_of(numbers), near(target))
    expected = average_weights(Number(numbers[index]) for index in soup.kept)
    assert torch.equal(soup.network.weight.detach(), expected["weight"])
    assert soup.score >= soup.trials[0]
    assert soup.score == soup.trials[soup.kept[-1]]
    assert soup.kept[0] == 0


@given(values)
def test_a_uniform_soup_is_the_mean(numbers):
    soup = uniform_soup(len(numbers), loader_of(numbers), near(0.0))
    assert soup.network.weight.item() == pytest.approx(float(np.mean(numbers)), abs=1e-5)
    assert soup.kept == tuple(range(len(numbers)))
    assert soup.trials[:-1] == (None,) * (len(numbers) - 1)
    assert soup.trials[-1] == soup.score == near(0.0)(soup.network, ())


@pytest.mark.parametrize("make", [greedy_soup, uniform_soup])
def test_two_models_in_memory(make):
    """When a model is loaded, there is at most one other."""
    alive: list[weakref.ref] = []
    most = 0

    def load(index):
        nonlocal most
        network = Number(float(index))
        alive.append(weakref.ref(network))
        most = max(most, sum(one() is not None for one in alive))
        return network

    gc.disable()
    try:
        soup = make(6, load, lambda network, kept: -float(len(kept) % 2))
    finally:
        gc.enable()
    assert most <= 2
    assert soup.network is not None


@pytest.mark.parametrize("make", [greedy_soup, uniform_soup])
def test_ingredients_of_another_shape_are_refused(make):
    def load(index):
        return nn.Linear(2, 1 + index)

    with pytest.raises(NetworkError, match=r"tensor 'weight' has shape \(1, 2\) in .*, \(2, 2\) in"):
        make(2, load, lambda network, kept: 0.0)
    with pytest.raises(ConfigError, match="at least one ingredient"):
        make(0, load, lambda network, kept: 0.0)
