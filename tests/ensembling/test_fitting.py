"""Fitted weights: the one minimum of a convex problem, as KKT conditions and expectation maximisation see it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.fitting import fit_weights
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX, MODES, CombinerContext, PixelSample

PIXELS = 300


def make_sample(seed: int, members: int, mode: str, classes: int = 3, pixels: int = PIXELS, share: float = 0.0):
    """Members of any quality, on one truth; in multilabel mode with a share of ignored entries."""
    rng = np.random.default_rng(seed)
    outputs = 1 if mode == "binary" else classes
    if mode == "multiclass":
        truth = rng.integers(0, classes, pixels)
        signal = np.eye(classes)[truth]
    else:
        truth = rng.integers(0, 2, (pixels, outputs))
        signal = 2.0 * truth - 1
    skill = rng.uniform(0, 3, (members, 1, 1))
    logits = skill * signal + rng.normal(0, rng.uniform(0.1, 2, (members, 1, 1)), (members, pixels, outputs))
    logits = torch.from_numpy(logits.transpose(1, 0, 2)).float()
    probabilities = logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()
    if mode == "multilabel":
        truth[rng.random(truth.shape) < share] = IGNORE_INDEX
    truth = torch.from_numpy(truth[:, 0] if mode == "binary" else truth)
    return PixelSample(probabilities, truth, mode)


def likelihood_of(sample: PixelSample) -> np.ndarray:
    """What each member gives the truth `(n, M)`, one valid entry after the other."""
    rows = []
    truths = sample.truth.reshape(len(sample.truth), -1).tolist()
    for one, truth in zip(sample.probabilities.double().numpy(), truths, strict=True):
        if sample.mode == "multiclass":
            rows.append(one[:, truth[0]])
            continue
        for channel, value in enumerate(truth):
            if value != IGNORE_INDEX:
                rows.append(one[:, channel] if value else 1 - one[:, channel])
    return np.array(rows)


def loss_of(weights, likelihood) -> float:
    return -np.log(likelihood @ np.asarray(weights)).mean()


@st.composite
def samples(draw):
    seed, members, mode = draw(st.integers(0, 10**6)), draw(st.integers(1, 8)), draw(st.sampled_from(MODES))
    return make_sample(seed, members, mode, share=draw(st.sampled_from([0, 0.4])))


@given(samples())
@settings(max_examples=40)
def test_no_weight_can_move_and_lower_the_loss(sample):
    weights = np.array(fit_weights(sample))
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    likelihood = likelihood_of(sample)
    gain = (likelihood / (likelihood @ weights)[:, None]).mean(axis=0)  # minus the gradient; its multiplier is 1
    np.testing.assert_allclose(gain[weights > 1e-3], 1, atol=2e-4)
    assert gain.max() < 1 + 2e-4


@given(samples())
@settings(max_examples=15)
def test_expectation_maximisation_finds_nothing_better(sample):
    likelihood = likelihood_of(sample)
    weights = np.full(likelihood.shape[1], 1 / likelihood.shape[1])
    for _ in range(2000):
        shares = likelihood * weights
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    found = fit_weights(sample)
    assert loss_of(found, likelihood) == pytest.approx(loss_of(weights, likelihood), abs=1e-3)
    assert loss_of(found, likelihood) <= loss_of(weights, likelihood) + 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("members", [1, 2, 20])
def test_fitted_weights_are_never_worse_than_equal_ones_or_one_member(mode, members):
    sample = make_sample(7, members, mode)
    likelihood = likelihood_of(sample)
    fitted = loss_of(fit_weights(sample), likelihood)
    for other in (*np.eye(members), np.full(members, 1 / members)):
        assert fitted <= loss_of(other, likelihood) + 1e-7


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_that_of_the_weighted_mean(mode):
    sample = make_sample(3, 4, mode)
    weights = fit_weights(sample)
    mean = Mean(CombinerContext(mode))
    for member, weight in enumerate(weights):
        mean.update(sample.probabilities[:, member, :, None, None], weight)
    alone = PixelSample(mean.compute()[:, None, :, 0, 0], sample.truth, mode)
    combined = -np.log(likelihood_of(alone)).mean()
    assert combined == pytest.approx(loss_of(weights, likelihood_of(sample)), abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_member_gets_nothing_and_copies_of_a_good_one_share(mode):
    sample = make_sample(1, 1, mode)
    if mode == "multiclass":
        truth = torch.nn.functional.one_hot(sample.truth, 3)[:, None].float()
        good, bad = 0.8 * truth + 0.2 / 3, 0.1 * truth + 0.9 / 3
    else:
        truth = sample.truth.reshape(PIXELS, 1, -1).float()
        good, bad = 0.1 + 0.8 * truth, 0.55 - 0.1 * truth
    weights = fit_weights(PixelSample(torch.cat([good, bad, good], dim=1), sample.truth, mode))
    assert weights[1] == 0
    assert weights[0] + weights[2] == pytest.approx(1)


def test_ignored_channels_take_no_part():
    sample = make_sample(5, 3, "multilabel", share=0.5)
    ignored = (sample.truth == IGNORE_INDEX)[:, None, :]
    assert 0.3 < ignored.float().mean() < 0.7
    garbage = torch.rand(sample.probabilities.shape, generator=torch.Generator().manual_seed(0))
    other = PixelSample(torch.where(ignored, garbage, sample.probabilities), sample.truth, "multilabel")
    assert fit_weights(other) == fit_weights(sample)


def test_multilabel_is_binary_over_all_valid_pairs():
    sample = make_sample(9, 3, "multilabel", classes=4, share=0.3)
    valid = sample.truth != IGNORE_INDEX
    pairs = sample.probabilities.transpose(1, 2)[valid]
    binary = PixelSample(pairs[..., None], sample.truth[valid], "binary")
    np.testing.assert_allclose(fit_weights(sample), fit_weights(binary), atol=1e-6)


@given(st.integers(0, 100), st.sampled_from(MODES), st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_weights_follow_their_members(seed, mode, random):
    sample = make_sample(seed, 4, mode)
    order = [0, 1, 2, 3]
    random.shuffle(order)
    shuffled = PixelSample(sample.probabilities[:, order], sample.truth, mode)
    np.testing.assert_allclose(fit_weights(shuffled), np.array(fit_weights(sample))[order], atol=2e-3)


def test_the_same_sample_gives_the_same_weights():
    assert fit_weights(make_sample(2, 5, "multiclass")) == fit_weights(make_sample(2, 5, "multiclass"))


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_probabilities_of_0_and_1_are_survived(mode):
    """A member that is sure and wrong once would have an infinite loss alone."""
    outputs = 1 if mode == "binary" else 2
    truth = torch.ones(50, outputs, dtype=torch.int64)
    sure = torch.ones(50, outputs)
    sure[0] = 0
    sample = PixelSample(torch.stack([sure, torch.full_like(sure, 0.5)], dim=1), truth.squeeze(1), mode)
    weights = fit_weights(sample)
    assert weights == pytest.approx([0.96, 0.04], abs=1e-3)  # 49 / (1 + w) = 1 / (1 - w)


@pytest.mark.parametrize(("mode", "truth"), [("binary", (0,)), ("multiclass", (0,)), ("multilabel", (0, 3))])
def test_no_pixels_are_an_error(mode, truth):
    outputs = 1 if mode == "binary" else 3
    sample = PixelSample(torch.zeros(0, 2, outputs), torch.zeros(truth, dtype=torch.int64), mode)
    with pytest.raises(ConfigError, match="expected pixels to fit weights on, got none: are all of them ignored"):
        fit_weights(sample)


def test_only_ignored_channels_are_no_pixels():
    sample = PixelSample(torch.rand(4, 2, 3), torch.full((4, 3), IGNORE_INDEX), "multilabel")
    with pytest.raises(ConfigError, match="expected pixels to fit weights on, got none"):
        fit_weights(sample)
