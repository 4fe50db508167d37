"""The spool keeps entries whole and in order, each once, whatever dies when."""

from __future__ import annotations

import pytest

from smp_ensemble.tracking.spool import Spool


def test_entries_come_back_in_order_with_their_files(tmp_path):
    spool = Spool(tmp_path)
    for number in range(12):
        spool.put("thing", {"number": number}, lambda folder: (folder / "file").write_text("content"))
    found = []
    while (entry := spool.first()) is not None:
        assert (entry.folder / "file").read_text() == "content"
        assert entry.kind == "thing"
        found.append(entry.content["number"])
        spool.remove(entry)
    assert found == list(range(12))
    assert spool.is_empty()


def test_an_entry_that_cannot_be_written_leaves_nothing(tmp_path):
    spool = Spool(tmp_path)

    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        spool.put("thing", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_new_process_goes_on_where_the_last_one_stopped(tmp_path):
    spool = Spool(tmp_path)
    spool.put("first", {})
    spool.first().remember(run_id="abc")
    (tmp_path / ".writing-00000009").mkdir()
    again = Spool(tmp_path)
    again.put("second", {})
    assert again.first().kind == "first"
    assert again.first().progress == {"run_id": "abc"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001-first", "00000002-second"]


def test_what_an_earlier_process_put_or_delivered_is_not_put_again(tmp_path):
    spool = Spool(tmp_path)
    assert spool.put("point", {"step": 1}, key="1")
    assert spool.put("point", {"step": 2}, key="2")
    assert spool.put("point", {"step": 2}, key="2")  # the same process means what it says
    spool.remove(spool.first(), {"step": 1})
    again = Spool(tmp_path)
    assert [receipt.result for receipt in again.receipts] == [{"step": 1}]
    assert not again.put("point", {"step": 1}, key="1")
    assert not again.put("point", {"step": 2}, key="2")
    assert again.put("point", {"step": 3}, key="3")
    assert again.put("file", {})
    assert [entry.content.get("step") for entry in again.waiting()] == [2, 2, 3, None]


def test_a_process_that_dies_between_the_ledger_and_the_removal_delivers_once(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    spool.put("point", {}, key="1")
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_delete", lambda self, entry: None)
        spool.remove(spool.first())
    assert not spool.is_empty()
    again = Spool(tmp_path)
    assert again.is_empty()
    assert not again.put("point", {}, key="1")


def test_entries_that_are_no_longer_true_are_dropped(tmp_path):
    spool = Spool(tmp_path)
    for kind in ("point", "end", "point"):
        spool.put(kind, {})
    spool.drop("end")
    assert [entry.kind for entry in spool.waiting()] == ["point", "point"]
