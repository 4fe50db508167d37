"""Each part is scored by what was chosen without it: against the same written out in NumPy, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from ensembling.pools import TASKS, make_codes, make_pool, overlap, plain_score
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.ensembling.cross_fitting import CrossFit, contributions, cross_fit
from smp_ensemble.ensembling.diverse import select_diverse
from smp_ensemble.ensembling.greedy import select_greedily
from smp_ensemble.ensembling.selection import Selection
from smp_ensemble.ensembling.tally import MOST_ADDITIONS

PARTS = 3


def written_out(mode, codes, truth, metric, selector):
    """Selected and best, each from the mean of every pixel under what was chosen without that pixel's part."""
    places = np.array_split(np.arange(codes.shape[2]), PARTS)
    sign = -1 if metric == "val_nll" else 1
    means = np.zeros((2, *codes.shape[1:]))
    for held in places:
        rest = np.setdiff1d(np.arange(codes.shape[2]), held)
        pool = make_pool(mode, codes[:, :, rest], truth[..., rest], metric)
        chosen = selector(pool, 3)
        weights = np.zeros(len(codes))
        for member, weight in zip(chosen.members, chosen.weights, strict=True):
            weights[member.step] = weight
        means[0][:, held] = np.tensordot(weights, codes[:, :, held].astype(float), 1)
        own = [
            sign * plain_score(mode, codes[:, :, rest], truth[..., rest], np.eye(len(codes), dtype=int)[one], metric)
            for one in range(len(codes))
        ]
        means[1][:, held] = codes[int(np.argmax(own))][:, held]
    means = np.round(means, 9)  # sums of floats
    if mode == "multiclass" and metric != "val_nll":
        decided = means.argmax(axis=1)
        return [
            float(np.nanmean([overlap(one == k, truth == k, metric) for k in range(codes.shape[1])])) for one in decided
        ]
    return [plain_score(mode, np.floor(one)[None], truth, [1], metric) for one in means]


@pytest.mark.parametrize("selector", [select_greedily, select_diverse])
@pytest.mark.parametrize("metric", ["val_iou", "val_dice", "val_nll"])
@pytest.mark.parametrize("mode", sorted(TASKS))
def test_it_is_what_numpy_says(mode, metric, selector):
    codes, truth = make_codes(mode, 5, 6, pixels=240)
    found = cross_fit(make_pool(mode, codes, truth, metric, PARTS), selector, 3)
    assert [found.selected, found.best] == pytest.approx(written_out(mode, codes, truth, metric, selector), abs=1e-12)
    assert found.everyone == pytest.approx(plain_score(mode, codes, truth, [1] * 6, metric), abs=1e-12)
    assert (found.parts, found.lower_is_better) == (PARTS, metric == "val_nll")


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(TASKS)), st.sampled_from(["val_iou", "val_nll"]))
def test_where_all_parts_are_alike_nothing_was_luck(seed, mode, metric):
    codes, truth = make_codes(mode, seed, 5, pixels=60)
    codes, truth = np.tile(codes, 3), np.tile(truth, 3)
    pool = make_pool(mode, codes, truth, metric, 3)
    selection = select_greedily(pool, 3)
    found = cross_fit(pool, select_greedily, 3)
    assert found.selected == selection.path[selection.kept - 1].score
    assert found.best == (min if metric == "val_nll" else max)(pool.singles)


def test_what_greedy_gains_among_many_equal_candidates_is_luck():
    """All have the same skill; the score on what it looked at is above that on what it did not, pool by pool."""
    luck = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = (rng.random(150) < 0.4).astype(int)
        logits = (2 * truth - 1) + rng.normal(0, 2, (20, 150))
        codes = np.floor(256 / (1 + np.exp(-logits))).clip(0, 255).astype(np.uint8)[:, None]
        pool = make_pool("binary", codes, truth)
        selection = select_greedily(pool, 5)
        luck.append(selection.path[selection.kept - 1].score - cross_fit(pool, select_greedily, 5).selected)
    assert np.mean(luck) > 0.03
    assert min(luck) > 0


def test_a_pool_in_one_piece_says_nothing():
    codes, truth = make_codes("binary", 0, 3)
    assert cross_fit(make_pool("binary", codes, truth, parts=1), select_greedily, 3) is None


def test_a_part_without_valid_pixels_and_one_without_foreground_count_as_they_are():
    codes, truth = make_codes("binary", 1, 4, pixels=60)
    truth[30:] = 0
    pool = make_pool("binary", codes, truth, parts=2)
    divided = [[], *pool.parts]
    found = cross_fit(type(pool)(pool.candidates, pool.task, pool.metric, pool.blocks, divided), select_greedily, 3)
    assert found.parts == 3
    assert 0 <= found.selected <= 1
    assert found.everyone == pool.score([1] * 4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_contributions_have_the_weights_they_came_from(counts):
    weights = [count / sum(counts) for count in counts]
    found = contributions(weights)
    assert [count / sum(found) for count in found] == pytest.approx(weights)
    assert sum(found) <= sum(counts)


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_weights_that_no_short_sum_has_are_met_nearly(raw):
    weights = [one / sum(raw) for one in raw]
    found = contributions(weights)
    assert min(found) >= 1
    assert sum(found) <= MOST_ADDITIONS
    assert [count / sum(found) for count in found] == pytest.approx(weights, abs=0.05)


def test_weights_of_a_plugin_need_not_be_fractions():
    def select(pool, _):
        return Selection(list(pool.candidates[:2]), [1 / np.e, 1 - 1 / np.e], [], 0)

    codes, truth = make_codes("binary", 2, 3)
    found = cross_fit(make_pool("binary", codes, truth), select, 2)
    mean = (codes[0] / np.e + codes[1] * (1 - 1 / np.e))[None]
    assert found.selected == pytest.approx(plain_score("binary", np.floor(mean), truth, [1], "val_iou"), abs=0.02)


@pytest.mark.parametrize(
    ("selected", "best", "everyone", "lower", "pays", "mean"),
    [
        (0.6, 0.5, 0.4, False, True, False),
        (0.6, 0.5, 0.6, False, False, True),
        (0.6, 0.7, None, False, False, False),
        (0.6, 0.7, 0.65, True, True, True),
        (0.6, 0.55, 0.7, True, False, False),
    ],
)
def test_selection_pays_where_it_beats_both_that_need_none(selected, best, everyone, lower, pays, mean):
    found = CrossFit(3, selected, best, everyone, lower)
    assert (found.pays, found.mean_beats_best) == (pays, mean)
    assert found.to_dict()["pays"] is pays
