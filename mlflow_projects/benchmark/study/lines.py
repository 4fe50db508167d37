"""Lines of a study's table: each system that has a seed with all folds, beside the baseline, and what is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from study.plan import BASELINE, SEEDS
from study.statistics import BEST, Estimate, Table, choose, difference, table_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from study.plan import Study
    from study.statistics import Key

SINGLE: Key = (BASELINE, "last")
SHOWN = (
    "last", "refreshed", "crops", "best", "best of crops", "all", "all refreshed", "all best",
    "greedy", "greedy refreshed", "soup", "soup crops", "soup best", "flips",
)  # fmt: skip
CHOSEN, CHOSEN_SINGLE = ("chosen on val", ""), ("chosen on val, one network", "")
CHOSEN_WIDE = ("chosen on val of other folds too", "")
CHOSEN_OWN = ("chosen on val, greedy by its own score", "")
LEAST_GAIN, LEAST_SHARE = 0.01, 0.7
"""The target of the studies: test IoU that is gained, and the share of it that one network keeps."""


@dataclass(frozen=True)
class Line:
    """One system of the table.

    Attributes:
        key: Method and system.
        label: For people.
        table: Its sums.
        iou: Difference to the baseline.
        nll: The same in log-loss.
    """

    key: Key
    label: str
    table: Table
    iou: Estimate
    nll: Estimate


WORDS = {
    "last": "last snapshot",
    "refreshed": "last snapshot, batch norm refreshed",
    "crops": "last snapshot, batch norm of crops",
    "all": "mean of all",
    "all refreshed": "mean of all, batch norm refreshed",
    "all best": "mean of all, batch norm chosen on val",
    "greedy": "greedy",
    "greedy refreshed": "greedy, batch norm refreshed",
    "soup": "average of the weights",
    "soup crops": "average of the weights, batch norm of crops",
    "best": "last snapshot, batch norm chosen on val",
    "best of crops": "last snapshot, batch norm chosen on val",
    "soup best": "average of the weights, batch norm chosen on val",
    "flips": "last snapshot, 4 flips",
}


def candidates_of(study: Study, systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]]) -> list[Key]:
    """Systems that may be chosen: of methods that are trained with all seeds, at least one of which has all folds."""
    whole = [method.name for method in study.methods if method.seeds is None]
    return [
        (method, system)
        for method in whole
        for system in SHOWN
        if system not in {"flips", *BEST} and table_of(systems.get((method, system), {}), study.folds) is not None
    ]


def is_crossed(systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]], candidates: Collection[Key]) -> bool:
    """Whether any candidate has a cross-fitted score, so that its own one chooses otherwise."""
    return any("cross_iou" in values for key in candidates for values in systems[key].values())


def lines_of(study: Study, systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]]) -> list[Line]:
    """All systems that have at least one seed with all folds; the baseline first, then by what is said of them."""
    base = table_of(systems.get(SINGLE, {}), study.folds)
    if base is None:
        return []
    tables = {SINGLE: base}
    compared = [method.name for method in study.methods]
    for method in (*compared, SEEDS, *study.students):
        for system in SHOWN:
            found = table_of(systems.get((method, system), {}), study.folds)
            if found is not None:
                tables[method, system] = found
    candidates = candidates_of(study, systems)
    for name, keys, how in (
        (CHOSEN, candidates, {}),
        (CHOSEN_SINGLE, [key for key in candidates if tables[key].mean("cost") == 1], {}),
        (CHOSEN_WIDE, candidates, {"wide": True}),
        (CHOSEN_OWN, candidates if is_crossed(systems, candidates) else [], {"own": True}),
    ):
        picked, _ = choose(systems, keys, study.folds, **how)
        found = table_of(picked, study.folds)
        if found is not None:
            tables[name] = found
    return [
        Line(key, _label(key, tables), table, difference(table, base, "iou"), difference(table, base, "nll"))
        for key, table in tables.items()
    ]


def _label(key: Key, known: Collection[Key]) -> str:
    """Of a method that leaves one snapshot, that snapshot is the method."""
    method, system = key
    alone = (method, "all") not in known
    if not system or (alone and system == "last"):
        return method
    word = WORDS[system]
    return f"{method}, {word.removeprefix('last snapshot, ') if alone else word}"
