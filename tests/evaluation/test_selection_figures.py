"""The figure and the numbers of a selection say what the selector saw."""

from __future__ import annotations

import json
import math

import pytest
from ensembling.pools import make_codes, make_pool

from smp_ensemble.ensembling.diverse import select_diverse
from smp_ensemble.ensembling.greedy import select_greedily
from smp_ensemble.evaluation.drawing import ACCENT, png_bytes
from smp_ensemble.evaluation.selection_figures import SelectionNumbers, draw_selection


def numbers_of(selector=select_greedily, candidates=8, metric="val_iou"):
    pool = make_pool("binary", *make_codes("binary", 3, candidates), metric)
    selection = selector(pool, 3)
    return pool, selection, SelectionNumbers.of("greedy", pool, selection)


@pytest.mark.parametrize("metric", ["val_iou", "val_nll"])
def test_the_numbers_are_the_pools_and_the_selections(metric):
    pool, selection, numbers = numbers_of(metric=metric)
    assert numbers.scores == pool.singles.tolist()
    for index in range(8):
        others = [pool.disagreement[index, other] for other in range(8) if other != index]
        assert numbers.disagreement[index] == pytest.approx(sum(others) / 7)
    assert {numbers.candidates[index] for index in numbers.chosen} == {member.uri for member in selection.members}
    assert numbers.scores[numbers.best] == (min if metric == "val_nll" else max)(numbers.scores)
    written = json.loads(json.dumps(numbers.to_dict(), allow_nan=False))
    assert [step[metric] for step in written["path"]] == [step.score for step in selection.path]
    assert sum(row["weight"] for row in written["candidates"]) == pytest.approx(1)


def test_the_figure_marks_what_was_kept():
    _, selection, numbers = numbers_of()
    left, right = draw_selection(numbers).axes
    orange = [line for line in right.lines if line.get_color() == ACCENT]
    assert list(orange[0].get_ydata()) == [step.score for step in selection.path[: selection.kept]]
    assert list(orange[-1].get_xdata()) == [selection.kept]
    assert sum(len(points.get_offsets()) for points in left.collections) == 8
    assert len(left.collections[1].get_offsets()) == len(selection.members)
    assert "alone" in draw_selection(numbers).get_suptitle()


@pytest.mark.parametrize(("selector", "candidates"), [(select_diverse, 6), (select_greedily, 1)])
def test_few_and_single_candidates_are_drawn(selector, candidates):
    _, _, numbers = numbers_of(selector, candidates)
    assert png_bytes(draw_selection(numbers)).startswith(b"\x89PNG")
    if candidates == 1:
        assert math.isnan(numbers.disagreement[0])
        assert numbers.to_dict()["candidates"][0]["disagreement"] is None
        assert numbers.sentence().startswith("greedy chose 1 of 1 candidate:")
