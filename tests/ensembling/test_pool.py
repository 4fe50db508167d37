"""Scores and disagreement of pools are those of plain NumPy on the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from ensembling.pools import TASKS, make_codes, make_pool, plain_score

from smp_ensemble.ensembling.pool import METRICS, CandidatePool
from smp_ensemble.exceptions import ConfigError

every_mode = pytest.mark.parametrize("mode", TASKS)


@every_mode
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [1, 0, 0, 0], [3, 0, 1, 2]])
def test_scores_are_those_of_plain_numpy(mode, metric, counts):
    codes, truth = make_codes(mode, 1, 4)
    pool = make_pool(mode, codes, truth, metric)
    found = pool.scores_with(counts, [0, 1, 3])
    for place, index in enumerate([0, 1, 3]):
        more = [count + (at == index) for at, count in enumerate(counts)]
        assert found[place] == pytest.approx(plain_score(mode, codes, truth, more, metric), abs=1e-12)
        assert found[place] == pool.score(more)


@every_mode
def test_blocks_change_nothing(mode):
    codes, truth = make_codes(mode, 2, 3)
    for metric in METRICS:
        one, many = (make_pool(mode, codes, truth, metric, parts) for parts in (1, 7))
        assert np.array_equal(one.singles, many.singles)
        assert np.array_equal(one.disagreement, many.disagreement)


@every_mode
def test_disagreement_is_counted_on_decisions(mode):
    codes, truth = make_codes(mode, 3, 4)
    if mode == "multiclass":
        decisions = codes.argmax(axis=1)
    elif mode == "multilabel":
        decisions = codes >= 128
    else:
        decisions = []
        for one in codes[:, 0]:
            scores = [((one >= c) & (truth == 1)).sum() / ((one >= c) | (truth == 1)).sum() for c in range(1, 256)]
            best = max(range(1, 256), key=lambda c: (scores[c - 1], -abs(c - 128), -c))
            decisions.append(one >= best)
        decisions = np.array(decisions)
    expected = [[(first != second).mean() for second in decisions] for first in decisions]
    np.testing.assert_allclose(make_pool(mode, codes, truth).disagreement, expected, rtol=0, atol=1e-12)


def test_without_foreground_the_score_is_0_and_not_nothing():
    codes, truth = make_codes("binary", 0, 3)
    assert make_pool("binary", codes, np.zeros_like(truth)).singles.tolist() == [0, 0, 0]


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    codes, truth = make_codes("multiclass", 0, 2)
    codes[:, 2] = 0
    truth = np.minimum(truth, 1)
    expected = [plain_score("multiclass", codes, truth, counts, "val_iou") for counts in ([1, 0], [0, 1])]
    assert make_pool("multiclass", codes, truth).singles.tolist() == pytest.approx(expected)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match=r"members are not selected by val_ece.*val_iou.*top-k"):
        CandidatePool([], TASKS["binary"], "val_ece", [])
    pool = make_pool("binary", *make_codes("binary", 0, 2))
    with pytest.raises(ConfigError, match="at least one candidate"):
        pool.score([0, 0])
    with pytest.raises(ConfigError, match="at most 257 contributions, got 258"):
        pool.scores_with([257, 0], [1])


def test_sums_do_not_overflow_at_the_most_contributions():
    codes, truth = make_codes("binary", 0, 2)
    codes[0] = 255 - codes[0] // 8
    pool = make_pool("binary", codes, truth)
    assert pool.scores_with([256, 0], [0])[0] == pool.singles[0]
