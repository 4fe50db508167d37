"""Two bytes keep a probability to the error that is stated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.evaluation.codes import LARGEST_ERROR, STEPS, decode, encode


@pytest.mark.parametrize("mode", ["binary", "multilabel"])
def test_every_probability_comes_back_to_6e_5(mode):
    p = np.concatenate([np.linspace(0, 1, 1_000_001), np.geomspace(1e-12, 0.5, 10_000)])
    for values in (p, p.astype(np.float32)):
        errors = np.abs(decode(encode(values)[None], mode)[0] - values)
        assert 5.5e-5 < errors.max() < 6.2e-5
        assert errors[0] < 2e-7
    assert errors.max() < LARGEST_ERROR


def test_classes_come_back_to_1e_4_and_sum_to_1():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 20):
        logits = rng.normal(0, rng.uniform(0.1, 6, 200_000), (classes, 200_000))
        p = np.exp(logits) / np.exp(logits).sum(axis=0)
        found = decode(encode(p), "multiclass")
        assert np.abs(found - p).max() < LARGEST_ERROR
        np.testing.assert_allclose(found.sum(axis=0), 1, rtol=0, atol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_order_is_kept(values):
    codes = encode(np.sort(np.array(values)))
    assert (np.diff(codes.astype(int)) >= 0).all()


def test_codes_of_codes_are_the_same():
    codes = np.arange(STEPS + 1, dtype=np.uint16)
    again = encode(decode(codes[None], "binary")[0].astype(np.float64))
    near = np.abs(again.astype(int) - codes.astype(int))
    assert near[: STEPS // 2].max() == 0  # near 1, float32 has fewer values than there are codes
    assert np.diff(decode(codes[None], "binary")[0]).min() >= 0
