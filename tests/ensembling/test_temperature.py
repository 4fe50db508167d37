"""Temperature softens or sharpens, and never turns a decision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smp_ensemble.ensembling.temperature import apply_temperature
from smp_ensemble.typing import MODES

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
