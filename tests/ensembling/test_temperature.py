"""Temperature softens or sharpens, and never turns a decision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from smp_ensemble.ensembling.temperature import EPSILON, TemperatureFit, apply_temperature, fit_temperature
from smp_ensemble.typing import IGNORE_INDEX, MODES

temperatures = st.floats(0.05, 20)
logit_arrays = hnp.arrays(np.float32, (2, 3, 2, 2), elements=st.floats(-8, 8, width=32))
binary_modes = st.sampled_from(["binary", "multilabel"])


@given(logit_arrays, st.sampled_from(MODES))
def test_temperature_1_returns_the_input_itself(logits, mode):
    probabilities = torch.from_numpy(logits).sigmoid()
    assert apply_temperature(probabilities, 1.0, mode) is probabilities


@given(logit_arrays, temperatures)
def test_classes_compete_as_a_softmax_of_scaled_logits(logits, temperature):
    scaled = logits.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    expected = exponent / exponent.sum(axis=1, keepdims=True)
    found = apply_temperature(torch.from_numpy(logits).softmax(dim=1), temperature, "multiclass")
    kept = np.exp(logits - logits.max(axis=1, keepdims=True)) > 1e-5  # beyond, clamping is meant
    np.testing.assert_allclose(found.numpy()[kept], expected[kept], atol=2e-3)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 2, 2))


@given(logit_arrays, temperatures, binary_modes)
def test_channels_that_do_not_compete_are_sigmoids_of_scaled_logits(logits, temperature, mode):
    expected = 1 / (1 + np.exp(-logits.astype(np.float64) / temperature))
    found = apply_temperature(torch.from_numpy(logits).sigmoid(), temperature, mode)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


@given(logit_arrays, temperatures)
def test_the_largest_class_stays_the_largest(logits, temperature):
    probabilities = torch.from_numpy(logits).softmax(dim=1)
    found = apply_temperature(probabilities, temperature, "multiclass")
    best = probabilities.argmax(dim=1, keepdim=True)
    assert torch.equal(found.gather(1, best), found.amax(dim=1, keepdim=True))  # where two are equal, among the largest
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-4
    assert torch.equal(found.argmax(dim=1)[clear], probabilities.argmax(dim=1)[clear])


@given(logit_arrays, temperatures, binary_modes)
def test_the_decision_at_one_half_stays(logits, temperature, mode):
    probabilities = torch.from_numpy(logits).sigmoid()
    found = apply_temperature(probabilities, temperature, mode)
    clear = ((probabilities - 0.5).abs() > 1e-5) | (probabilities == 0.5)
    assert torch.equal((found >= 0.5)[clear], (probabilities >= 0.5)[clear])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0])
def test_certainty_and_impossibility_stay_finite(mode, temperature):
    probabilities = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    found = apply_temperature(probabilities, temperature, mode)
    assert found.isfinite().all()
    assert found.flatten().tolist() == pytest.approx([1.0, 0.0], abs=0.01)


def test_above_1_softens_and_below_1_sharpens():
    probabilities = torch.full((1, 1, 1, 1), 0.9)
    softened, sharpened = (apply_temperature(probabilities, t, "binary").item() for t in (2.0, 0.5))
    assert softened == pytest.approx(0.75)  # logit 2.197 halved
    assert sharpened == pytest.approx(81 / 82)  # odds 9 squared


def simulate(mode: str, seed: int = 0, scale: float = 1.0, pixels: int = 4000, ignored: float = 0.0):
    """Calibrated probabilities with logits scaled by `scale`, and truths that follow the unscaled ones."""
    rng = np.random.default_rng(seed)
    channels = 1 if mode == "binary" else 3
    logits = rng.normal(0, 2, (2, channels, 4, pixels // 8))
    if mode == "multiclass":
        truth = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    else:
        truth = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.int64)
        truth = truth[:, 0] if mode == "binary" else truth
    truth[rng.random(truth.shape) < ignored] = IGNORE_INDEX
    scaled = torch.from_numpy(scale * logits)
    probabilities = scaled.softmax(dim=1) if mode == "multiclass" else scaled.sigmoid()
    return probabilities.float(), torch.from_numpy(truth)


def numpy_log_loss(log_temperature: float, probabilities, truth, mode: str) -> float:
    scores = probabilities.clamp(EPSILON, 1 - EPSILON).double().numpy()  # 1 - EPSILON rounded as ours
    scores = np.log(scores) if mode == "multiclass" else np.log(scores) - np.log1p(-scores)
    scores, truth = scores / np.exp(log_temperature), truth.numpy()
    valid = truth != IGNORE_INDEX
    if mode == "multiclass":
        chosen = np.take_along_axis(scores, np.where(valid, truth, 0)[:, None], axis=1)[:, 0]
        return (logsumexp(scores, axis=1) - chosen)[valid].mean()
    scores = scores if mode == "multilabel" else scores[:, 0]
    return np.logaddexp(0, np.where(truth == 1, -scores, scores))[valid].mean()


def fit(probabilities, truth, mode: str) -> float:
    return fit_temperature(lambda: [(probabilities, truth)], mode)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_fit_is_where_scipy_finds_the_minimum(mode, scale, ignored):
    data = *simulate(mode, 1, scale, ignored=ignored), mode
    bounds = -math.log(20), math.log(20)
    found = minimize_scalar(numpy_log_loss, bounds=bounds, args=data, method="bounded", options={"xatol": 1e-6})
    assert fit(*data) == pytest.approx(math.exp(found.x), rel=1e-3)


@pytest.mark.parametrize("scale", [1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_fit_recovers_what_logits_were_scaled_by(mode, scale):
    """At 1 that is a fixed point: what is calibrated stays."""
    assert fit(*simulate(mode, 2, scale, pixels=80_000), mode) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_calibrated_needs_nothing_more(mode):
    probabilities, truth = simulate(mode, 3, 3.0)
    calibrated = apply_temperature(probabilities, fit(probabilities, truth, mode), mode)
    assert fit(calibrated, truth, mode) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("mode", MODES)
def test_batches_may_be_cut_anyhow(mode):
    probabilities, truth = simulate(mode, 4, 2.0, ignored=0.2)
    rows = [(probabilities[..., row : row + 1, :], truth[..., row : row + 1, :]) for row in range(4)]
    images = list(zip(probabilities.split(1), truth.split(1), strict=True))
    whole = fit(probabilities, truth, mode)
    for batches in (rows, images, images[::-1]):
        assert fit_temperature(lambda batches=batches: iter(batches), mode) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("sure", [0.5001, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_where_nothing_is_wrong_it_sharpens_to_the_bound(mode, sure):
    if mode == "multiclass":
        probabilities, truth = torch.tensor([sure, 1 - sure]).view(1, 2, 1, 1), torch.zeros(1, 1, 1).long()
    else:
        probabilities = torch.tensor([sure, 1 - sure]).view(1, 1, 1, 2)
        truth = torch.tensor([1, 0]).view((1, 1, 2) if mode == "binary" else (1, 1, 1, 2))
    assert fit(probabilities, truth, mode) == 1 / 20


@pytest.mark.parametrize("sure", [0.6, 0.9, 0.999, 1.0])
def test_where_it_is_worse_than_chance_it_softens_to_the_bound(sure):
    probabilities = torch.tensor([sure, sure, 1 - sure]).view(1, 1, 1, 3)
    assert fit(probabilities, torch.tensor([[[0, 1, 1]]]), "binary") == 20
    assert fit(probabilities, torch.tensor([[[0, 0, 1]]]), "binary") == 20


@pytest.mark.parametrize("wrong", [1, 10, 1000, 40_000])
@pytest.mark.parametrize("sure", [0.6, 0.9, 0.999, 1 - 1e-6])
def test_rare_errors_of_members_of_any_certainty(sure, wrong):
    """`logit(p) / T` is the log odds of being right, where that lies within the bounds."""
    pixels = 100_000
    truth = torch.ones(1, 1, pixels, dtype=torch.int64)
    truth[..., :wrong] = 0
    probabilities = torch.full((1, 1, 1, pixels), sure)
    logit = float(torch.logit(probabilities[0, 0, 0, 0].double()))
    expected = logit / math.log((pixels - wrong) / wrong)
    assert fit(probabilities, truth, "binary") == pytest.approx(min(max(expected, 1 / 20), 20), rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_valid_pixel_it_is_1(mode):
    probabilities, truth = simulate(mode, pixels=80)
    assert fit(probabilities, torch.full_like(truth, IGNORE_INDEX), mode) == 1
    assert fit_temperature(list, mode) == 1


@pytest.mark.parametrize("mode", MODES)
def test_what_no_temperature_changes_has_temperature_1(mode):
    probabilities, truth = simulate(mode, pixels=80)
    assert fit(torch.full_like(probabilities, 1 / 2), truth, mode) == 1


@pytest.mark.parametrize("mode", MODES)
def test_several_fits_share_their_passes(mode):
    models = [simulate(mode, 5, scale)[0] for scale in (0.5, 1.0, 4.0)]
    truth = simulate(mode, 5)[1]
    fits, passes = [TemperatureFit(mode) for _ in models], 0
    while not all(one.done for one in fits):
        passes += 1
        for one, probabilities in zip(fits, models, strict=True):
            if not one.done:
                one.update(probabilities, truth)
        for one in fits:
            if not one.done:
                assert one.step() is one.done
    assert [one.temperature for one in fits] == [fit(probabilities, truth, mode) for probabilities in models]
    assert passes <= 12


def test_the_fit_leaves_its_input_alone():
    probabilities, truth = simulate("multiclass", ignored=0.2)
    before = probabilities.clone(), truth.clone()
    fit(probabilities, truth, "multiclass")
    assert torch.equal(probabilities, before[0])
    assert torch.equal(truth, before[1])


@given(st.lists(logit_arrays, min_size=1, max_size=4), temperatures)
def test_no_temperature_changes_which_class_the_mean_decides_for(members, temperature):
    mean = torch.stack([torch.from_numpy(logits).softmax(dim=1) for logits in members]).mean(dim=0)
    found = apply_temperature(mean, temperature, "multiclass")
    first, second = mean.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-4
    assert torch.equal(found.argmax(dim=1)[clear], mean.argmax(dim=1)[clear])
