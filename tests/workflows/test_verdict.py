"""Verdicts: the lower end of the interval decides, and equals seldom win."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.metrics.bootstrap import Difference, paired_difference
from smp_ensemble.workflows.verdict import BEYOND, Rule, Verdict, decide_promotion


@given(st.floats(0.5, 0.999))
def test_enough_resamples_lie_beyond_the_interval(confidence):
    rule = Rule(confidence=confidence)
    assert rule.resamples >= 1000
    assert rule.resamples * (1 - confidence) / 2 >= BEYOND - 1e-6


FINITE = st.floats(-1, 1)


@given(FINITE, FINITE, FINITE, FINITE, st.floats(0, 0.5))
def test_the_lower_end_decides(low, estimate, high, min_gain, more):
    low, estimate, high = sorted((low, estimate, high))
    difference = Difference(estimate, low, high, 0.5)
    verdict = decide_promotion(difference, min_gain)
    assert verdict.promote == (low > min_gain)
    assert f"{low:+.4f} to {high:+.4f}" in verdict.reason
    assert "\n" not in verdict.reason
    if not verdict.promote:  # asking for more never helps
        assert not decide_promotion(difference, min_gain + more).promote


@given(FINITE)
def test_what_has_no_interval_is_never_certain(estimate):
    nan = math.nan
    assert not decide_promotion(Difference(estimate, nan, nan, nan), -0.99).promote
    assert decide_promotion(Difference(nan, nan, nan, nan)) == Verdict(
        False, "one of the two has no IoU on this test data"
    )


def test_about_one_in_forty_comparisons_of_equals_promotes():
    """Models that are equally good but differ on every image: the one-sided error is (1 - confidence) / 2."""
    random = np.random.default_rng(1)
    promoted = 0
    for seed in range(200):
        hits = random.binomial(200, 0.7, (2, 60))
        a, b = (np.stack([one, 200 - one, np.zeros_like(one)], axis=-1)[:, None] for one in hits)
        promoted += decide_promotion(paired_difference(a, b, seed=seed, resamples=400)).promote
    assert 0 <= promoted <= 13  # 5 expected; more than 13 has a probability below 0.001
