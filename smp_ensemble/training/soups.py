"""Soups: which models to average, decided by what the average scores on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.weights import average_weights, check_same_tensors, is_averaged

if TYPE_CHECKING:
    from torch import nn

Load = Callable[[int], "nn.Module"]
"""Gives ingredient i, counted from 0: a new module each time, which the soup may change."""

Judge = Callable[["nn.Module", tuple[int, ...]], float]
"""The held-out score, greater is better, of the average of the ingredients with these indices.

It may change what is no weight: a judge refreshes batch norm before it scores an average.
"""


@dataclass(frozen=True)
class Soup:
    """An average of models and how it came about.

    Attributes:
        network: Holds the average, as it was scored.
        kept: Indices of its ingredients.
        score: The average's own score.
        trials: For each ingredient the score of the average that it was tried in; None: not tried alone.
    """

    network: nn.Module
    kept: tuple[int, ...]
    score: float
    trials: tuple[float | None, ...]


def greedy_soup(count: int, load: Load, judge: Judge) -> Soup:
    """Adds ingredients in turn, and keeps each one with which the average does not get worse.

    Memory holds two models: the soup so far, and the one that is tried.

    Args:
        count: Number of ingredients; they come in the order of their own held-out scores, best first.
        load: Gives them.
        judge: Scores averages; the first ingredient is scored alone, as it is.

    Raises:
        ConfigError: No ingredients.
        NetworkError: Ingredients of different architectures.

    References:
        Wortsman et al., ICML 2022, arXiv:2203.05482, recipe 1: an ingredient stays if accuracy is not lower with it.
    """
    _check(count)
    soup = load(0)
    kept: tuple[int, ...] = (0,)
    best = judge(soup, kept)
    trials = [best]
    for index in range(1, count):
        trial = load(index)
        _stir(trial, soup, 1 / (len(kept) + 1), f"ingredient {index}")
        value = judge(trial, (*kept, index))
        trials.append(value)
        if value >= best:
            soup, best, kept = trial, value, (*kept, index)
        del trial  # before the next one is loaded
    return Soup(soup, kept, best, tuple(trials))


def uniform_soup(count: int, load: Load, judge: Judge) -> Soup:
    """The average of all ingredients, each with the same weight.

    Memory holds two models: the average, and the one that comes.

    Args:
        count: Number of ingredients.
        load: Gives them.
        judge: Scores the average.

    Raises:
        ConfigError: No ingredients.
        NetworkError: Ingredients of different architectures.

    References:
        Wortsman et al., ICML 2022, arXiv:2203.05482: uniform soup.
    """
    _check(count)
    weights = average_weights(load(index) for index in range(count))
    soup = load(0)
    soup.load_state_dict(weights)
    del weights  # before the judge needs room
    kept = tuple(range(count))
    value = judge(soup, kept)
    return Soup(soup, kept, value, (*[None] * (count - 1), value))


@torch.no_grad()
def _stir(trial: nn.Module, soup: nn.Module, share: float, name: str) -> None:
    """Makes `trial` the average of itself, weighing `share`, and `soup`, in place; whole numbers become the soup's."""
    new, old = trial.state_dict(), soup.state_dict()
    check_same_tensors(old, new, name, "the soup")
    for key, value in new.items():
        if is_averaged(value):
            value.copy_(torch.lerp(old[key].to(value), value, share))
        elif isinstance(value, torch.Tensor):
            value.copy_(old[key])


def _check(count: int) -> None:
    if count < 1:
        raise ConfigError(f"expected at least one ingredient for a soup, got {count}")
