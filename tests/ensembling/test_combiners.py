"""Combining streams, and equals what NumPy makes of all members stacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from smp_ensemble.ensembling.combiners import Mean, combiner_class
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import CombinerContext

SHAPE = (2, 3, 2, 2)
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
