"""The ensemble: laws of combining, and refusals of what does not fit."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.temperature import apply_temperature
from smp_ensemble.exceptions import ConfigError, NetworkError
from smp_ensemble.typing import MODES, CombinerContext

IMAGES = torch.linspace(0, 255, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
modes = st.sampled_from(MODES)
seeds = st.lists(st.integers(0, 9), min_size=1, max_size=5)
positive = st.floats(2**-6, 50, width=32)


def make_member(seed: int = 0, outputs: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    member = nn.Conv2d(3, outputs, 1)
    with torch.no_grad():
        member.weight.normal_(0, 0.02, generator=generator)
        member.bias.normal_(generator=generator)
    return member


def make_ensemble(seeds=(0,), mode="multiclass", **options) -> Ensemble:
    return Ensemble([make_member(seed, 1 if mode == "binary" else 3) for seed in seeds], mode=mode, **options)


@torch.no_grad()
def predict(ensemble: Ensemble) -> torch.Tensor:
    return ensemble(IMAGES)


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@torch.no_grad()
def numpy_probabilities(seed: int, mode: str) -> np.ndarray:
    logits = make_member(seed, 1 if mode == "binary" else 3)(IMAGES).double().numpy()
    if mode == "multiclass":
        exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponent / exponent.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-logits))


@given(seeds, modes, st.data())
def test_it_is_the_weighted_mean_of_probabilities(seeds, mode, data):
    weights = data.draw(st.lists(positive, min_size=len(seeds), max_size=len(seeds)))
    expected = np.average([numpy_probabilities(seed, mode) for seed in seeds], axis=0, weights=weights)
    found = predict(make_ensemble(seeds, mode, weights=weights))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=3e-6)


@given(seeds, modes, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(seeds, mode, random):
    weights = [1.0 + index for index in range(len(seeds))]
    order = list(range(len(seeds)))
    random.shuffle(order)
    shuffled = make_ensemble([seeds[at] for at in order], mode, weights=[weights[at] for at in order])
    close(predict(shuffled), predict(make_ensemble(seeds, mode, weights=weights)))


@given(st.integers(0, 9), st.lists(positive, min_size=1, max_size=6), modes)
def test_copies_of_one_model_are_that_model(seed, weights, mode):
    close(predict(make_ensemble([seed] * len(weights), mode, weights=weights)), predict(make_ensemble([seed], mode)))


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 0.5, 3.0, 1e39, 1e300])
def test_weights_are_scale_free_at_any_scale(scale):
    weights = [1.0, 2.0, 0.5]
    scaled = make_ensemble((0, 1, 2), weights=[scale * weight for weight in weights])
    close(predict(scaled), predict(make_ensemble((0, 1, 2), weights=weights)))


def test_weights_stay_as_they_were_given():
    assert make_ensemble((0, 1), weights=[4, 2]).weights == (4.0, 2.0)
    assert make_ensemble((0, 1)).weights == (1.0, 1.0)


def test_a_member_of_weight_0_says_nothing():
    close(predict(make_ensemble((0, 1, 2), weights=[1, 0, 1])), predict(make_ensemble((0, 2))))


@given(seeds, modes, st.floats(0.1, 10))
def test_probabilities_are_probabilities(seeds, mode, temperature):
    found = predict(make_ensemble(seeds, mode, temperature=temperature))
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    if mode == "multiclass":
        close(found.sum(dim=1), torch.ones(2, 4, 5))


def test_the_temperature_is_of_the_combined_probabilities():
    plain, softened = predict(make_ensemble((0, 1))), predict(make_ensemble((0, 1), temperature=2.5))
    close(softened, (plain.log() / 2.5).softmax(dim=1))
    assert torch.equal(softened.argmax(dim=1), plain.argmax(dim=1))


class CountingMean(Mean):
    """Remembers its inputs weakly, and how many of them are alive when the next one comes."""

    def __init__(self) -> None:
        super().__init__(CombinerContext("multiclass"))
        self.seen: list[weakref.ref] = []

    def update(self, probabilities, weight=1.0):
        self.seen.append(weakref.ref(probabilities))
        super().update(probabilities, weight)

    def alive(self) -> int:
        return sum(one() is not None for one in self.seen)


def test_memory_holds_one_members_probabilities_and_one_sum(monkeypatch):
    combiner = CountingMean()
    monkeypatch.setattr("smp_ensemble.ensembling.ensemble.combiner_class", lambda name: lambda context: combiner)
    alive_when_a_member_starts = []

    class Watching(nn.Conv2d):
        def forward(self, images):
            alive_when_a_member_starts.append(combiner.alive())
            return super().forward(images)

    predict(Ensemble([Watching(3, 2, 1) for _ in range(5)], mode="multiclass"))
    assert len(combiner.seen) == 5
    assert alive_when_a_member_starts == [0] * 5
    assert combiner.alive() == 0


def test_members_run_one_after_the_other():
    ensemble = make_ensemble((0, 1, 2))
    ran = []
    for index, member in enumerate(ensemble.members):
        member.register_forward_hook(lambda *_, index=index: ran.append(index))
    stream = ensemble.member_probabilities(IMAGES)
    assert ran == []
    next(stream)
    assert ran == [0]
    next(stream)
    assert ran == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_members_in_the_stream_is_an_error(count):
    with pytest.raises(ConfigError, match="expected probabilities of 2 members, got"):
        make_ensemble((0, 1)).combine(iter([torch.rand(1, 3, 2, 2)] * count))


def test_it_is_in_evaluation_mode_from_the_start():
    assert not Ensemble([nn.Sequential(nn.Conv2d(3, 1, 1), nn.Dropout(0.9))], mode="binary").training


def test_gradients_flow_to_every_member():
    ensemble = make_ensemble((0, 1, 2))
    ensemble(IMAGES).square().sum().backward()
    assert all(member.weight.grad.abs().sum() > 0 for member in ensemble.members)


@pytest.mark.parametrize(
    ("mode", "outputs", "threshold", "expected"),
    [
        ("binary", 1, 0.5, [[0, 1, 1]]),
        ("binary", 1, 0.7, [[0, 0, 1]]),
        ("multilabel", 1, 0.7, [[[0, 0, 1]]]),
    ],
)
def test_foreground_starts_at_the_threshold(mode, outputs, threshold, expected):
    ensemble = Ensemble([make_member(0, outputs)], mode=mode, threshold=threshold)
    mask = ensemble.decide(torch.tensor([0.4, 0.5, 0.7]).view(1, 1, 1, 3))
    assert mask.dtype == torch.uint8
    assert mask.tolist() == [expected]


def test_the_largest_class_wins_whatever_the_threshold():
    probabilities = torch.tensor([[0.2, 0.5], [0.5, 0.1], [0.3, 0.4]]).view(1, 3, 1, 2)
    assert make_ensemble(threshold=0.9).decide(probabilities).tolist() == [[[1, 0]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": []}, "needs at least one member, got none"),
        ({"mode": "multi-class"}, "unknown mode 'multi-class': did you mean 'multiclass'"),
        ({"combiner": "maen"}, "unknown combiner 'maen': did you mean 'mean'"),
        ({"views": ["flip"]}, "unknown views 'flip': did you mean 'flips'"),
        ({"weights": [1.0]}, "expected one weight for each of 2 members, got 1"),
        ({"weights": [1.0, -0.1]}, "weights must be finite and not negative"),
        ({"weights": [0, 0]}, "weights must be finite and not negative, and one above 0"),
        ({"weights": [1, float("nan")]}, "weights must be finite"),
        ({"weights": [1, float("inf")]}, "weights must be finite"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"temperature": float("inf")}, "temperature must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"threshold": 0.0}, "threshold must lie between 0 and 1, got 0"),
        ({"threshold": float("nan")}, "threshold must lie between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    arguments = {"members": [make_member(0), make_member(1)], "mode": "multiclass", **options}
    with pytest.raises(ConfigError, match=message):
        Ensemble(arguments.pop("members"), **arguments)


@pytest.mark.parametrize("reject", [-0.1, 1, 1.5, float("nan")])
def test_reject_out_of_range_is_refused_at_any_time(reject):
    with pytest.raises(ConfigError, match=r"reject must be 0 \(no pixel\) or below 1, got"):
        make_ensemble(reject=reject)
    with pytest.raises(ConfigError, match=r"reject must be 0 \(no pixel\) or below 1, got"):
        make_ensemble().decide(torch.rand(1, 3, 2, 2), reject=reject)


@pytest.mark.parametrize("combiner", ["vote", "majority"])
def test_votes_have_no_temperature(combiner):
    with pytest.raises(ConfigError, match=f"shares of votes have no temperature, got 2.0 with combiner '{combiner}'"):
        make_ensemble((0, 1), combiner=combiner, temperature=2.0)
    assert make_ensemble((0, 1), combiner=combiner).votes
    assert not make_ensemble((0, 1)).votes


@pytest.mark.parametrize("state", [None, {"weight": torch.zeros(2, 3, 3)}])
def test_a_combiner_without_its_state_is_refused_at_once(state):
    with pytest.raises(ConfigError, match="stacking needs a head that was fitted on validation data"):
        make_ensemble((0, 1), combiner="stacking", state=state)


def test_a_stacker_of_other_members_is_refused():
    ensemble = make_ensemble((0, 1), combiner="stacking", state={"weight": torch.ones(3, 3, 3), "bias": torch.ones(3)})
    with pytest.raises(ConfigError, match="the stacker was fitted for 3 members, got 2"):
        predict(ensemble)


@pytest.mark.parametrize(
    ("combiner", "reject", "expected"),
    [("mean", None, 0), ("majority", None, 0.5), ("majority", 0, 0), ("vote", 0.3, 0.3)],
)
def test_the_combiner_says_what_is_rejected_unless_the_ensemble_does(combiner, reject, expected):
    assert make_ensemble((0, 1), combiner=combiner, reject=reject).reject == expected


def test_a_binary_decision_is_rejected_by_the_probability_of_what_it_decides():
    ensemble = make_ensemble(mode="binary", threshold=0.25, reject=0.625)
    probabilities = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.625, 0.65, 1.0]).view(1, 1, 1, 7)
    assert ensemble.decide(probabilities).tolist() == [[[0, 0, 255, 255, 255, 1, 1]]]
    assert ensemble.decide(probabilities, reject=0).tolist() == [[[0, 0, 1, 1, 1, 1, 1]]]
    high = make_ensemble(mode="binary", threshold=0.9, reject=0.375)
    assert high.decide(probabilities).tolist() == [[[0, 0, 0, 0, 255, 255, 1]]]


def test_a_multiclass_decision_is_rejected_by_its_largest_probability():
    probabilities = torch.tensor([[0.25, 0.5, 0.625], [0.5, 0.25, 0.25], [0.25, 0.25, 0.125]]).view(1, 3, 1, 3)
    assert make_ensemble(reject=0.5, threshold=0.9).decide(probabilities).tolist() == [[[255, 255, 0]]]
    assert make_ensemble(reject=0.4).decide(probabilities).tolist() == [[[1, 0, 0]]]


def test_in_multilabel_mode_each_channel_is_rejected_alone():
    ensemble = make_ensemble(mode="multilabel", threshold=0.5, reject=0.75)
    probabilities = torch.tensor([0.125, 0.25, 0.875]).view(1, 3, 1, 1)
    mask = ensemble.decide(probabilities)
    assert mask.dtype == torch.uint8
    assert mask.flatten().tolist() == [0, 255, 1]


@given(modes, st.floats(0, 0.99), st.floats(0.05, 0.95), st.integers(0, 99))
def test_rejecting_takes_pixels_away_and_changes_none(mode, reject, threshold, seed):
    logits = torch.randn(2, 1 if mode == "binary" else 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    probabilities = logits.softmax(dim=1) if mode == "multiclass" else logits.sigmoid()
    ensemble = make_ensemble(mode=mode, threshold=threshold, reject=reject)
    mask, whole = ensemble.decide(probabilities), ensemble.decide(probabilities, reject=0)
    values = probabilities.double().numpy()
    if mode == "multiclass":
        sure = values.max(axis=1)
    else:
        sure = np.where(values >= threshold, values, 1 - values)
        sure = sure[:, 0] if mode == "binary" else sure
    clear = abs(sure - reject) > 1e-6
    np.testing.assert_array_equal((mask == 255).numpy()[clear], (sure <= reject)[clear])
    assert torch.equal(mask[mask != 255], whole[mask != 255])
    assert not (whole == 255).any()


@given(modes, st.floats(0.1, 10))
def test_pooled_probabilities_are_combined_ones_before_the_temperature(mode, temperature):
    stack = torch.randn(3, 2, 1 if mode == "binary" else 3, 2, 2, generator=torch.Generator().manual_seed(0))
    stack = stack.softmax(dim=2) if mode == "multiclass" else stack.sigmoid()
    weights = [1.0, 2.0, 0.5]
    ensemble = make_ensemble((0, 1, 2), mode, weights=weights, temperature=temperature)
    pooled = ensemble.pool(iter(stack))
    assert torch.equal(pooled, make_ensemble((0, 1, 2), mode, weights=weights).combine(iter(stack)))
    assert torch.equal(ensemble.combine(iter(stack)), apply_temperature(pooled, temperature, mode))


@pytest.mark.parametrize(("option", "value"), [("activation", "softmax2d"), ("aux_params", {"classes": 2})])
def test_members_that_give_no_logits_are_refused_by_name(option, value):
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8), **{option: value})
    with pytest.raises(NetworkError, match=f"has '{option}'.*build it with {option}=None"):
        Ensemble([network], mode="multiclass")


class Returns(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.result = result

    def forward(self, images):
        return self.result


@pytest.mark.parametrize(
    ("result", "mode", "message"),
    [
        ((torch.zeros(1), torch.zeros(1)), "binary", "must give one tensor of logits, got tuple"),
        (
            torch.zeros(2, 2, 4, 5),
            "binary",
            r"logits of shape \(2, 1, 4, 5\) for images \(2, 3, 4, 5\).*got \(2, 2, 4, 5\)",
        ),
        (torch.zeros(2, 4, 4, 5), "multiclass", r"shape \(2, 3, 4, 5\) .* got \(2, 4, 4, 5\): other number of classes"),
        (torch.zeros(2, 3, 8, 10), "multiclass", r"got \(2, 3, 8, 10\): .*a decoder that scales its output"),
        (torch.zeros(2, 3), "multilabel", r"got \(2, 3\)"),
    ],
)
def test_members_that_give_something_else_are_refused(result, mode, message):
    ensemble = Ensemble([Returns(result)], mode=mode, class_names=["a", "b", "c"])
    with pytest.raises(NetworkError, match=message):
        ensemble(IMAGES)


def test_members_of_other_class_counts_do_not_combine():
    ensemble = Ensemble([make_member(0, 3), make_member(0, 4)], mode="multiclass")
    with pytest.raises(NetworkError, match=r"member 0 gives \(2, 3, 4, 5\), member 1 \(2, 4, 4, 5\)"):
        ensemble(IMAGES)
