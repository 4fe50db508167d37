"""The spool keeps entries whole and in order; the courier delivers each once, however often the server is away."""

from __future__ import annotations

import logging
import threading

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, REQUEST_LIMIT_EXCEEDED

from smp_ensemble.exceptions import DeliveryError
from smp_ensemble.tracking import spool as spool_module
from smp_ensemble.tracking.spool import Courier, Spool, is_passing


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(spool_module, "FIRST_PAUSE", 0.01)


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


def test_the_courier_delivers_in_order_on_a_thread_of_its_own(tmp_path):
    delivered = []
    courier = Courier(Spool(tmp_path), lambda entry: delivered.append((entry.kind, threading.current_thread())))
    for number in range(20):
        courier.put(f"entry{number}", {})
    courier.drain(10)
    courier.close()
    assert [kind for kind, _ in delivered] == [f"entry{number}" for number in range(20)]
    assert {thread.name for _, thread in delivered} == {"smp-ensemble-courier"}


def test_a_server_that_is_away_delays_and_warns_once(tmp_path, quick, caplog):
    attempts, delivered = [], []

    def deliver(entry):
        attempts.append(entry.kind)
        if len(attempts) < 4:
            raise ConnectionError("refused")
        delivered.append(entry.kind)

    courier = Courier(Spool(tmp_path), deliver)
    with caplog.at_level(logging.WARNING):
        courier.put("one", {})
        courier.put("two", {})
        courier.drain(10)
    courier.close()
    assert delivered == ["one", "two"]
    assert attempts == ["one"] * 4 + ["two"]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "delivery to the tracking server waits, training goes on",
        "delivery to the tracking server goes on",
    ]


def test_what_cannot_be_delivered_stays_and_is_said(tmp_path, quick):
    def deliver(entry):
        raise ConnectionError("refused")

    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})
    with pytest.raises(DeliveryError, match="ConnectionError: refused. Nothing is lost: the rest waits in"):
        courier.drain(0.3)
    courier.close()
    assert Spool(tmp_path).first().kind == "one"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionError("refused"), True),
        (TimeoutError(), True),
        (MlflowException("down"), True),
        (MlflowException("busy", error_code=REQUEST_LIMIT_EXCEEDED), True),
        (MlflowException("changed param", error_code=INVALID_PARAMETER_VALUE), False),
        (FileNotFoundError("gone"), False),
        (KeyError("defect"), False),
    ],
)
def test_what_may_pass_is_tried_again_and_a_refusal_is_not(error, passing):
    assert is_passing(error) is passing


def test_a_defect_is_raised_at_once_and_loses_nothing(tmp_path):
    def deliver(entry):
        raise TypeError("a defect")

    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})
    with pytest.raises(DeliveryError, match="TypeError: a defect"):
        courier.drain(60)
    courier.close()
    assert not Spool(tmp_path).is_empty()


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


def test_a_receipt_that_cannot_be_written_is_tried_again(tmp_path, quick, monkeypatch):
    delivered, spool = [], Spool(tmp_path)
    add, failures = spool._ledger.add, [OSError("no room"), OSError("no room")]

    def full(receipt):
        if failures:
            raise failures.pop()
        add(receipt)

    monkeypatch.setattr(spool._ledger, "add", full)
    courier = Courier(spool, lambda entry: delivered.append(entry.key))
    courier.put("point", {}, key="1")
    courier.drain(10)
    courier.close()
    assert delivered == ["1"] * 3
    assert [receipt.key for receipt in Spool(tmp_path).receipts] == ["1"]
