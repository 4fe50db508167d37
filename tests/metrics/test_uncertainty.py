"""Uncertainty maps: against NumPy and scipy.stats, and the laws of information theory."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from smp_ensemble.exceptions import ConfigError, DataError
from smp_ensemble.metrics.uncertainty import Uncertainty, UncertaintyMaps, image_scores, max_entropy
from smp_ensemble.typing import MODES, Mode

CLOSE = 2e-6
"""Float32, entropies up to log 4."""

modes = st.sampled_from(MODES)
seeds = st.integers(0, 10**6)


def outputs_of(mode: Mode) -> int:
    return 1 if mode == "binary" else 4


def random_members(mode: Mode, seed: int, count: int = 3, spread: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, 2, outputs_of(mode), 5, 6, generator=generator)
    return list(logits.softmax(2) if mode == "multiclass" else logits.sigmoid())


def maps_of(mode: Mode, members, weights=None, combined=None, threshold: float = 0.5) -> Uncertainty:
    maps = UncertaintyMaps(mode, threshold)
    for index, member in enumerate(members):
        maps.update(member, weights[index] if weights else 1.0)
    return maps.compute(combined)


def by_hand(mode: Mode, members, weights, threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stacked formula: members are held at once, as categorical distributions `(M, N, channels, classes, H, W)`."""
    stack = np.stack([member.double().numpy() for member in members])
    share = np.array(weights) / np.sum(weights)
    if mode == "multiclass":
        stack = stack[:, :, None]
        votes = np.moveaxis(np.eye(stack.shape[3])[stack.argmax(3)], -1, 3)
    else:
        decision = stack >= threshold
        stack = np.stack([1 - stack, stack], 3)
        votes = np.stack([~decision, decision], 3)
    mean, polled = (np.tensordot(share, values, 1) for values in (stack, votes))
    of_mean = entropy(mean, axis=2)
    of_members = np.tensordot(share, entropy(stack, axis=3), 1)
    return of_mean.mean(1), (of_mean - of_members).mean(1), (1 - polled.max(2)).mean(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 0.7]])
