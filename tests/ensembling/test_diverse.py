"""Diverse selection: the best first, then what its formula says."""

from __future__ import annotations

import numpy as np
import pytest
from ensembling.pools import TASKS, make_codes, make_pool, plain_score

from smp_ensemble.ensembling.diverse import SHARE, select_diverse
from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.testing import check_selector


@pytest.mark.parametrize("mode", TASKS)
@pytest.mark.parametrize("metric", ["val_iou", "val_nll"])
def test_each_addition_has_the_most_of_score_and_disagreement(mode, metric):
    codes, truth = make_codes(mode, 4, 7)
    pool = make_pool(mode, codes, truth, metric)
    sign = -1 if metric == "val_nll" else 1
    own = np.array([sign * plain_score(mode, codes, truth, list(np.eye(7, dtype=int)[at]), metric) for at in range(7)])
    own = (own - own.min()) / (own.max() - own.min())
    chosen = [int(own.argmax())]
    while len(chosen) < 4:
        apart = np.mean([pool.disagreement[at] for at in chosen], axis=0) / pool.disagreement.max()
        worth = (1 - SHARE) * own + SHARE * apart
        worth[chosen] = -1
        chosen.append(int(worth.argmax()))
    selection = select_diverse(pool, 4)
    assert [member.step for member in selection.members] == chosen
    assert selection.weights == [0.25] * 4
    counts = np.isin(np.arange(7), chosen).astype(int).tolist()
    assert selection.path[-1].score == pytest.approx(plain_score(mode, codes, truth, counts, metric))


def test_a_copy_of_the_best_is_not_what_it_takes():
    codes, truth = make_codes("binary", 0, 5)
    best = int(make_pool("binary", codes, truth).singles.argmax())
    twice = np.concatenate([codes, codes[best : best + 1]])
    selection = select_diverse(make_pool("binary", twice, truth), 2)
    assert selection.members[0].step == best
    assert selection.members[1].step != 5


def test_all_alike_is_no_error():
    codes, truth = make_codes("binary", 0, 1)
    selection = select_diverse(make_pool("binary", np.repeat(codes, 3, axis=0), truth), 2)
    assert [member.step for member in selection.members] == [0, 1]


def test_it_keeps_a_selectors_promises():
    check_selector(make_selector("diverse"))
