"""The courier delivers each entry once and in order, however often the server is away."""

from __future__ import annotations

import logging
import os
import threading
import time

import pytest

from smp_ensemble.exceptions import DeliveryError, UndeliveredError
from smp_ensemble.tracking import outages
from smp_ensemble.tracking.courier import Courier
from smp_ensemble.tracking.spool import Spool


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.01)


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
    waits, waiting, goes_on = [record.message for record in caplog.records]
    assert waits.startswith("delivery waits, training goes on (waiting on disk: ")
    assert waits.endswith(" MB): ConnectionError: refused")
    assert waiting == "waiting up to 10 s for the tracking server; Ctrl-C ends that"
    assert goes_on.startswith("delivery goes on: the tracking server is back (waiting on disk: 1 entry, ")


def test_what_cannot_be_delivered_stays_and_is_said(tmp_path, quick):
    def deliver(entry):
        raise ConnectionError("refused")

    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})
    with pytest.raises(DeliveryError, match="ConnectionError: refused. Nothing is lost: the rest waits in"):
        courier.drain(0.3)
    courier.close()
    assert Spool(tmp_path).first().kind == "one"


def test_a_defect_is_raised_at_once_and_loses_nothing(tmp_path):
    def deliver(entry):
        raise TypeError("a defect")

    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})
    with pytest.raises(DeliveryError, match="TypeError: a defect"):
        courier.drain(60)
    courier.close()
    assert not Spool(tmp_path).is_empty()


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


def test_ctrl_c_ends_the_waiting_and_says_what_delivers_the_rest(tmp_path, quick, monkeypatch):
    def deliver(entry):
        raise ConnectionError("refused")

    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})

    def interrupt(seconds):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("smp_ensemble.tracking.courier.time.sleep", interrupt)
        with pytest.raises(UndeliveredError, match="1 entry, .*`smp-ensemble sync` delivers it"):
            courier.drain(60)
    courier.close()
    assert Spool(tmp_path).first().kind == "one"


def test_an_answer_is_waited_for_longer_each_time(tmp_path, quick, monkeypatch):
    found = []

    def deliver(entry):
        found.append((os.environ.get(outages.RETRIES), os.environ.get(outages.TIMEOUT)))
        if len(found) < 4:
            raise TimeoutError

    for name in (outages.RETRIES, outages.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    courier = Courier(Spool(tmp_path), deliver)
    courier.put("one", {})
    courier.drain(10)
    courier.put("two", {})
    courier.drain(10)
    courier.close()
    assert found == [("0", "10"), ("0", "20"), ("0", "40"), ("0", "80"), ("0", "10")]
    assert outages.RETRIES not in os.environ


def test_a_slow_server_may_take_its_time_but_not_for_ever(tmp_path):
    def deliver(entry):
        time.sleep(0.15)

    courier = Courier(Spool(tmp_path), deliver)
    for _ in range(6):
        courier.put("entry", {})
    with pytest.raises(UndeliveredError, match="delivery is slow"):
        courier.drain(0.3)
    courier.drain(0.6, since_last=True)
    courier.close()
