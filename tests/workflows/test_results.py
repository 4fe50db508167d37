"""Reports: a table for people, JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.workflows.results import Report, format_table

cells = st.none() | st.text("abc é", max_size=5) | st.integers(-99, 9999) | st.floats(-10, 10)


def test_a_table_and_its_notes():
    report = Report({}, [{"model": "a", "IoU": 0.5, "step": 10}, {"model": "best", "IoU": 1.0, "step": 5}], ["a note"])
    assert report.text().splitlines() == [
        "model     IoU  step",
        "-----  ------  ----",
        "a      0.5000    10",
        "best   1.0000     5",
        "a note",
    ]


def test_no_rows_no_table():
    assert format_table([]) == []
    assert Report({"x": 1}, (), ["done"]).text() == "done"


def test_what_is_unknown_is_a_dash():
    assert format_table([{"x": None}])[-1] == "-"


@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5))
def test_columns_line_up(rows):
    lines = format_table([{"one": one, "two": two, "three": three} for one, two, three in rows])
    assert len(lines) == len(rows) + 2
    rule = lines[1]
    assert set(rule) == {"-", " "}
    assert all(len(line) <= len(rule) and line == line.rstrip() for line in lines)
    gaps = [at for at, sign in enumerate(rule) if sign == " "]
    assert all(line[at] == " " for line in lines for at in gaps if at < len(line))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float64("nan")])
def test_json_has_no_words_that_parsers_refuse(value):
    report = Report({"metrics": {"iou": value, "dice": 0.5}, "list": [value, (1, value)], "ok": True})
    found = json.loads(report.json(), parse_constant=pytest.fail)
    assert found == {"metrics": {"iou": None, "dice": 0.5}, "list": [None, [1, None]], "ok": True}


@given(st.dictionaries(st.text(max_size=4), st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1, 1)))
def test_json_is_what_was_measured(values):
    assert json.loads(Report(values).json()) == values


def test_paths_become_text():
    assert json.loads(Report({"output": Path("a") / "b"}).json()) == {"output": str(Path("a") / "b")}
