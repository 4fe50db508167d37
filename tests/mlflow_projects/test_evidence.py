"""What a default cites is what the rows of the study say: `Evidence: STUDY, N epochs, METHOD SYSTEM: +1.23 points`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from study import plan, statistics
from study.lines import lines_of

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "mlflow_projects" / "benchmark"
CITATION = re.compile(
    r"Evidence: (?P<study>[\w-]+), (?P<epochs>\d+) epochs, (?P<method>[\w.-]+) (?P<system>[a-z ]+): "
    r"(?P<value>[+-]\d+\.\d+) (?P<unit>points|thousandths)"
)


def citations() -> list[tuple[str, re.Match[str]]]:
    found = []
    for path in sorted((ROOT / "smp_ensemble").rglob("*.py")):
        text = re.sub(r"\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))  # a citation may be broken into lines
        found += [(path.relative_to(ROOT).as_posix(), match) for match in CITATION.finditer(text)]
    return found


@cache
def lines(study: str, epochs: int) -> dict[tuple[str, str], statistics.Estimate]:
    declared = plan.read_study(BENCHMARK / "studies" / f"{study}.yaml")
    rows = plan.read_rows(BENCHMARK / "results" / f"{study}.jsonl")
    return {line.key: line for line in lines_of(declared, statistics.collect(rows.values(), epochs))}


@pytest.mark.parametrize(("place", "match"), citations(), ids=lambda value: getattr(value, "string", value)[:40])
def test_a_cited_difference_is_that_of_the_rows(place, match):
    line = lines(match["study"], int(match["epochs"]))[match["method"], match["system"]]
    if match["unit"] == "points":
        assert f"{100 * line.iou.value:+.2f}" == match["value"], place
    else:
        assert f"{1000 * line.nll.value:+.1f}" == match["value"], place


def test_the_methods_and_the_options_of_training_cite_rows():
    places = {place for place, _ in citations()}
    assert {"smp_ensemble/training/trainers.py", "smp_ensemble/training/fit_options.py"} <= places
    assert len(citations()) >= 8
