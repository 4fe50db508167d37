"""Images stop on their own, late enough: with nothing tolerated the mask is that of all members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.ensembling.adaptive import AdaptiveRule
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.adaptive import AdaptiveBatch, run_adaptively
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.payload import answer

ADDITIVE = ("mean", "weighted", "geometric", "vote", "majority")


def certain(members: int) -> AdaptiveRule:
    """Images stop only where nothing can change any more."""
    return AdaptiveRule(0.0, 0.0, 1.0, ((0.5, 0.01),) * (members - 1))


def trusting(members: int) -> AdaptiveRule:
    """A pixel with a lead of 0.5 in log-odds is safe; an image may have a fifth of others."""
    return AdaptiveRule(0.2, 0.2, 0.5, ((1.0, 0.0),) * (members - 1))


def make_ensemble(combiner: str = "mean", mode: str = "binary", count: int = 4, rule=certain, **options) -> Ensemble:
    outputs = 1 if mode == "binary" else 3
    members = []
    for index in range(count):
        torch.manual_seed(index)
        members.append(nn.Conv2d(3, outputs, 1))
        with torch.no_grad():
            members[-1].weight.mul_(0.08)
            members[-1].bias.copy_(-127.5 * members[-1].weight.sum(dim=(1, 2, 3)))
    return Ensemble(members, mode=mode, combiner=combiner, adaptive=rule(count), **options)


def make_images(count: int, seed: int = 0) -> torch.Tensor:
    """Darker or brighter than the grey at which members cannot tell: more or less, so that they stop differently."""
    generator = torch.Generator().manual_seed(seed)
    grey = 255 * torch.rand(count, 1, 1, 1, generator=generator)
    return (grey + 60 * (torch.rand(count, 3, 6, 7, generator=generator) - 0.5)).clamp(0, 255)


@settings(max_examples=40)
@given(
    st.sampled_from(ADDITIVE),
    st.sampled_from(["binary", "multiclass", "multilabel"]),
    st.sampled_from([0.0, 0.6]),
    st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
    st.integers(0, 10**6),
)
def test_with_nothing_tolerated_masks_are_those_of_all_members(combiner, mode, reject, weights, seed):
    ensemble = make_ensemble(combiner, mode, len(weights), weights=sorted(weights, reverse=True), reject=reject)
    images = make_images(5, seed)
    whole, early = Engine(ensemble, "cpu", "32"), Engine(ensemble, "cpu", "32", adaptive=True)
    assert torch.equal(ensemble.decide(early(images)), ensemble.decide(whole(images)))


def test_votes_stop_at_the_majority_and_cost_falls_with_it():
    ensemble = make_ensemble("vote", count=5)
    for member in ensemble.members:
        member.load_state_dict(ensemble.members[0].state_dict())
    sizes = []

    def run(index: int, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return ensemble.probabilities_of(ensemble.members[index], images)

    _, used = run_adaptively(ensemble, make_images(6), run)
    assert used == [3] * 6
    assert sizes == [6, 6, 6]


@pytest.mark.parametrize("combiner", ADDITIVE)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_image_that_a_table_calls_safe_stops_at_the_first_of_several_copies(combiner, count):
    ensemble = make_ensemble(combiner, count=count, rule=trusting)
    for member in ensemble.members:
        nn.init.zeros_(member.weight)
        nn.init.constant_(member.bias, 6.0)
    engine = Engine(ensemble, "cpu", "32", adaptive=True)
    found = engine(make_images(3))
    assert engine.mean_members == 1
    if combiner in {"mean", "weighted", "geometric"}:
        torch.testing.assert_close(found, Engine(ensemble, "cpu", "32")(make_images(3)))


@settings(max_examples=20)
@given(st.permutations(range(6)), st.sampled_from(["mean", "geometric", "vote"]))
def test_no_image_depends_on_the_others_or_on_their_order(order, combiner):
    ensemble = make_ensemble(combiner, rule=trusting)
    images = torch.arange(6).view(6, 1, 1, 1)  # numbers in their place: networks round with the size of a batch
    each = list(ensemble.member_probabilities(make_images(6, seed=3)))

    def run(index: int, some: torch.Tensor) -> torch.Tensor:
        return each[index][some.flatten()]

    found, used = run_adaptively(ensemble, images, run)
    moved, moved_used = run_adaptively(ensemble, images[list(order)], run)
    assert torch.equal(moved, found[list(order)])
    assert moved_used == [used[place] for place in order]
    assert len(set(used)) > 1 or combiner == "vote", "the images should differ"
    alone = [run_adaptively(ensemble, images[index : index + 1], run) for index in range(6)]
    assert torch.equal(torch.cat([one for one, _ in alone]), found)


def test_what_a_stopped_image_gets_is_the_combination_of_the_members_so_far():
    ensemble = make_ensemble(rule=trusting, temperature=1.1)
    images = make_images(8)
    engine = Engine(ensemble, "cpu", "32", adaptive=True)
    found = engine(images)
    streams = torch.stack(list(engine.member_probabilities(images)))
    _, used = run_adaptively(
        ensemble, images, lambda index, some: ensemble.probabilities_of(ensemble.members[index], some)
    )
    assert len(set(used)) > 1, "the images should differ"
    assert engine.mean_members == sum(used) / len(used)
    for index, count in enumerate(used):
        mean = streams[:count, index].double().numpy().mean(axis=0)
        expected = 1 / (1 + ((1 - mean) / mean) ** (1 / 1.1))
        np.testing.assert_allclose(found[index].numpy(), expected, atol=1e-5)


def test_other_members_are_asked_for_uncertainty_all_of_them():
    ensemble = make_ensemble(rule=trusting)
    images = [one.numpy().transpose(1, 2, 0) for one in make_images(3)]
    whole, early = Engine(ensemble, "cpu", "32"), Engine(ensemble, "cpu", "32", adaptive=True)
    for one, other in zip(whole.uncertainty(images), early.uncertainty(images), strict=True):
        assert np.array_equal(one, other)
    assert early.mean_members is None


def test_it_is_off_unless_asked_for_and_needs_a_rule_that_holds():
    ensemble = make_ensemble(rule=trusting)
    assert not Engine(ensemble, "cpu").adaptive
    with pytest.raises(ConfigError, match="this ensemble has no adaptive rule: build it with --adaptive 0.001"):
        Engine(Ensemble([nn.Conv2d(3, 1, 1)], mode="binary"), "cpu", adaptive=True)
    with pytest.raises(ConfigError, match=r"fitted with views none and one pass, got views flips and passes 1"):
        Engine(ensemble, "cpu", views="flips", adaptive=True)
    with pytest.raises(ConfigError, match="fitted with views none and one pass"):
        Engine(ensemble, "cpu", adaptive=True).with_options(views="d4")
    engine = Engine(ensemble, "cpu", "32")
    assert engine.with_options(adaptive=True).adaptive
    assert engine.with_options(adaptive=False) is engine


def test_a_batch_must_be_finished():
    batch = AdaptiveBatch(make_ensemble(), 2)
    with pytest.raises(ConfigError, match="expected members until every image has stopped, 2 have not"):
        batch.compute()
    with pytest.raises(ConfigError, match="expected an ensemble with an adaptive rule"):
        AdaptiveBatch(Ensemble([nn.Conv2d(3, 1, 1)], mode="binary"), 2)


def test_payload_takes_it_as_a_param():
    ensemble = make_ensemble(rule=trusting)
    engine = Engine(ensemble, "cpu", "32")
    images = make_images(4).numpy().transpose(0, 2, 3, 1).astype(np.uint8)
    soft = {"kind": "probabilities"}
    early = engine.with_options(adaptive=True)(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for value in (True, np.True_):
        assert np.array_equal(answer(engine, images, {**soft, "adaptive": value}), early)
    assert not np.array_equal(answer(engine, images, soft), early)
    assert np.array_equal(answer(engine, images, {**soft, "adaptive": False}), answer(engine, images, soft))
    for value in ("true", 1, 0.5):
        with pytest.raises(ConfigError.__base__, match="expected adaptive as true or false"):
            answer(engine, images, {"adaptive": value})
