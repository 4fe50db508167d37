"""The ledger keeps receipts in order, and survives a process that died while it wrote one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking.ledger import Ledger, Receipt

RECEIPTS = st.lists(
    st.builds(
        Receipt,
        key=st.text(),
        kind=st.text(),
        result=st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3),
    ),
    max_size=5,
)


@given(receipts=RECEIPTS, cut=st.integers(min_value=0, max_value=10_000))
def test_what_was_added_whole_is_there_wherever_the_file_was_cut(tmp_path_factory, receipts, cut):
    path = tmp_path_factory.mktemp("ledger") / "delivered.jsonl"
    ledger, ends = Ledger(path), [0]
    for receipt in receipts:
        ledger.add(receipt)
        ends.append(path.stat().st_size)
    assert Ledger(path).receipts == receipts
    content = path.read_bytes() if receipts else b""
    path.write_bytes(content[:cut])
    whole = sum(end <= cut for end in ends[1:])
    again = Ledger(path)
    assert again.receipts == receipts[:whole]
    again.add(Receipt("last", "kind"))
    assert Ledger(path).receipts == [*receipts[:whole], Receipt("last", "kind")]


@pytest.mark.parametrize("line", ["{broken", "[1]", json.dumps({"key": "a", "colour": "red"})])
def test_a_line_that_is_no_receipt_is_named(tmp_path, line):
    path = tmp_path / "delivered.jsonl"
    Ledger(path).add(Receipt("a", "kind"))
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(IntegrityError, match=r"delivered.jsonl, line 2: expected a receipt as JSON"):
        Ledger(path)
