"""Averages of weights: laws, NumPy's average, and two models in memory whatever their number."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.training.weights import average_weights

seeds = st.lists(st.integers(0, 999), min_size=1, max_size=7)
numbers = st.floats(0.01, 100.0)


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 2, generator=generator),
        "bias": torch.randn(2, generator=generator).double(),
        "num_batches_tracked": torch.tensor(seed),
    }


def assert_close(one, other):
    for name in ("weight", "bias"):
        assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


@given(st.data())
def test_equals_numpys_average(data):
    chosen = data.draw(seeds)
    weights = data.draw(st.none() | st.lists(numbers, min_size=len(chosen), max_size=len(chosen)))
    averaged = average_weights([state(seed) for seed in chosen], weights)
    for name in ("weight", "bias"):
        values = np.stack([state(seed)[name].double().numpy() for seed in chosen])
        expected = np.average(values, axis=0, weights=weights)
        assert averaged[name].numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert averaged[name].dtype == state(0)[name].dtype


@given(seeds, st.randoms())
def test_the_order_of_models_does_not_matter(chosen, random):
    pairs = [(seed, 1.0 + index) for index, seed in enumerate(chosen)]
    shuffled = random.sample(pairs, len(pairs))
    one, other = (
        average_weights([state(seed) for seed, _ in which], [w for _, w in which]) for which in (pairs, shuffled)
    )
    assert_close(one, other)


@given(seeds, st.floats(1e-300, 1e300))
def test_weights_are_scale_free(chosen, scale):
    weights = [1.0 + index for index in range(len(chosen))]
    models = [state(seed) for seed in chosen]
    assert_close(average_weights(models, weights), average_weights(models, [weight * scale for weight in weights]))


def test_a_sum_of_weights_may_be_larger_than_any_number():
    models = [state(seed) for seed in range(3)]
    assert_close(average_weights(models, [1.5e308, 1.5e308, 0.75e308]), average_weights(models, [2, 2, 1]))


@given(st.integers(0, 999), st.lists(numbers, min_size=1, max_size=9))
def test_copies_of_one_model_give_it_back_bit_for_bit(seed, weights):
    for given_weights in (None, weights):
        averaged = average_weights([state(seed)] * len(weights), given_weights)
        assert all(torch.equal(averaged[name], tensor) for name, tensor in state(seed).items())


@given(seeds, st.integers(0, 999))
def test_a_weight_of_zero_leaves_a_model_out(chosen, left_out):
    models = [state(seed) for seed in chosen]
    broken = {**state(left_out), "weight": torch.full((3, 2), float("nan"))}
    expected = average_weights(models)
    assert_close(average_weights([*models, broken], [1] * len(models) + [0]), expected)
    assert_close(average_weights([broken, *models], [0] + [1] * len(models)), expected)


def test_modules_and_state_dicts_mix_and_stay_as_they_are():
    one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(two.weight, 3.0)
    two.num_batches_tracked.fill_(5)
    averaged = average_weights([one, two.state_dict()])
    assert averaged["weight"].tolist() == [2.0, 2.0]
    assert averaged["num_batches_tracked"].item() == 0
    assert averaged["num_batches_tracked"].dtype == torch.int64
    assert not any(tensor.requires_grad for tensor in averaged.values())
    averaged["weight"].fill_(9.0)
    averaged["num_batches_tracked"].fill_(9)
    assert one.weight.tolist() == [1.0, 1.0]
    assert one.num_batches_tracked.item() == 0
    nn.BatchNorm1d(2).load_state_dict(averaged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    # In bfloat16 256 + 1 is 256: a running sum or mean in it would lose most models.
    values = [256.0] + [258.0] * 255
    averaged = average_weights({"w": torch.tensor([value], dtype=dtype)} for value in values)
    assert averaged["w"].dtype == dtype
    assert averaged["w"].item() == torch.tensor(float(np.mean(values))).to(dtype).item()


def test_complex_numbers_average_and_truth_values_do_not():
    models = [
        {"c": torch.tensor([1 + 2j]), "mask": torch.tensor([True, False]), "extra": "kept"},
        {"c": torch.tensor([3 - 2j]), "mask": torch.tensor([False, False]), "extra": "not"},
    ]
    averaged = average_weights(models)
    assert averaged["c"].item() == 2 + 0j
    assert averaged["mask"].tolist() == [True, False]
    assert averaged["extra"] == "kept"


@pytest.mark.parametrize("as_state", [False, True])
def test_two_models_in_memory_whatever_their_number(as_state):
    """When the generator is asked for the next model, the one before is gone."""
    alive: list[weakref.ref] = []

    def make(index: int):
        model = nn.Linear(4, 3)
        nn.init.constant_(model.weight, float(index))
        alive.append(weakref.ref(model))
        alive.extend(weakref.ref(parameter) for parameter in model.parameters())
        if not as_state:
            return model
        tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    def generate():
        for index in range(6):
            left = [one() for one in alive if one() is not None]
            assert not left, f"{len(left)} objects of earlier models are alive"
            yield make(index)

    gc.disable()  # nothing may wait for it
    try:
        averaged = average_weights(generate())
    finally:
        gc.enable()
    assert averaged["weight"][0, 0].item() == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(4, 2), "tensor 'weight' has shape (3, 4) in model 0, (2, 4) in model 1"),
        (nn.Linear(4, 3, bias=False), "model 0 has the tensor 'bias' (3,), model 1 lacks it"),
        (
            {**nn.Linear(4, 3).state_dict(), "scale": torch.ones(7)},
            "model 1 has the tensor 'scale' (7,), model 0 lacks it",
        ),
    ],
)
def test_another_architecture_is_refused_by_the_first_tensor_that_differs(other, message):
    with pytest.raises(NetworkError) as refused:
        average_weights([nn.Linear(4, 3), other])
    assert str(refused.value) == f"only models of one architecture average: {message}"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "got 1 weights for more models"),
        ([1, 2, 3], "got 3 weights for 2 models"),
        ([0, 0], "one above 0, got [0.0, 0.0]"),
        ([1, -1], "not negative"),
        ([1, float("nan")], "finite"),
        ([1, float("inf")], "finite"),
        ([], "one above 0, got []"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ConfigError) as refused:
        average_weights([state(0), state(1)], weights)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "expected at least one model to average, got none"),
        (nn.Sequential(nn.Linear(1, 1)), "got one Sequential: pass a list of them"),
        (state(0), "got one dict: pass a list of them"),
        (["a.pt"], "expected modules or state dicts to average, got str"),
    ],
)
def test_what_is_no_models_is_refused(models, message):
    with pytest.raises(ConfigError, match=message):
        average_weights(models)