def test_streaming_equals_the_stacked_formula(mode: Mode, weights) -> None:
    members = random_members(mode, 1)
    maps = maps_of(mode, members, weights, threshold=0.3)
    for found, expected in zip(maps, by_hand(mode, members, weights, threshold=0.3), strict=True):
        assert found.dtype == torch.float32
        assert found.shape == (2, 5, 6)
        np.testing.assert_allclose(found, expected, atol=CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_entropy_may_be_that_of_other_probabilities(mode: Mode) -> None:
    members, calibrated = random_members(mode, 2), random_members(mode, 3, 1)[0]
    plain, found = maps_of(mode, members), maps_of(mode, members, combined=calibrated)
    np.testing.assert_allclose(found.entropy, by_hand(mode, [calibrated], [1.0])[0], atol=CLOSE)
    assert torch.equal(found.mutual_information, plain.mutual_information)
    assert torch.equal(found.variation_ratio, plain.variation_ratio)


@given(modes, seeds, st.integers(1, 6), st.floats(0, 30))
def test_mutual_information_lies_between_zero_and_the_entropy(mode: Mode, seed, count, spread) -> None:
    maps = maps_of(mode, random_members(mode, seed, count, spread))
    assert (maps.mutual_information >= 0).all()
    assert (maps.mutual_information <= maps.entropy).all()
    assert (maps.entropy <= max_entropy(mode, outputs_of(mode)) + CLOSE).all()


@given(modes, seeds, st.integers(1, 9), st.floats(0.01, 10))
def test_members_that_agree_hold_no_information(mode: Mode, seed, copies, weight) -> None:
    member = random_members(mode, seed, 1)[0]
    maps = maps_of(mode, [member] * copies, [weight] * copies)
    assert maps.mutual_information.max() <= CLOSE
    assert (maps.variation_ratio == 0).all()
    np.testing.assert_allclose(maps.entropy, maps_of(mode, [member]).entropy, atol=CLOSE)


@given(modes, seeds, st.permutations(range(5)), st.floats(1e-3, 1e3))
def test_neither_order_nor_the_scale_of_weights_matters(mode: Mode, seed, order, scale) -> None:
    members, weights = random_members(mode, seed, 5), [1.0, 0.5, 2.0, 0.1, 1.0]
    found = maps_of(mode, [members[i] for i in order], [weights[i] * scale for i in order])
    for one, other in zip(found, maps_of(mode, members, weights), strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)


@given(modes, seeds, st.integers(1, 8))
def test_the_variation_ratio_is_a_share_of_votes(mode: Mode, seed, count) -> None:
    ratio = maps_of(mode, random_members(mode, seed, count)).variation_ratio
    assert (ratio >= 0).all()
    assert (ratio <= 1 - 1 / count + CLOSE).all()
    if mode == "binary":
        assert (ratio <= 0.5 + CLOSE).all()
        np.testing.assert_allclose(ratio * count, (ratio * count).round(), atol=CLOSE * count)


@pytest.mark.parametrize("mode", MODES)
def test_members_of_weight_zero_do_not_matter(mode: Mode) -> None:
    first, second = random_members(mode, 4, 2)
    broken = torch.full_like(first, math.nan)
    found = maps_of(mode, [broken, first, broken, second], [0.0, 1.0, 0.0, 2.0])
    for one, other in zip(found, maps_of(mode, [first, second], [1.0, 2.0]), strict=True):
        assert torch.equal(one, other)


def test_certain_members_that_disagree_differ_by_all_there_is() -> None:
    """Four one-hot members, each for another class: log 4 nats, all of it mutual information."""
    one_hot = torch.eye(4).view(4, 1, 4, 1, 1)
    maps = maps_of("multiclass", one_hot)
    assert maps.entropy.item() == pytest.approx(math.log(4), abs=CLOSE)
    assert maps.mutual_information.item() == pytest.approx(math.log(4), abs=CLOSE)
    assert maps.variation_ratio.item() == 0.75
    assert max_entropy("multiclass", 4) == math.log(4)
    assert max_entropy("binary", 1) == max_entropy("multilabel", 7) == math.log(2)


def test_the_threshold_decides_the_votes() -> None:
    members = [torch.full((1, 1, 1, 1), value) for value in (0.3, 0.4, 0.5)]
    ratios = [maps_of("binary", members, threshold=t).variation_ratio.item() for t in (0.3, 0.4, 0.5, 0.6)]
    assert ratios == pytest.approx([0, 1 / 3, 1 / 3, 0], abs=CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_counts_in_float32(mode: Mode) -> None:
    members = [member.half() for member in random_members(mode, 5)]
    members[0][0] = 1 + 2**-10  # as rounding does
    expected = maps_of(mode, [member.float().clamp(0, 1) for member in members])
    for one, other in zip(maps_of(mode, members), expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_no_members_probabilities_are_kept_or_changed(mode: Mode) -> None:
    maps = UncertaintyMaps(mode)
    held = []
    for seed in range(4):
        member = random_members(mode, seed, 1)[0].clone()
        before = member.clone()
        maps.update(member)
        assert torch.equal(member, before)
        held.append((weakref.ref(member), member.data_ptr()))
        state = sum(value.numel() for value in vars(maps).values() if isinstance(value, torch.Tensor))
        assert state <= 3 * member.numel() + 1
        assert all(value.data_ptr() != held[-1][1] for value in vars(maps).values() if isinstance(value, torch.Tensor))
        del member
    assert all(reference() is None for reference, _ in held)


@pytest.mark.parametrize("mode", MODES)
def test_compute_may_come_between_members(mode: Mode) -> None:
    members = random_members(mode, 6)
    maps = UncertaintyMaps(mode)
    for count, member in enumerate(members, 1):
        maps.update(member)
        first, again = maps.compute(), maps.compute()
        for one, other, fresh in zip(first, again, maps_of(mode, members[:count]), strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, fresh)


def test_image_scores_are_means_over_valid_pixels() -> None:
    maps = maps_of("multiclass", random_members("multiclass", 7))
    valid = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    every, some = image_scores(maps), image_scores(maps, valid)
    assert every.shape == some.shape == (2, 3)
    for index, values in enumerate(maps):
        for image in range(2):
            exact = values[image].double().numpy()
            assert every[image, index].item() == pytest.approx(exact.mean(), abs=CLOSE)
            assert some[image, index].item() == pytest.approx(exact[valid[image].numpy()].mean(), abs=CLOSE)
    valid[1] = False
    scores = image_scores(maps, valid)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().all()
    with pytest.raises(DataError, match=r"boolean `valid` of shape \(2, 5, 6\), came torch.int64 of shape \(2, 5, 6\)"):
        image_scores(maps, valid.long())
    with pytest.raises(DataError, match=r"of shape \(1, 5, 6\)"):
        image_scores(maps, valid[:1])


def test_without_members_there_are_no_maps() -> None:
    maps = UncertaintyMaps("binary")
    with pytest.raises(ConfigError, match="at least one member with a weight above 0"):
        maps.compute()
    maps.update(torch.zeros(1, 1, 2, 2), 0.0)
    with pytest.raises(ConfigError, match="at least one member with a weight above 0"):
        maps.compute()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold in 0..1, came 1.5"):
        UncertaintyMaps("binary", 1.5)
    maps = UncertaintyMaps("binary")
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="a weight of 0 or more"):
            maps.update(torch.zeros(1, 1, 2, 2), weight)
    for shape in ((1, 2, 2, 2), (1, 2, 2)):
        with pytest.raises(DataError, match="binary probabilities of shape"):
            maps.update(torch.zeros(shape))
    maps.update(torch.zeros(1, 1, 2, 2))
    for add in (maps.update, maps.compute):
        with pytest.raises(DataError, match=r"of shape \(1, 1, 2, 2\), came \(2, 1, 2, 2\)"):
            add(torch.zeros(2, 1, 2, 2))
