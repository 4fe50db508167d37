"""The figure and the numbers of a selection say what the selector saw."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from ensembling.pools import make_codes, make_pool

from smp_ensemble.ensembling.cross_fitting import CrossFit
from smp_ensemble.ensembling.diverse import select_diverse
from smp_ensemble.ensembling.greedy import select_greedily
from smp_ensemble.evaluation.drawing import ACCENT, number, png_bytes
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


@pytest.mark.parametrize(
    ("selected", "everyone", "lower", "advice"),
    [
        (0.40, 0.42, False, "selector=all"),
        (0.40, 0.38, False, "selector=top-k with max-members=1"),
        (0.40, None, False, "selector=top-k with max-members=1"),
        (0.43, 0.38, True, "selector=all"),
    ],
)
def test_what_selection_is_worth_on_other_images_is_said_and_drawn(selected, everyone, lower, advice):
    crossed = CrossFit(3, selected, 0.41, everyone, lower)
    _, _, without = numbers_of()
    numbers = dataclasses.replace(without, crossed=crossed)
    assert numbers.sentence().startswith(without.sentence())
    assert f"no say in the choice: {number(selected)}, the best candidate alone {number(0.41)}" in numbers.sentence()
    assert ("the mean of all" in numbers.sentence()) == (everyone is not None)
    assert f"{advice} is as good or better" in numbers.advice()
    assert numbers.metrics()["crossfit_selected_val_iou"] == selected
    assert ("crossfit_all_val_iou" in numbers.metrics()) == (everyone is not None)
    assert numbers.to_dict()["cross_fit"] == crossed.to_dict()
    assert (without.metrics(), without.to_dict()["cross_fit"]) == ({}, None)
    right = draw_selection(numbers).axes[1]
    dashed = [line for line in right.lines if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in dashed] == [{selected}]
    low, high = right.get_ylim()
    assert low < selected < high


@pytest.mark.parametrize(("selector", "candidates"), [(select_diverse, 6), (select_greedily, 1)])
def test_few_and_single_candidates_are_drawn(selector, candidates):
    _, _, numbers = numbers_of(selector, candidates)
    assert png_bytes(draw_selection(numbers)).startswith(b"\x89PNG")
    if candidates == 1:
        assert math.isnan(numbers.disagreement[0])
        assert numbers.to_dict()["candidates"][0]["disagreement"] is None
        assert numbers.sentence().startswith("greedy chose 1 of 1 candidate:")
