"""Stacking: it streams, it is scikit-learn's logistic regression, and it knows whom to trust."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.stacking import L2, Stacking
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX, MODES, CombinerContext, FittedCombiner, PixelSample

SHAPE = (2, 3, 4, 5)


def make_sample(
    seed: int, mode: str, sharpness=(2.0, 0.5, 1.0), *, pixels: int = 400, classes: int = 3, ignored: float = 0.0
) -> PixelSample:
    """Members that see the truth through noise; one of sharpness 0 sees nothing."""
    rng = np.random.default_rng(seed)
    if mode == "multiclass":
        truth = rng.integers(0, classes, pixels)
        signal = 2.0 * np.eye(classes)[truth] - 1
    else:
        truth = rng.integers(0, 2, (pixels, 1 if mode == "binary" else classes))
        signal = 2.0 * truth - 1
    noise = rng.normal(0, 1.5, (pixels, len(sharpness), signal.shape[1]))
    logits = torch.from_numpy(np.array(sharpness)[None, :, None] * signal[:, None] + noise)
    probabilities = logits.softmax(dim=2) if mode == "multiclass" else logits.sigmoid()
    if mode == "multilabel":
        truth[rng.random(truth.shape) < ignored] = IGNORE_INDEX
    return PixelSample(probabilities.float(), torch.from_numpy(truth[:, 0] if mode == "binary" else truth), mode)


def random_state(members: int, outputs: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(members, outputs, outputs, generator=generator),
        "bias": torch.randn(outputs, generator=generator),
    }


def combine(state, mode: str, members) -> torch.Tensor:
    combiner = Stacking(CombinerContext(mode, state=state))
    for one in members:
        combiner.update(one)
    return combiner.compute()


def predict(state, sample: PixelSample) -> np.ndarray:
    """Probabilities `(P, K)`."""
    members = sample.probabilities.transpose(0, 1)[..., None, None]
    return combine(state, sample.mode, members)[..., 0, 0].double().numpy()


def log_loss(probabilities: np.ndarray, sample: PixelSample) -> float:
    truth = sample.truth.numpy()
    if sample.mode == "multiclass":
        return -np.log(probabilities[np.arange(len(truth)), truth]).mean()
    truth = truth.reshape(probabilities.shape)
    valid = truth != IGNORE_INDEX
    return -np.log(np.where(truth == 1, probabilities, 1 - probabilities))[valid].mean()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_streaming_is_the_stacked_formula(mode, members):
    outputs = 1 if mode == "binary" else 3
    state = random_state(members, outputs)
    stack = torch.rand(members, SHAPE[0], outputs, *SHAPE[2:])
    before = stack.clone()
    found = combine(state, mode, stack)
    weight, bias = (state[name].double().numpy() for name in ("weight", "bias"))
    logits = np.einsum("mok,mnkhw->nohw", weight, stack.double().numpy()) + bias[None, :, None, None]
    if mode == "multiclass":
        exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = exponent / exponent.sum(axis=1, keepdims=True)
    else:
        expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-6)
    assert found.dtype == torch.float32
    assert torch.equal(stack, before)


def test_asking_early_is_refused_and_asking_twice_is_the_same():
    state = random_state(2, 1)
    combiner = Stacking(CombinerContext("binary", state=state))
    combiner.update(torch.rand(1, 1, 2, 2))
    with pytest.raises(ConfigError, match="was fitted for 2 members, got 1"):
        combiner.compute()
    combiner.update(torch.rand(1, 1, 2, 2))
    assert torch.equal(combiner.compute(), combiner.compute())


def test_weights_of_members_take_no_part():
    state, stack = random_state(2, 3), torch.rand(2, *SHAPE)
    weighted = Ensemble([torch.nn.Identity()] * 2, mode="multilabel", combiner="stacking", weights=[5, 1], state=state)
    torch.testing.assert_close(weighted.combine(iter(stack)), combine(state, "multilabel", stack))


@pytest.mark.parametrize("classes", [3, 6])
def test_multiclass_is_a_multinomial_logistic_regression(classes):
    sample = make_sample(0, "multiclass", classes=classes)
    features = sample.probabilities.reshape(len(sample.truth), -1).double().numpy()
    model = LogisticRegression(C=1 / (L2 * len(features)), tol=1e-9, max_iter=5000)
    model.fit(features, sample.truth.numpy())
    state = Stacking.fit(sample)
    np.testing.assert_allclose(predict(state, sample), model.predict_proba(features), atol=1e-3)
    fresh = make_sample(1, "multiclass", classes=classes)
    expected = model.predict_proba(fresh.probabilities.reshape(len(fresh.truth), -1).double().numpy())
    np.testing.assert_allclose(predict(state, fresh), expected, atol=1e-3)


def test_binary_is_a_logistic_regression():
    sample = make_sample(0, "binary")
    features = sample.probabilities[..., 0].double().numpy()
    model = LogisticRegression(C=1 / (L2 * len(features)), tol=1e-9, max_iter=5000)
    model.fit(features, sample.truth.numpy())
    state = Stacking.fit(sample)
    np.testing.assert_allclose(predict(state, sample)[:, 0], model.predict_proba(features)[:, 1], atol=1e-3)
    np.testing.assert_allclose(state["weight"].flatten().numpy(), model.coef_[0], rtol=0.01)
    assert state["bias"].item() == pytest.approx(model.intercept_[0], rel=0.01)


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_multilabel_is_one_logistic_regression_for_each_class(ignored):
    sample = make_sample(0, "multilabel", ignored=ignored)
    features = sample.probabilities.reshape(len(sample.truth), -1).double().numpy()
    found = predict(Stacking.fit(sample), sample)
    entries = int((sample.truth != IGNORE_INDEX).sum())
    for channel in range(3):
        truth = sample.truth[:, channel].numpy()
        model = LogisticRegression(C=1 / (L2 * entries), tol=1e-9, max_iter=5000)
        model.fit(features[truth != IGNORE_INDEX], truth[truth != IGNORE_INDEX])
        np.testing.assert_allclose(found[:, channel], model.predict_proba(features)[:, 1], atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_it_beats_the_mean_where_one_member_is_noise(mode):
    sharpness = (4.0, 0.0, 0.0)
    state = Stacking.fit(make_sample(0, mode, sharpness, pixels=2000))
    fresh = make_sample(1, mode, sharpness, pixels=2000)
    mean = Mean(CombinerContext(mode))
    for one in fresh.probabilities.transpose(0, 1):
        mean.update(one[..., None, None])
    stacked, averaged = log_loss(predict(state, fresh), fresh), log_loss(mean.compute()[..., 0, 0].numpy(), fresh)
    assert stacked < 0.8 * averaged
    strength = state["weight"].square().sum(dim=(1, 2)).sqrt()
    assert strength[0] > 5 * strength[1:].max()


@pytest.mark.parametrize("mode", MODES)
def test_it_undoes_a_member_that_says_the_opposite(mode):
    state = Stacking.fit(make_sample(0, mode, (-4.0,), pixels=2000))
    fresh = make_sample(1, mode, (-4.0,), pixels=2000)
    assert log_loss(predict(state, fresh), fresh) < 0.5


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_at_the_fit_is_zero(mode):
    sample = make_sample(3, mode, ignored=0.3)
    state = {name: tensor.double().requires_grad_() for name, tensor in Stacking.fit(sample).items()}
    logits = torch.einsum("mok,pmk->po", state["weight"], sample.probabilities.double()) + state["bias"]
    if mode == "multiclass":
        loss = torch.nn.functional.cross_entropy(logits, sample.truth)
    else:
        truth = sample.truth.reshape(logits.shape)
        valid = truth != IGNORE_INDEX
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[valid], truth[valid].double())
    (loss + 0.5 * L2 * state["weight"].square().sum()).backward()
    assert max(tensor.grad.abs().max().item() for tensor in state.values()) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_members_that_are_all_right_still_have_a_finite_head(mode):
    """Without the penalty there would be no minimum."""
    sample = make_sample(0, mode, (50.0,), pixels=100)
    state = Stacking.fit(sample)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert log_loss(predict(state, sample), sample) < 0.05


def test_a_class_that_never_occurs_is_survived():
    sample = make_sample(0, "multiclass")
    state = Stacking.fit(PixelSample(sample.probabilities, sample.truth.clamp_max(1), "multiclass"))
    assert predict(state, sample)[:, 2].max() < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_fitting_is_deterministic_and_leaves_the_sample_alone(mode):
    sample = make_sample(0, mode, ignored=0.2)
    copy = PixelSample(sample.probabilities.clone(), sample.truth.clone(), mode)
    first, second = Stacking.fit(sample), Stacking.fit(copy)
    assert set(first) == {"weight", "bias"}
    for name in first:
        assert first[name].dtype == torch.float32
        assert torch.equal(first[name], second[name])
    assert torch.equal(sample.probabilities, copy.probabilities)
    assert torch.equal(sample.truth, copy.truth)


def test_pixels_that_are_ignored_altogether_change_nothing():
    sample = make_sample(0, "multilabel", ignored=0.5)
    rows = (sample.truth == IGNORE_INDEX).all(dim=1)
    assert rows.any()
    garbage = torch.where(rows[:, None, None], 1 - sample.probabilities, sample.probabilities)
    first, second = Stacking.fit(sample), Stacking.fit(PixelSample(garbage, sample.truth, "multilabel"))
    np.testing.assert_allclose(predict(first, sample), predict(second, sample), atol=1e-5)


def test_it_is_a_combiner_that_fits():
    assert isinstance(Stacking, FittedCombiner)
    assert not isinstance(Mean, FittedCombiner)


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(2, 1, 1)}, {"head": torch.zeros(1)}])
def test_without_its_state_it_is_refused(state):
    with pytest.raises(ConfigError, match="stacking needs a head that was fitted on validation data: .*got"):
        Stacking(CombinerContext("binary", state=state))


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ((2, 3), (3,), r"got \(2, 3\) and \(3,\)"),
        ((2, 3, 2), (3,), r"got \(2, 3, 2\) and \(3,\)"),
        ((2, 3, 3), (2,), r"got \(2, 3, 3\) and \(2,\)"),
        ((2, 1, 1), (), r"got \(2, 1, 1\) and \(\)"),
    ],
)
def test_a_state_of_other_shapes_is_refused(weight, bias, message):
    state = {"weight": torch.zeros(weight), "bias": torch.zeros(bias)}
    with pytest.raises(ConfigError, match=message):
        Stacking(CombinerContext("multilabel", state=state))


def test_other_members_than_it_was_fitted_for_are_refused():
    stack = torch.rand(3, *SHAPE)
    state = random_state(2, 3)
    with pytest.raises(ConfigError, match="the stacker was fitted for 2 members, got more"):
        combine(state, "multilabel", stack)
    with pytest.raises(ConfigError, match="the stacker was fitted for 2 members, got 0"):
        combine(state, "multilabel", [])
    with pytest.raises(ConfigError, match="the stacker was fitted for 3 classes, got 2"):
        combine(state, "multilabel", stack[:2, :, :2])


@pytest.mark.parametrize(("mode", "truth"), [("binary", (0,)), ("multiclass", (0,)), ("multilabel", (0, 3))])
def test_no_pixels_are_an_error(mode, truth):
    outputs = 1 if mode == "binary" else 3
    sample = PixelSample(torch.zeros(0, 2, outputs), torch.zeros(truth, dtype=torch.int64), mode)
    with pytest.raises(ConfigError, match="expected pixels to fit a stacker on, got none: are all of them ignored"):
        Stacking.fit(sample)


def test_only_ignored_entries_are_no_pixels():
    sample = PixelSample(torch.rand(4, 2, 3), torch.full((4, 3), IGNORE_INDEX), "multilabel")
    with pytest.raises(ConfigError, match="expected pixels to fit a stacker on, got none"):
        Stacking.fit(sample)
