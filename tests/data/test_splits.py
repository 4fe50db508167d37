from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.data.splits import bootstrap_split, fold_split, holdout_split
from smp_ensemble.exceptions import ConfigError


@st.composite
def labelled(draw, least: int, *, grouped: bool):
    count = draw(st.integers(least, 40))
    classes = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    presence = rng.random((count, classes)) < rng.random(classes)
    if not grouped:
        return presence, None
    kinds = draw(st.integers(least, count))
    groups = [*range(kinds), *rng.integers(0, kinds, count - kinds)]
    return presence, [f"g{group}" for group in groups]


def sides_share_no_group(groups, *sides):
    found = [{groups[index] for index in side} for side in sides]
    return sum(map(len, found)) == len(set().union(*found))


@settings(deadline=None)
@given(st.booleans().flatmap(lambda grouped: labelled(3, grouped=grouped)), st.integers(0, 5))
def test_a_holdout_parts_all_images_and_no_group(data, seed):
    presence, groups = data
    parts = holdout_split(presence, groups, (0.2, 0.15), seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(presence)))
    assert all(len(part) for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert groups is None or sides_share_no_group(groups, *parts)
    again = holdout_split(presence, groups, (0.2, 0.15), seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@settings(deadline=None)
@given(st.booleans().flatmap(lambda grouped: labelled(4, grouped=grouped)), st.integers(2, 4), st.integers(0, 5))
def test_each_image_is_left_out_in_one_fold(data, folds, seed):
    presence, groups = data
    split = fold_split(presence, groups, folds, seed)
    assert len(split) == folds
    assert sorted(np.concatenate([val for _, val in split]).tolist()) == list(range(len(presence)))
    for train, val in split:
        assert len(train)
        assert len(val)
        assert sorted([*train, *val]) == list(range(len(presence)))
        assert groups is None or sides_share_no_group(groups, train, val)


@given(st.booleans().flatmap(lambda grouped: labelled(2, grouped=grouped)), st.integers(0, 9), st.integers(0, 5))
def test_a_bootstrap_sample_draws_as_many_and_leaves_the_others_out(data, sample, seed):
    groups = data[1]
    images = len(data[0])
    drawn, left_out = bootstrap_split(images, groups, sample, seed)
    assert len(drawn)
    assert len(left_out)
    assert sorted({*drawn, *left_out}) == list(range(images))
    assert not set(drawn) & set(left_out)
    assert (np.diff(drawn) >= 0).all()
    assert (np.diff(left_out) > 0).all()
    if groups is None:
        assert len(drawn) == images
    else:
        assert sides_share_no_group(groups, drawn, left_out)
        times = {group: set() for group in groups}
        for index in range(images):
            times[groups[index]].add(int((drawn == index).sum()))
        assert all(len(found) == 1 for found in times.values())  # a group is drawn whole, each time
        assert sum(found.pop() for found in times.values()) == len(times)
    again = bootstrap_split(images, groups, sample, seed)
    assert np.array_equal(again[0], drawn)
    assert np.array_equal(again[1], left_out)


def test_bootstrap_samples_leave_out_37_percent():
    shares = [len(bootstrap_split(500, None, sample, seed=0)[1]) / 500 for sample in range(20)]
    assert np.mean(shares) == pytest.approx((1 - 1 / 500) ** 500, abs=0.01)
    assert len({tuple(bootstrap_split(9, None, sample, seed)[0]) for sample in range(3) for seed in range(3)}) == 9


def test_shares_and_rare_classes_are_kept():
    presence = np.zeros((200, 3), dtype=bool)
    presence[:, 0] = True
    presence[:40, 1] = True
    presence[:20, 2] = True
    train, val, test = holdout_split(presence, None, (0.2, 0.1), seed=3)
    assert (len(train), len(val), len(test)) == (140, 40, 20)
    assert presence[val].sum(axis=0).tolist() == [40, 8, 4]
    assert presence[test].sum(axis=0).tolist() == [20, 4, 2]
    for _, fold in fold_split(presence, None, 5, seed=3):
        assert presence[fold].sum(axis=0).tolist() == [40, 8, 4]


def test_other_seeds_give_other_splits():
    presence = np.ones((50, 1), dtype=bool)
    assert len({tuple(holdout_split(presence, None, (0.2,), seed)[1]) for seed in range(5)}) == 5


def test_a_fraction_of_nothing_gives_an_empty_part():
    train, val, test = holdout_split(np.ones((10, 1), dtype=bool), None, (0.2, 0.0), seed=0)
    assert (len(train), len(val), len(test)) == (8, 2, 0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda p: holdout_split(p, None, (0.5, 0.5), 0), "holdout: .* a sum below 1, found 0.5, 0.5"),
        (lambda p: holdout_split(p, None, (-0.1,), 0), "holdout: expected fractions of at least 0"),
        (lambda p: holdout_split(p[:2], None, (0.2, 0.2), 0), "a split into 3 parts needs at least 3 images, found 2"),
        (lambda p: holdout_split(p, ["a"] * 9 + ["b"], (0.2, 0.2), 0), "3 parts needs at least 3 groups, found 2"),
        (lambda p: fold_split(p, None, 1, 0), "folds: expected at least 2, found 1"),
        (lambda p: fold_split(p, None, 11, 0), "11 folds needs at least 11 images, found 10"),
        (lambda p: fold_split(p, ["a", "b"] * 5, 3, 0), "3 folds needs at least 3 groups, found 2"),
        (lambda p: bootstrap_split(10, ["a"] * 10, 0, 0), "a bootstrap sample needs at least 2 groups, found 1"),
    ],
)
def test_what_cannot_be_split_is_refused(split, message):
    with pytest.raises(ConfigError, match=message):
        split(np.ones((10, 2), dtype=bool))
