"""Votes, ties and rejected pixels, against counting by hand in whole numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.typing import IGNORE_INDEX

WEIGHTS = [None, [2, 1, 1, 3, 0, 1], [1, 1, 2, 2, 3, 3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [7, 1, 1, 1, 1, 1]]


def make_ensemble(members: int, mode: str, combiner: str, **options) -> Ensemble:
    return Ensemble([nn.Identity()] * members, mode=mode, combiner=combiner, **options)


def pool(ensemble: Ensemble, stack) -> torch.Tensor:
    return ensemble.pool(iter(torch.as_tensor(stack, dtype=torch.float32)))


def mask_of(ensemble: Ensemble, stack, **options) -> np.ndarray:
    return ensemble.decide(pool(ensemble, stack), **options).numpy()


def voters(members: int, threshold: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every pattern of votes for and against, `(M, 2**M)`, and probabilities that cast them."""
    votes = np.array(list(itertools.product([0, 1], repeat=members))).T
    sure = np.random.default_rng(seed).uniform(0, 0.99, votes.shape)
    return votes, np.where(votes == 1, threshold + (1 - threshold) * (0.01 + sure), threshold * sure)


def choosers(members: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every pattern of chosen classes, `(M, 3**M)`, and probabilities `(M, K, 3**M)` that choose them."""
    chosen = np.array(list(itertools.product(range(classes), repeat=members))).T
    parts = np.random.default_rng(seed).uniform(0.01, 1, (members, classes, chosen.shape[1]))
    parts[np.arange(members)[:, None], chosen, np.arange(chosen.shape[1])] = 1.1
    return chosen, parts / parts.sum(axis=1, keepdims=True)


def tenths(weights: list[float] | None, members: int) -> np.ndarray:
    """Weights as whole numbers, so that sums are exact."""
    return np.rint(10 * np.array(weights or [1] * 6)[:members]).astype(int)


def given_weights(weights: list[float] | None, members: int) -> list[float] | None:
    return weights and weights[:members]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("members", range(1, 7))
def test_binary_votes_by_hand(members, threshold, weights):
    votes, probabilities = voters(members, threshold)
    whole = tenths(weights, members)
    double = 2 * whole @ votes - whole.sum()  # above 0: more votes for than against
    mean = np.average(probabilities, axis=0, weights=whole)
    plurality = np.where(double == 0, mean >= threshold, double > 0)
    stack = probabilities[:, None, None, None, :]
    options = {"threshold": threshold, "weights": given_weights(weights, members)}
    found = mask_of(make_ensemble(members, "binary", "vote", **options), stack)[0, 0]
    clear = (double != 0) | (abs(mean - threshold) > 1e-3)
    assert (found == plurality)[clear].all()
    majority = make_ensemble(members, "binary", "majority", **options)
    np.testing.assert_array_equal(mask_of(majority, stack)[0, 0], np.where(double == 0, IGNORE_INDEX, double > 0))
    np.testing.assert_array_equal(mask_of(majority, stack, reject=0)[0, 0], found)
    np.testing.assert_array_equal(mask_of(majority, stack, reject=0.9 / (members + 1))[0, 0], found)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("members", range(1, 7))
def test_multiclass_votes_by_hand(members, weights):
    chosen, probabilities = choosers(members)
    whole = tenths(weights, members)
    votes = np.zeros((3, chosen.shape[1]), dtype=int)
    for one, weight in zip(chosen, whole, strict=True):
        np.add.at(votes, (one, np.arange(len(one))), weight)
    mean = np.average(probabilities, axis=0, weights=whole)
    tied = votes == votes.max(axis=0)
    winner = np.where(tied, mean, -1).argmax(axis=0)
    margin = np.sort(np.where(tied, mean, -1), axis=0)
    clear = margin[-1] - margin[-2] > 1e-3
    stack = probabilities[:, None, :, None, :]
    options = {"weights": given_weights(weights, members)}
    found = mask_of(make_ensemble(members, "multiclass", "vote", **options), stack)[0, 0]
    assert clear.mean() > 0.8
    assert (found == winner)[clear].all()
    majority = make_ensemble(members, "multiclass", "majority", **options)
    absolute = 2 * votes.max(axis=0) > whole.sum()
    np.testing.assert_array_equal(mask_of(majority, stack)[0, 0], np.where(absolute, votes.argmax(axis=0), 255))
    np.testing.assert_array_equal(mask_of(majority, stack, reject=0)[0, 0], found)
    if weights is None:
        np.testing.assert_array_equal(mask_of(majority, stack, reject=0.9 / (members + 1))[0, 0], found)


@pytest.mark.parametrize("name", ["vote", "majority"])
def test_multilabel_votes_are_binary_ones_in_each_channel(name):
    _, probabilities = voters(4, 0.3)
    stack = np.stack([probabilities, probabilities[::-1], probabilities[:, ::-1]], axis=1)[:, None, :, None, :]
    found = mask_of(make_ensemble(4, "multilabel", name, threshold=0.3), stack)
    for channel in range(3):
        alone = mask_of(make_ensemble(4, "binary", name, threshold=0.3), stack[:, :, [channel]])
        np.testing.assert_array_equal(found[:, channel], alone)


@pytest.mark.parametrize(("reject", "accepted"), [(0.5, 3), (0.6, 4), (0.79, 4), (0.8, 5), (0.99, 5)])
def test_any_other_share_may_be_asked_for(reject, accepted):
    votes, probabilities = voters(5, 0.5)
    found = mask_of(make_ensemble(5, "binary", "vote", reject=reject), probabilities[:, None, None, None, :])[0, 0]
    most = np.maximum(votes.sum(axis=0), 5 - votes.sum(axis=0))
    np.testing.assert_array_equal(found != IGNORE_INDEX, most >= accepted)


@pytest.mark.parametrize(("pair", "expected"), [((0.9, 0.2), 1), ((0.6, 0.1), 0), ((0.75, 0.25), 1)])
def test_a_tie_of_two_goes_by_the_mean_and_not_to_the_background(pair, expected):
    stack = torch.tensor(pair).view(2, 1, 1, 1, 1)
    assert mask_of(make_ensemble(2, "binary", "vote"), stack).item() == expected
    rounded = torch.round((stack >= 0.5).float().mean(dim=0)).item()
    assert rounded == 0  # what rounding the share would give, whatever the probabilities


@pytest.mark.parametrize(("pair", "expected"), [((0.9, 0.6), 1), ((0.75, 0.6), 0), ((0.8, 0.6), 1)])
def test_the_mean_is_held_against_the_threshold_that_members_vote_with(pair, expected):
    stack = torch.tensor(pair).view(2, 1, 1, 1, 1)
    assert mask_of(make_ensemble(2, "binary", "vote", threshold=0.7), stack).item() == expected


def test_a_tie_of_classes_goes_by_the_mean_and_not_to_the_lowest():
    stack = torch.tensor([[0.5, 0.1, 0.4], [0.3, 0.0, 0.7]]).view(2, 1, 3, 1, 1)
    assert mask_of(make_ensemble(2, "multiclass", "vote"), stack).item() == 2
    assert torch.mode(stack.argmax(dim=2).flatten()).values.item() == 0
    assert mask_of(make_ensemble(2, "multiclass", "majority"), stack).item() == IGNORE_INDEX


def test_one_vote_each_for_three_classes():
    stack = torch.tensor([[0.4, 0.3, 0.3], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]]).view(3, 1, 3, 1, 1)
    assert mask_of(make_ensemble(3, "multiclass", "vote"), stack).item() == 1
    assert mask_of(make_ensemble(3, "multiclass", "majority"), stack).item() == IGNORE_INDEX


def test_two_votes_against_two():
    stack = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]]).view(4, 1, 2, 1, 1)
    assert mask_of(make_ensemble(4, "multiclass", "vote"), stack).item() == 1
    assert mask_of(make_ensemble(4, "multiclass", "majority"), stack).item() == IGNORE_INDEX


@pytest.mark.parametrize("members", [101, 499])
def test_one_vote_more_wins_against_any_mean(members):
    """Barely for, by one vote more; surely against."""
    half = members // 2
    stack = torch.tensor([0.5] * (half + 1) + [0.0] * half).view(members, 1, 1, 1, 1)
    for name in ("vote", "majority"):
        assert mask_of(make_ensemble(members, "binary", name), stack).item() == 1


def test_shares_are_near_the_votes_and_cut_at_one_half_whatever_the_threshold():
    ensemble = make_ensemble(4, "binary", "vote", threshold=0.9)
    shares = pool(ensemble, torch.tensor([0.95, 0.95, 0.95, 0.0]).view(4, 1, 1, 1, 1))
    assert shares.item() == pytest.approx(0.75, abs=1e-3)
    assert ensemble.decide(shares).item() == 1
    assert ensemble.decide(torch.full_like(shares, 0.6)).item() == 1


@given(st.integers(1, 6), st.integers(0, 100), st.floats(0.01, 0.98), st.floats(0, 0.98))
def test_what_is_rejected_grows_with_the_share_that_is_asked_for(members, seed, first, second):
    _, probabilities = choosers(members, 3, seed)
    ensemble = make_ensemble(members, "multiclass", "vote")
    shares = pool(ensemble, probabilities[:, None, :, None, :])
    less, more = (ensemble.decide(shares, reject=share) for share in sorted([first, second]))
    assert (more[less == IGNORE_INDEX] == IGNORE_INDEX).all()
    kept = more != IGNORE_INDEX
    assert torch.equal(more[kept], ensemble.decide(shares)[kept])
