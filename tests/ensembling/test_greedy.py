"""Greedy selection is Caruana's, step by step, as a straightforward implementation has it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ensembling.pools import TASKS, make_codes, make_pool, plain_score
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.ensembling.greedy import ADDITIONS_PER_MEMBER, select_greedily
from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.testing import check_selector

METRICS = ("val_iou", "val_dice", "val_nll")
every_mode = pytest.mark.parametrize("mode", TASKS)


def plain_greedy(mode, codes, truth, max_members, metric):
    """The procedure as its authors describe it: counts of the best prefix, and all scores."""
    sign = -1 if metric == "val_nll" else 1
    chosen, scores = [], []
    for _ in range(ADDITIONS_PER_MEMBER * max_members):
        options = []
        for index in range(len(codes)):
            if index not in chosen and len(set(chosen)) == max_members:
                continue
            counts = [[*chosen, index].count(at) for at in range(len(codes))]
            score = round(sign * plain_score(mode, codes, truth, counts, metric), 12)
            loss = round(plain_score(mode, codes, truth, counts, "val_nll"), 12)
            options.append((score, index in chosen, -loss, -index))
        best = max(options)
        chosen.append(-best[-1])
        scores.append(best[0])
    size = scores.index(max(scores)) + 1
    return {index: chosen[:size].count(index) / size for index in set(chosen[:size])}, chosen


def by_place(selection):
    """Weight by the candidate's place."""
    return {member.step: weight for member, weight in zip(selection.members, selection.weights, strict=True)}


@every_mode
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_it_equals_a_straightforward_implementation(mode, metric, seed):
    codes, truth = make_codes(mode, seed, 6, pixels=90)
    selection = select_greedily(make_pool(mode, codes, truth, metric), 3)
    weights, chosen = plain_greedy(mode, codes, truth, 3, metric)
    assert [step.candidate.step for step in selection.path] == chosen
    assert by_place(selection) == pytest.approx(weights)


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_members_that_are_in_then_to_the_lower_loss_then_to_the_better_rank(seed):
    # Few pixels and coarse codes: many scores are equal.
    codes, truth = make_codes("binary", seed, 6, pixels=12)
    codes = (codes // 64 * 64).astype(np.uint8)
    codes[3] = codes[1]
    selection = select_greedily(make_pool("binary", codes, truth), 3)
    weights, chosen = plain_greedy("binary", codes, truth, 3, "val_iou")
    assert [step.candidate.step for step in selection.path] == chosen
    assert by_place(selection) == pytest.approx(weights)


def test_the_gap_to_the_best_of_all_subsets_is_small():
    gaps = []
    for mode, seed in itertools.product(TASKS, range(5)):
        codes, truth = make_codes(mode, seed, 7)
        pool = make_pool(mode, codes, truth)
        subsets = (c for size in (1, 2, 3) for c in itertools.combinations(range(7), size))
        best = max(pool.score([int(index in subset) for index in range(7)]) for subset in subsets)
        found = select_greedily(pool, 3)
        gaps.append(best - found.path[found.kept - 1].score)
    # Negative: weights that are not equal do better than any subset.
    assert max(gaps) < 0.002
    assert np.mean(gaps) < 0


@settings(max_examples=25)
@given(
    st.sampled_from(list(TASKS)), st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 4), st.sampled_from(METRICS)
)
def test_laws(mode, seed, candidates, max_members, metric):
    codes, truth = make_codes(mode, seed, candidates, pixels=40)
    pool = make_pool(mode, codes, truth, metric)
    selection = select_greedily(pool, max_members)
    final = pool.score([round(by_place(selection).get(at, 0) * selection.kept) for at in range(candidates)])
    assert final == selection.path[selection.kept - 1].score
    assert pool.sign * final >= max(pool.sign * pool.singles)
    assert sum(selection.weights) == pytest.approx(1)
    assert 1 <= len(selection.members) <= max_members
    order = np.random.default_rng(seed).permutation(candidates)
    moved = select_greedily(make_pool(mode, codes[order], truth, metric), max_members)
    if len(np.unique(codes, axis=0)) == candidates and len({step.score for step in selection.path}) > 1:
        assert moved.path[0].score == selection.path[0].score
        again = {int(order[place]): weight for place, weight in by_place(moved).items()}
        if pool.losses_with([0] * candidates, range(candidates)).tolist().count(moved.path[0].score) <= 1:
            assert again == pytest.approx(by_place(selection))


def test_one_good_candidate_stays_alone():
    codes, truth = make_codes("binary", 0, 4)
    codes[2, 0] = np.where(truth == 1, 250, 5)
    selection = select_greedily(make_pool("binary", codes, truth), 3)
    assert by_place(selection) == {2: 1.0}
    assert selection.kept == 1


def test_it_keeps_a_selectors_promises():
    check_selector(make_selector("greedy"))
