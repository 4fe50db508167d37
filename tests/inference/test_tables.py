"""Tables: whole or not at all, in order, and gone on with where they were left."""

from __future__ import annotations

import csv
import os
import random

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.inference.tables import Table, write_csv

HEADER = ("name", "mask")
NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r\n"), min_size=1, max_size=6)
ROWS = st.dictionaries(NAMES, st.text("1 2,\"'{}", max_size=8), max_size=8)


def read(path) -> dict[str, str]:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == HEADER
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def fill(path, rows, *, resume=False) -> Table:
    table = Table(path, HEADER, resume=resume)
    for row in rows.items():
        table.add(row)
    return table


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    path = write_csv(tmp_path / "table.csv", HEADER, [("a", "1 2")])

    def interrupted():
        yield ("b", "3 4")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(path, HEADER, interrupted())
    assert path.read_text() == "name,mask\na,1 2\n"


@given(ROWS)
def test_row_by_row_is_the_same_as_at_once(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("tables")
    whole = write_csv(folder / "whole.csv", HEADER, rows.items())
    table = fill(folder / "table.csv", rows)
    assert not (folder / "table.csv").exists()
    path = table.close(rows)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(folder.iterdir()) == [path, whole]


@given(ROWS, st.floats(0, 1), st.integers(0, 99))
def test_an_interruption_anywhere_loses_at_most_the_row_it_fell_into(tmp_path_factory, rows, share, seed):
    folder = tmp_path_factory.mktemp("tables")
    path, partial = folder / "table.csv", folder / "table.csv.partial"
    fill(path, rows).stop()
    if rows:
        content = partial.read_bytes()
        partial.write_bytes(content[: round(share * len(content))])
    table = Table(path, HEADER, resume=True)
    kept = [name for name in rows if name in table]
    assert kept == list(rows)[: len(kept)]
    lines = partial.read_bytes().count(b"\r\n") if partial.exists() else 0
    assert len(kept) == max(lines - 1, 0)
    order = list(rows)
    random.Random(seed).shuffle(order)
    for name in order:
        if name not in kept:
            table.add((name, rows[name]))
    order.sort()
    assert list(read(table.close(order)).items()) == [(name, rows[name]) for name in order]
    assert list(folder.iterdir()) == [path]


def test_a_table_of_an_earlier_call_is_gone_on_with_and_stays_until_the_new_one_is_whole(tmp_path):
    path = fill(tmp_path / "table.csv", {"a": "1 2", "c": "3 4", "d": "5 6"}).close("acd")
    before = path.read_bytes()
    table = fill(path, {"b": "7 8", "c": "9 9"}, resume=True)
    table.stop()
    assert path.read_bytes() == before
    table = Table(path, HEADER, resume=True)
    assert list(read(table.close("abc")).items()) == [("a", "1 2"), ("b", "7 8"), ("c", "9 9")]


def test_a_dropped_row_is_gone_after_the_next_interruption_too(tmp_path):
    path = tmp_path / "table.csv"
    fill(path, {"a": "1 2", "b": "3 4"}).stop()
    table = Table(path, HEADER, resume=True)
    table.drop("a")
    table.drop("nowhere")
    table.add(("c", "5 6"))
    table.stop()
    table = Table(path, HEADER, resume=True)
    assert [name in table for name in "abc"] == [False, True, True]
    assert read(table.close("abc")) == {"b": "3 4", "c": "5 6"}


def test_anew_means_anew(tmp_path):
    path = tmp_path / "table.csv"
    fill(path, {"a": "1 2", "b": "3 4"}).stop()
    table = Table(path, HEADER)
    assert "a" not in table
    assert read(table.close("ab")) == {}


@pytest.mark.parametrize("content", [b"", b"name,mask", b"image,truth\r\na,1 2\r\n", b"\x89PNG\r\n\x1a\n,"])
def test_another_table_in_its_place_is_not_taken_for_its_own(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    table = fill(path, {"b": "1 2"}, resume=True)
    assert "a" not in table
    assert table.time == 0
    assert read(table.close("ab")) == {"b": "1 2"}


def test_its_time_is_that_of_the_rows_that_were_there(tmp_path):
    path = fill(tmp_path / "table.csv", {"a": "1 2"}).close("a")
    os.utime(path, ns=(10**18, 10**18 + 5))
    assert Table(path, HEADER, resume=True).time == pytest.approx(10**18, abs=10**3)


def test_long_rows_and_names_that_are_not_utf8(tmp_path):
    strange = os.fsdecode(b"caf\xe9.png")
    rows = {strange: "1 1 " * 100_000, "b": "3 4"}
    fill(tmp_path / "table.csv", rows).stop()
    table = Table(tmp_path / "table.csv", HEADER, resume=True)
    assert strange in table
    content = table.close(["b", strange]).read_bytes()
    assert content.splitlines()[2].startswith(b"caf\xe9.png,1 1 1 1 ")
    assert len(pd.read_csv(tmp_path / "table.csv", encoding="latin-1")["mask"][1]) == 400_000
