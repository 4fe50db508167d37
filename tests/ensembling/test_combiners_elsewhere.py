"""The same combinations as scikit-learn's and MONAI's, but for ties, where theirs go to the lowest class."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import MeanEnsemble, VoteEnsemble
from sklearn.datasets import make_blobs
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from smp_ensemble.ensembling.ensemble import Ensemble

WEIGHTS = [None, [3, 1, 1, 2], [0.5, 2.0, 0.25, 1.0]]
ESTIMATORS = [
    ("linear", LogisticRegression()),
    ("bayes", GaussianNB()),
    ("stump", DecisionTreeClassifier(max_depth=1, random_state=0)),
    ("tree", DecisionTreeClassifier(max_depth=4, random_state=0)),
]


def make_ensemble(mode: str, combiner: str, weights=None) -> Ensemble:
    return Ensemble([nn.Identity()] * 4, mode=mode, combiner=combiner, weights=weights)


def planes(probabilities) -> torch.Tensor:
    """Samples in rows, `(n, K)`, as one image's pixels `(1, K, 1, n)`."""
    return torch.as_tensor(np.asarray(probabilities), dtype=torch.float32).T[None, :, None]


def fitted(classes: int, voting: str, weights) -> tuple[VotingClassifier, np.ndarray, torch.Tensor]:
    """A voting classifier, new points, and what its members say of them, `(M, 1, K, 1, n)`."""
    points, truth = make_blobs(400, centers=classes, cluster_std=6.0, random_state=0)
    model = VotingClassifier(ESTIMATORS, voting=voting, weights=weights).fit(points[:200], truth[:200])
    stack = torch.stack([planes(one.predict_proba(points[200:])) for one in model.estimators_])
    return model, points[200:], stack


def votes_of(stack: torch.Tensor, weights) -> np.ndarray:
    """Shares of votes `(n, K)`."""
    votes = nn.functional.one_hot(stack.argmax(dim=2), stack.shape[2])[:, 0, 0].double().numpy()
    return np.average(votes, axis=0, weights=weights)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("combiner", ["mean", "weighted"])
def test_the_mean_is_scikit_learns_soft_vote(combiner, classes, weights):
    model, points, stack = fitted(classes, "soft", weights)
    ensemble = make_ensemble("multiclass", combiner, weights)
    found = ensemble.combine(iter(stack))
    np.testing.assert_allclose(found[0, :, 0].T.numpy(), model.predict_proba(points), atol=1e-6)
    np.testing.assert_array_equal(ensemble.decide(found)[0, 0].numpy(), model.predict(points))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_vote_is_scikit_learns_hard_vote_but_for_ties(classes, weights):
    model, points, stack = fitted(classes, "hard", weights)
    ensemble = make_ensemble("multiclass", "vote", weights)
    found = ensemble.decide(ensemble.combine(iter(stack)))[0, 0].numpy()
    shares = np.sort(votes_of(stack, weights), axis=1)
    clear = shares[:, -1] - shares[:, -2] > 1e-6
    assert clear.sum() > 100
    np.testing.assert_array_equal(found[clear], model.predict(points)[clear])
    if weights is None:
        assert (found != model.predict(points)).any()  # ties are not rare


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_the_mean_is_monais(mode, weights):
    logits = torch.randn(4, 2, 1 if mode == "binary" else 3, 5, 6, generator=torch.Generator().manual_seed(0))
    stack = logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()
    expected = MeanEnsemble(weights=weights)(stack)
    torch.testing.assert_close(make_ensemble(mode, "mean", weights).combine(iter(stack)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [None, [3, 1, 1, 2]])
def test_the_vote_is_monais_but_for_ties(weights):
    stack = torch.randn(4, 1, 3, 20, 20, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    ensemble = make_ensemble("multiclass", "vote", weights)
    found = ensemble.decide(ensemble.combine(iter(stack)))
    voters = torch.tensor(weights or [1] * 4)
    chosen = stack.argmax(dim=2).repeat_interleave(voters, dim=0)
    expected = VoteEnsemble(num_classes=3)(list(chosen))
    best, second = nn.functional.one_hot(chosen, 3).sum(dim=0).topk(2).values.unbind(-1)
    clear = best > second
    assert 0.5 < clear.float().mean() < 1
    assert torch.equal(found[clear], expected.to(torch.uint8)[clear])


def test_the_binary_vote_is_monais_but_for_ties():
    stack = torch.rand(4, 1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    ensemble = make_ensemble("binary", "vote")
    found = ensemble.decide(ensemble.combine(iter(stack)))
    votes = (stack >= 0.5).float()
    expected = VoteEnsemble()(list(votes))[:, 0]
    tied = votes.mean(dim=0)[:, 0] == 0.5
    assert torch.equal(found[~tied], expected.to(torch.uint8)[~tied])
    assert (expected[tied] == 0).all()  # MONAI rounds 0.5 to 0
    assert 0.1 < found[tied].float().mean() < 0.9
