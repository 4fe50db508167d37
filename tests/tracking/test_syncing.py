"""A spool is delivered from the disk alone, as its training would have done, and its run gets an end."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest

from smp_ensemble.exceptions import DeliveryError, IntegrityError, UndeliveredError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.tracking.store import MlflowStore, Resumable
from smp_ensemble.tracking.syncing import BUSY, DELIVERED, KILLED, RESUMABLE, deliver, find_spools


@pytest.fixture
def left_behind(tracking, make_record, tmp_path, tiny_splits):
    """Makes a spool that nobody delivers any more: a training that was killed, or finished without its server."""

    def make(*, ended=False, **more):
        images = [tiny_splits.val.read(index) for index in range(2)]
        store = MlflowStore(spool=tmp_path / "spool", previews=images, keep=1, **more)
        store._courier.close()
        store.log_metrics({"val_iou": 0.4}, 10)
        for index, iou in ((1, 0.4), (2, 0.6)):
            store.save_snapshot(make_record(index, iou=iou, previews=[np.ones((64, 64), np.uint8)] * 2))
        if ended:
            store.finish_later()
        store._lock.let_go()
        (found,) = find_spools([tmp_path])
        return found

    return make


def test_what_was_finished_ends_as_if_the_server_had_been_there(tracking, left_behind, tmp_path):
    waiting = left_behind(ended=True)
    assert waiting.entries == 4
    assert waiting.size > 10_000
    assert deliver(waiting, wait_seconds=30, can_go_on=False) == DELIVERED
    run = tracking.get_run(waiting.address.run_id)
    assert run.info.status == "FINISHED"
    assert [(one.step, one.value) for one in tracking.get_metric_history(run.info.run_id, "val_iou")] == [(10, 0.4)]
    assert [one.path for one in tracking.list_artifacts(run.info.run_id, "overlays")] == [
        "overlays/snapshot-01.png",
        "overlays/snapshot-02.png",
    ]
    (model,) = mlflow.search_logged_models(["0"], output_format="list")  # keep=1
    assert load_model(f"models:/{model.model_id}") is not None
    assert find_spools([tmp_path]) == []


def test_a_killed_training_fails_unless_somebody_can_go_on(tracking, left_behind, tmp_path):
    waiting = left_behind(resumable=Resumable("token", "digest"))
    assert deliver(waiting, wait_seconds=30, can_go_on=True) == RESUMABLE
    assert tracking.get_run(waiting.address.run_id).info.status == "RUNNING"
    (again,) = find_spools([tmp_path])
    assert again.entries == 0
    with MlflowStore(spool=tmp_path / "spool", resumable=Resumable("token", "digest", again.address.run_id)) as store:
        assert (store.next_index(), len(store.snapshots())) == (3, 2)  # it goes on where it was, keeping all
    assert deliver(again, wait_seconds=30, can_go_on=True) == DELIVERED


def test_a_killed_training_with_which_nobody_can_go_on_fails_with_the_reason(tracking, left_behind, tmp_path):
    waiting = left_behind()
    assert deliver(waiting, wait_seconds=30, can_go_on=False) == KILLED
    run = tracking.get_run(waiting.address.run_id)
    assert (run.info.status, run.data.tags[names.ERROR]) == ("FAILED", "its process was killed")
    assert find_spools([tmp_path]) == []


def test_a_run_that_is_not_there_keeps_the_spool(tracking, left_behind, tmp_path, monkeypatch):
    waiting = left_behind()
    tracking.delete_run(waiting.address.run_id)
    monkeypatch.setattr("smp_ensemble.tracking.syncing.attach", lambda run_id: mlflow.MlflowClient().get_run("0" * 32))
    with pytest.raises(DeliveryError, match="cannot be delivered: run .*not found") as found:
        deliver(waiting, wait_seconds=0, can_go_on=False)
    assert not isinstance(found.value, UndeliveredError)
    assert [one.entries for one in find_spools([tmp_path])] == [3]


def test_a_server_that_is_away_keeps_the_spool(left_behind, tmp_path):
    waiting = left_behind()
    with pytest.raises(UndeliveredError, match="3 entries wait in .*: `smp-ensemble sync` delivers them"):
        deliver(waiting, wait_seconds=0, can_go_on=False, tracking_uri="http://127.0.0.1:9")
    assert [one.entries for one in find_spools([tmp_path])] == [3]


def test_a_process_that_is_at_it_is_left_alone(left_behind, monkeypatch):
    waiting = left_behind()
    monkeypatch.setattr("smp_ensemble.tracking.syncing.Lock.take", lambda self: False)
    assert deliver(waiting, wait_seconds=0, can_go_on=False) == BUSY


def test_a_spool_without_a_readable_address_is_said(left_behind, tmp_path):
    waiting = left_behind()
    (waiting.folder / "address.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"address\.json does not say where its spool belongs"):
        find_spools([tmp_path])
