"""Which candidates join."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import Snapshot

steps = st.lists(st.integers(0, 5), max_size=8)


def ranked(steps: list[int]) -> list[Snapshot]:
    """Candidates as a search gives them, best first."""
    return [Snapshot(f"models:/m-{rank}", f"run{rank}", step) for rank, step in enumerate(steps)]


@given(steps, st.integers(1, 9))
def test_top_k_are_the_best(steps, count):
    candidates = ranked(steps)
    assert make_selector("top-k")(candidates, count) == candidates[:count]


@given(steps, st.integers(1, 9))
def test_all_are_all(steps, count):
    candidates = ranked(steps)
    chosen = make_selector("all")(candidates, count)
    assert chosen == candidates
    assert chosen is not candidates


@given(steps, st.integers(1, 9))
def test_last_are_the_latest_and_the_better_of_equals(steps, count):
    candidates = ranked(steps)
    chosen = make_selector("last")(candidates, count)
    assert len(chosen) == min(count, len(candidates))
    keys = [(-one.step, candidates.index(one)) for one in chosen]
    others = [(-one.step, candidates.index(one)) for one in candidates if one not in chosen]
    assert keys == sorted(keys)
    assert not keys or not others or max(keys) < min(others)


def test_an_unknown_selector_is_refused():
    with pytest.raises(ConfigError, match="unknown selector 'topk': did you mean 'top-k'"):
        make_selector("topk")
