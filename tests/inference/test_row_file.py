"""Finished rows on disk: what is counted is whole, and other work's rows are thrown away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smp_ensemble.inference.row_file import RowFile


def some_rows(count: int, bands: int = 2, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((bands, count, width), dtype=np.float32)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 3))
def test_rows_come_back_in_blocks_of_any_height(tmp_path_factory, counts, block, bands):
    work = RowFile(tmp_path_factory.mktemp("rows") / "out.png", "a", 5)
    added = [some_rows(count, bands, seed=seed) for seed, count in enumerate(counts)]
    for rows in added:
        work.append(rows)
    found = [*work.blocks(block)]
    assert [one.shape[1] for one in found[:-1]] == [block] * (len(found) - 1)
    assert np.array_equal(np.concatenate(found, axis=1), np.concatenate(added, axis=1))


def test_another_process_goes_on(tmp_path):
    first = RowFile(tmp_path / "out.png", "a", 5)
    first.append(some_rows(4))
    second = RowFile(tmp_path / "out.png", "a", 5)
    assert (second.rows, second.bands, second.dtype) == (4, 2, np.float32)
    second.append(some_rows(3, seed=1))
    expected = np.concatenate([some_rows(4), some_rows(3, seed=1)], axis=1)
    assert np.array_equal(next(second.blocks(100)), expected)


def test_rows_that_are_not_counted_yet_are_cut_off(tmp_path):
    first = RowFile(tmp_path / "out.png", "a", 5)
    first.append(some_rows(4))
    with (tmp_path / "out.png.partial.rows").open("ab") as file:
        file.write(b"half a row")
    second = RowFile(tmp_path / "out.png", "a", 5)
    second.append(some_rows(1, seed=1))
    assert np.array_equal(next(second.blocks(9)), np.concatenate([some_rows(4), some_rows(1, seed=1)], axis=1))


@pytest.mark.parametrize("what", ["digest", "resume", "broken", "shorter", "missing"])
def test_what_cannot_be_gone_on_with_is_thrown_away(tmp_path, what):
    RowFile(tmp_path / "out.png", "a", 5).append(some_rows(4))
    if what == "broken":
        (tmp_path / "out.png.progress").write_text('{"digest": "a"', encoding="utf-8")
    elif what == "shorter":
        (tmp_path / "out.png.partial.rows").write_bytes(b"x")
    elif what == "missing":
        (tmp_path / "out.png.partial.rows").unlink()
    work = RowFile(tmp_path / "out.png", "b" if what == "digest" else "a", 5, resume=what != "resume")
    assert work.rows == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(tmp_path):
    work = RowFile(tmp_path / "out.png", "a", 5)
    work.append(some_rows(4))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.png.partial.rows", "out.png.progress"]
    work.remove()
    assert list(tmp_path.iterdir()) == []
