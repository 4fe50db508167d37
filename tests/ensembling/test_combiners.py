"""Combining streams, and equals what NumPy makes of all members stacked."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smp_ensemble.ensembling.combiners import (
    TIE,
    Mean,
    casts_votes,
    combiner_class,
    default_reject,
    fits_weights,
)
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.metrics.decision import decide
from smp_ensemble.typing import MODES, CombinerContext

SHAPE = (1, 3, 2, 2)
CONTEXT = CombinerContext("multilabel")
unit = st.floats(0, 1, width=32)
weights = st.floats(2**-7, 100, width=32)


@st.composite
def weighted_stacks(draw) -> tuple[np.ndarray, np.ndarray]:
    members = draw(st.integers(1, 6))
    stack = draw(hnp.arrays(np.float32, (members, *SHAPE), elements=unit))
    return stack, draw(hnp.arrays(np.float32, members, elements=weights))


def mean_of(stack, weights=None) -> torch.Tensor:
    combiner = combiner_class("mean")(CONTEXT)
    for index, one in enumerate(stack):
        combiner.update(torch.as_tensor(one), 1.0 if weights is None else float(weights[index]))
    return combiner.compute()


def assert_equal(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=2e-6)


@given(weighted_stacks())
def test_streaming_is_the_stacked_mean(drawn):
    stack, weights = drawn
    assert_equal(mean_of(stack), stack.astype(np.float64).mean(axis=0))
    assert_equal(mean_of(stack, weights), np.average(stack.astype(np.float64), axis=0, weights=weights))


@given(weighted_stacks(), st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(drawn, random):
    stack, weights = drawn
    order = list(range(len(stack)))
    random.shuffle(order)
    assert_equal(mean_of(stack[order], weights[order]), mean_of(stack, weights))


@given(weighted_stacks(), st.floats(1e-3, 1e3))
def test_weights_are_scale_free(drawn, scale):
    stack, weights = drawn
    assert_equal(mean_of(stack, weights * scale), mean_of(stack, weights))


@given(hnp.arrays(np.float32, SHAPE, elements=unit), st.lists(weights, min_size=1, max_size=6))
def test_copies_of_one_model_are_that_model(one, weights):
    assert_equal(mean_of([one] * len(weights), weights), one)


def test_a_weight_is_so_many_members():
    stack = torch.rand(3, *SHAPE)
    assert_equal(mean_of(stack, [3, 1, 2]), mean_of(stack[[0, 0, 0, 1, 2, 2]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float32_and_the_input_is_left_alone(dtype):
    one = torch.rand(SHAPE).to(dtype)
    before = one.clone()
    found = mean_of([one] * 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, before.float())
    assert torch.equal(one, before)


def test_asking_early_changes_nothing():
    combiner = Mean(CONTEXT)
    combiner.update(torch.zeros(SHAPE))
    assert torch.equal(combiner.compute(), torch.zeros(SHAPE))
    combiner.update(torch.ones(SHAPE))
    assert torch.equal(combiner.compute(), torch.full(SHAPE, 0.5))
    assert torch.equal(combiner.compute(), torch.full(SHAPE, 0.5))


def test_nothing_to_combine_is_an_error():
    with pytest.raises(ConfigError, match="expected at least one member with a weight above 0, got none"):
        Mean(CONTEXT).compute()
    with pytest.raises(ConfigError, match="expected at least one member with a weight above 0"):
        mean_of(torch.rand(2, *SHAPE), [0, 0])


def test_combiners_by_name_are_fresh_and_unknown_ones_are_refused():
    assert combiner_class("mean")(CONTEXT) is not combiner_class("mean")(CONTEXT)
    with pytest.raises(ConfigError, match="unknown combiner 'maen': did you mean 'mean'"):
        combiner_class("maen")


NAMES = ("mean", "weighted", "geometric", "vote", "majority")
names = st.sampled_from(NAMES)
thresholds = st.sampled_from([0.2, 0.5, 0.7])


@st.composite
def member_stacks(draw, mode: str, least: int = 1) -> np.ndarray:
    """Probabilities `(M, N, K, H, W)` of members: exact zeros, ones and ties among them; classes sum to 1."""
    members = draw(st.integers(least, 6))
    shape = (members, 1, 1 if mode == "binary" else 3, 1, 3)
    if mode != "multiclass":
        return draw(hnp.arrays(np.float32, shape, elements=unit))
    parts = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 20))) + np.eye(3, dtype=int)[0][:, None, None]
    return (parts / parts.sum(axis=2, keepdims=True)).astype(np.float32)


@st.composite
def cases(draw):
    """A combiner's name, its context, members' probabilities, and weights."""
    mode = draw(st.sampled_from(MODES))
    stack = draw(member_stacks(mode))
    drawn = draw(hnp.arrays(np.float32, len(stack), elements=weights))
    return draw(names), CombinerContext(mode, draw(thresholds)), stack, drawn


def combine(name, context, stack, weights=None) -> np.ndarray:
    combiner = combiner_class(name)(context)
    for index, one in enumerate(stack):
        combiner.update(torch.as_tensor(one), 1.0 if weights is None else float(weights[index]))
    return combiner.compute().numpy()


def numpy_combine(name, context, stack, weights) -> np.ndarray:
    """All members stacked, in float64."""
    stack = stack.astype(np.float64)
    if name in {"mean", "weighted"}:
        return np.average(stack, axis=0, weights=weights)
    if name == "geometric":
        clamped = stack.clip(1e-7, 1 - 1e-7)
        foreground = np.exp(np.average(np.log(clamped), axis=0, weights=weights))
        if context.mode == "multiclass":
            return foreground / foreground.sum(axis=1, keepdims=True)
        background = np.exp(np.average(np.log1p(-clamped), axis=0, weights=weights))
        return foreground / (foreground + background)
    shares, mean = np.zeros(stack.shape[1:]), np.average(stack, axis=0, weights=weights)
    for one, weight in zip(stack, weights, strict=True):
        if context.mode == "multiclass":
            n, h, w = np.indices((one.shape[0], *one.shape[2:]))
            np.add.at(shares, (n, one.argmax(axis=1), h, w), weight / weights.sum(dtype=np.float64))
        else:
            shares += (one >= np.float32(context.threshold)) * weight / weights.sum(dtype=np.float64)
    if context.mode != "multiclass":
        mean = np.interp(mean, [0, context.threshold, 1], [0, 0.5, 1])
    return shares + TIE * (mean - shares)


@given(cases())
def test_every_streamed_combination_is_the_stacked_formula(case):
    np.testing.assert_allclose(combine(*case), numpy_combine(*case), rtol=0, atol=2e-5)


def test_two_members_that_are_sure_of_opposites_leave_it_open():
    stack = np.array([0, 1], dtype=np.float32).reshape(2, 1, 1, 1, 1)
    found = combine("geometric", CombinerContext("binary"), stack, np.ones(2, np.float32))
    np.testing.assert_allclose(found, 0.5, rtol=0, atol=1e-6)


@given(cases(), st.randoms(use_true_random=False))
def test_no_combination_depends_on_the_order_of_members(case, random):
    name, context, stack, weights = case
    order = list(range(len(stack)))
    random.shuffle(order)
    shuffled = combine(name, context, stack[order], weights[order])
    np.testing.assert_allclose(shuffled, combine(*case), rtol=0, atol=2e-5)


@given(cases(), st.floats(1e-3, 1e3))
def test_all_weights_are_scale_free(case, scale):
    name, context, stack, weights = case
    np.testing.assert_allclose(combine(name, context, stack, weights * scale), combine(*case), rtol=0, atol=2e-5)


@given(cases())
def test_copies_of_one_model_decide_as_it_does(case):
    name, context, stack, weights = case
    one = stack[0]
    found = combine(name, context, [one] * len(weights), weights)
    if not combiner_class(name).votes:
        np.testing.assert_allclose(found, one, rtol=0, atol=2e-6)
        return
    decision = decide(torch.from_numpy(found), context.mode, 0.5)
    assert torch.equal(decision, decide(torch.from_numpy(one), context.mode, context.threshold))


@given(cases())
def test_all_combinations_are_probabilities(case):
    found = combine(*case)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    if case[1].mode == "multiclass":
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=2e-6)


@given(cases())
def test_no_combiner_changes_or_keeps_what_it_is_given(case):
    name, context, stack, weights = case
    combiner = combiner_class(name)(context)
    before = stack.copy()
    for index, weight in enumerate(weights):
        one = torch.from_numpy(stack[index]).clone()
        combiner.update(one, float(weight))
        assert torch.equal(one, torch.from_numpy(before[index]))
        alive = weakref.ref(one)
        del one
        assert alive() is None
    first = combiner.compute()
    first_values = first.clone()
    first.zero_()  # what was given out is the caller's
    assert torch.equal(combiner.compute(), first_values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_read_as_the_numbers_that_it_holds(name, dtype):
    context = CombinerContext("binary", 0.7)
    stack = torch.tensor([0.7, 0.3, 0.69, 0.71]).to(dtype).view(4, 1, 1, 1, 1)
    np.testing.assert_array_equal(combine(name, context, stack), combine(name, context, stack.float()))


def test_rounded_sums_do_not_lead_beyond_1():
    weights = [0.1, 0.7, 0.3, 1 / 3, 1.0, 0.9]
    for count in range(1, 7):
        assert mean_of(torch.ones(count, *SHAPE), weights).max() <= 1


def test_a_sure_member_weighs_more_in_the_geometric_mean():
    stack = np.array([0.999, 0.4, 0.4], dtype=np.float32).reshape(3, 1, 1, 1, 1)
    context = CombinerContext("binary")
    geometric, mean = combine("geometric", context, stack).item(), combine("mean", context, stack).item()
    assert geometric == pytest.approx(1 / (1 + (0.001 / 0.999 * 1.5**2) ** (1 / 3)), abs=1e-4)
    assert geometric > 0.88 > 0.6 > mean


@pytest.mark.parametrize(("name", "votes", "reject", "fits"), [
    ("mean", False, 0, False), ("weighted", False, 0, True), ("geometric", False, 0, False),
    ("vote", True, 0, False), ("majority", True, 0.5, False), ("stacking", False, 0, False),
])  # fmt: skip
def test_combiners_say_what_they_are(name, votes, reject, fits):
    found = combiner_class(name)
    assert (casts_votes(found), default_reject(found), fits_weights(found)) == (votes, reject, fits)


def test_a_combiner_that_says_nothing_is_plain():
    assert (casts_votes(object()), default_reject(object()), fits_weights(object())) == (False, 0, False)
