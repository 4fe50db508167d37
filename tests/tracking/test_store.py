"""What a training leaves in MLflow."""

from __future__ import annotations

import threading
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from smp_ensemble.data.normalization import imagenet
from smp_ensemble.exceptions import ConfigError, Interrupted, NetworkError, UndeliveredError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.delivery import Delivery
from smp_ensemble.tracking.flavor import load_model, local_folder
from smp_ensemble.tracking.store import MlflowStore, Resumable, log_snapshot


def artifacts(client, run_id, folder=None):
    return sorted(one.path for one in client.list_artifacts(run_id, folder))


def test_each_snapshot_is_a_child_run_with_a_logged_model_and_linked_scores(tracking, make_record, tiny_splits):
    with MlflowStore(run_name="roofs") as store:
        for index, iou in ((1, 0.4), (2, 0.6)):
            store.save_snapshot(make_record(index, iou=iou))
        first, second = store.snapshots()

    parent = tracking.get_run(store.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags[names.KIND] == "training"
    children = tracking.search_runs(["0"], f"tags.`{names.PARENT_RUN}` = '{store.run_id}'")
    assert {child.info.run_id for child in children} == {first.run_id, second.run_id}
    assert {child.info.status for child in children} == {"FINISHED"}

    run = tracking.get_run(second.run_id)
    assert run.info.run_name == "roofs-snapshot-02"
    assert run.data.tags[names.KIND] == "snapshot"
    assert run.data.tags[names.MODEL_ID] == second.model_id
    assert run.data.metrics == {"val_iou": 0.6, "val_loss": 0.4, "val_iou/building": 0.6}
    assert run.data.params["trainer"] == "snapshot"
    assert not run.inputs.model_inputs  # a snapshot is an output of its run, and of no run an input
    assert [output.model_id for output in run.outputs.model_outputs] == [second.model_id]

    model = tracking.get_logged_model(second.model_id)
    assert model.status.name == "READY"
    assert model.tags[names.KIND] == "snapshot"
    assert model.params["cycle"] == "2"
    reference = tiny_splits.val.reference()
    assert {metric.key: metric.value for metric in model.metrics} == run.data.metrics
    assert {(metric.dataset_name, metric.dataset_digest, metric.step) for metric in model.metrics} == {
        (reference.name, reference.digest, 20)
    }


def test_what_is_stored_is_what_was_there_at_the_snapshot(tracking, make_record):
    record = make_record()
    images = torch.randint(0, 255, (2, 3, 16, 16)).float()
    with torch.no_grad():
        expected = record.network.eval()(imagenet()(images)).sigmoid()
    with MlflowStore() as store:
        store.save_snapshot(record)
        with torch.no_grad():
            for parameter in record.network.parameters():
                parameter.zero_()  # training goes on
        (snapshot,) = store.snapshots()
    ensemble = load_model(snapshot.uri)
    with torch.no_grad():
        assert torch.equal(ensemble(images), expected)
    assert ensemble.class_names == record.task.class_names


def test_training_only_ever_writes_to_local_disk(tracking, make_record, monkeypatch):
    """No call to the tracking server on the thread that trains."""
    store = MlflowStore()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    callers = set()
    for name in ("log_batch", "create_run", "create_logged_model", "log_inputs", "set_tag", "update_run_info"):
        original = getattr(SqlAlchemyStore, name)

        def spy(self, *arguments, _original=original, **more):
            callers.add(threading.current_thread().name)
            return _original(self, *arguments, **more)

        monkeypatch.setattr(SqlAlchemyStore, name, spy)
    store.log_params({"lr": 0.1})
    store.set_tags({"a": "b"})
    store.log_metrics({"train_loss": 1.0}, 1)
    store.save_snapshot(make_record())
    store.snapshots()
    store.close()
    assert callers == {"smp-ensemble-courier"}


def test_curves_files_and_the_spool_end_up_in_the_run(tracking, make_record, tmp_path):
    (tmp_path / "figure.png").write_bytes(b"png")
    with MlflowStore(spool=tmp_path / "spool") as store:
        store.log_metrics({"train_loss": 2.0}, 5)
        store.log_metrics({"train_loss": 1.0}, 10)
        store.log_file(tmp_path / "figure.png", "figures")
    history = tracking.get_metric_history(store.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(5, 2.0), (10, 1.0)]
    assert artifacts(tracking, store.run_id, "figures") == ["figures/figure.png"]
    assert not (tmp_path / "spool").exists()
    assert store.snapshots() == []  # asking afterwards is fine


def test_scores_on_further_data_are_linked_to_it_and_to_the_snapshot(tracking, make_record, tiny_splits):
    reference = tiny_splits.test.reference()
    with MlflowStore() as store:
        store.save_snapshot(make_record(2, iou=0.6))
        store.log_metrics({"val_iou": 0.6}, 20)
        (snapshot,) = store.snapshots()
        store.log_scores({"cv_iou": 0.5}, reference, snapshot)
        store.log_scores({"cv_iou": 0.55}, reference)
    assert tracking.get_run(snapshot.run_id).data.metrics["cv_iou"] == 0.5
    assert tracking.get_run(store.run_id).data.metrics["cv_iou"] == 0.55
    (found,) = (one for one in tracking.get_logged_model(snapshot.model_id).metrics if one.key == "cv_iou")
    assert (found.value, found.step, found.dataset_digest) == (0.5, 20, reference.digest)
    assert [(point.step, point.value) for point in tracking.get_metric_history(store.run_id, "cv_iou")] == [(20, 0.55)]


def test_a_training_may_be_nested_under_a_run(tracking, make_record):
    experiment = tracking.create_experiment("roofs")
    parent = tracking.create_run(experiment).info.run_id
    with MlflowStore(parent_run_id=parent, run_name="fold-0") as store:
        store.save_snapshot(make_record())
        (snapshot,) = store.snapshots()
    run = tracking.get_run(store.run_id)
    assert run.data.tags[names.PARENT_RUN] == parent
    assert (run.info.experiment_id, run.info.run_name, run.info.status) == (experiment, "fold-0", "FINISHED")
    assert tracking.get_run(snapshot.run_id).data.tags[names.PARENT_RUN] == store.run_id
    assert tracking.get_run(parent).info.status == "RUNNING"


def test_each_snapshot_brings_its_overlays(tracking, make_record, tiny_splits):
    images = [tiny_splits.val.read(index) for index in range(2)]
    with MlflowStore(previews=images) as store:
        store.save_snapshot(make_record(previews=[np.ones((64, 64), np.uint8)] * 2))
        (snapshot,) = store.snapshots()
    assert artifacts(tracking, store.run_id, "overlays") == ["overlays/snapshot-01.png"]
    assert artifacts(tracking, snapshot.run_id) == ["snapshot-01.png"]


def test_keep_prunes_weights_and_not_scores(tracking, make_record):
    with MlflowStore(keep=2) as store:
        for index, iou in enumerate((0.5, 0.3, 0.7, 0.6), 1):
            store.save_snapshot(make_record(index, iou=iou))
        kept = store.snapshots()
    assert [snapshot.metrics["val_iou"] for snapshot in kept] == [0.7, 0.6]
    children = tracking.search_runs(["0"], f"tags.`{names.PARENT_RUN}` = '{store.run_id}'")
    assert sorted(child.data.metrics["val_iou"] for child in children) == [0.3, 0.5, 0.6, 0.7]
    pruned = [child for child in children if child.data.tags.get(names.PRUNED) == "true"]
    assert sorted(child.data.metrics["val_iou"] for child in pruned) == [0.3, 0.5]
    weights = list(local_folder(kept[0].uri).parents[2].rglob("model.safetensors"))
    assert len(weights) == 2


def test_a_delivery_that_breaks_off_goes_on_and_does_nothing_twice(tracking, make_record, monkeypatch):
    from smp_ensemble.tracking import delivery, outages

    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.01)
    original, calls = delivery.log_folder, []

    def breaks(*arguments, **more):
        original(*arguments, **more)
        calls.append(more["model_id"])
        if len(calls) < 3:
            raise ConnectionError("cut")

    monkeypatch.setattr(delivery, "log_folder", breaks)
    with MlflowStore() as store:
        store.save_snapshot(make_record())
        (snapshot,) = store.snapshots()
    assert calls == [snapshot.model_id] * 3
    assert len(tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'snapshot'")) == 1
    assert len(mlflow.search_logged_models(["0"], output_format="list")) == 1
    assert len(tracking.get_metric_history(snapshot.run_id, "val_iou")) == 1
    assert load_model(snapshot.uri) is not None


def test_a_refusal_is_said_at_once_and_the_run_fails(tracking, make_record, monkeypatch):
    from smp_ensemble.exceptions import DeliveryError
    from smp_ensemble.tracking import delivery

    def refuse(*arguments, **more):
        raise MlflowException("no such model", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(delivery, "log_folder", refuse)
    with pytest.raises(DeliveryError, match="no such model"), MlflowStore() as store:
        store.save_snapshot(make_record())
        store.snapshots()
    assert tracking.get_run(store.run_id).info.status == "FAILED"
    assert list((Path(".smp_ensemble") / "spool" / store.run_id).iterdir())  # nothing is lost


def test_an_error_in_training_fails_the_run_with_the_reason(tracking, make_record):
    with pytest.raises(RuntimeError), MlflowStore() as store:
        store.save_snapshot(make_record())
        raise RuntimeError("loss is NaN")
    run = tracking.get_run(store.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags[names.ERROR] == "RuntimeError: loss is NaN"
    assert len(tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'snapshot'")) == 1  # finished work stays


def test_a_plain_loop_logs_snapshots(tracking, make_tiny_network):
    about = {"mode": "binary", "class_names": ("background", "roof"), "normalization": imagenet()}
    with MlflowStore() as store:
        for step in (10, 20):
            log_snapshot(make_tiny_network(step), {"val_iou": step / 100}, step, store=store, **about)
        found = store.snapshots()
    assert [(one.step, one.metrics["val_iou"], one.params["cycle"]) for one in found] == [
        (10, 0.1, "1"),
        (20, 0.2, "2"),
    ]
    log_snapshot(make_tiny_network(), {"val_iou": 0.5}, 30, **about)  # without a store: delivered when it returns
    runs = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'snapshot'")
    assert len(runs) == 3


def test_a_network_that_nobody_could_build_again_is_refused(tracking):
    about = {"mode": "binary", "class_names": ("background", "roof"), "normalization": imagenet()}
    store = MlflowStore()
    with pytest.raises(NetworkError, match="expected one of smp's own networks"):
        log_snapshot(torch.nn.Conv2d(3, 1, 1), {"val_iou": 0.5}, 1, store=store, **about)
    assert store.snapshots() == []
    store.close()


def test_without_a_store_training_opens_mlflow_and_ends_its_run(tracking, make_tiny_network, tiny_splits):
    from smp_ensemble.training.fit import fit
    from smp_ensemble.training.fit_options import FitOptions

    options = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu")
    data = (tiny_splits.train, tiny_splits.val)
    (snapshot,) = fit(make_tiny_network(), *data, trainer="single", epochs=1, options=options)
    assert load_model(snapshot.uri).members[0].training_images == frozenset(tiny_splits.train.image_digests)
    parent = tracking.get_run(tracking.get_run(snapshot.run_id).data.tags[names.PARENT_RUN])
    assert parent.info.status == "FINISHED"

    with pytest.raises(ConfigError, match="unknown optimizer 'sdg'"):
        fit(make_tiny_network(), *data, trainer="single", epochs=1, options=FitOptions(optimizer="sdg", crop_size=32))
    (failed,) = [run for run in tracking.search_runs(["0"]) if run.info.status == "FAILED"]
    assert "unknown optimizer 'sdg'" in failed.data.tags[names.ERROR]


def resumable(run_id=None):
    return Resumable("token", "digest", run_id)


def abandon(store):
    """The process of the store dies: its thread does nothing more."""
    store._courier.close()
    store._lock.let_go()


def test_another_process_goes_on_with_a_training(tracking, make_record, tmp_path, tiny_splits):
    store = MlflowStore(spool=tmp_path, keep=1, resumable=resumable())
    store.log_dataset(tiny_splits.val.reference(), "validation")
    store.log_metrics({"val_iou": 0.4}, 10)
    store.save_snapshot(make_record(1, iou=0.4))
    (first,) = store.snapshots()
    abandon(store)
    store.log_metrics({"val_iou": 0.6}, 20)  # these wait in the spool
    store.save_snapshot(make_record(2, iou=0.6))
    store.log_metrics({"val_iou": 0.5}, 30)

    with MlflowStore(spool=tmp_path, keep=1, resumable=resumable(store.run_id)) as again:
        assert again.run_id == store.run_id
        assert again.history == [(10, {"val_iou": 0.4}), (20, {"val_iou": 0.6}), (30, {"val_iou": 0.5})]
        assert again.next_index() == 3
        again.log_dataset(tiny_splits.val.reference(), "validation")
        again.log_metrics({"val_iou": 0.5}, 30)  # the epoch is trained again
        again.save_snapshot(make_record(2, iou=0.6))
        again.log_metrics({"val_iou": 0.3}, 40)
        again.save_snapshot(make_record(4, iou=0.3, step=40))
        (kept,) = again.snapshots()
    again.discard()
    assert (kept.step, kept.metrics["val_iou"]) == (20, 0.6)
    points = [(point.step, point.value) for point in tracking.get_metric_history(store.run_id, "val_iou")]
    assert points == [(10, 0.4), (20, 0.6), (30, 0.5), (40, 0.3)]
    run = tracking.get_run(store.run_id)
    assert (run.info.status, run.data.tags[names.CONFIGURATION]) == ("FINISHED", "digest")
    assert len(run.inputs.dataset_inputs) == 1
    children = tracking.search_runs(["0"], f"tags.`{names.PARENT_RUN}` = '{store.run_id}'")
    assert sorted(child.data.tags[names.STEP] for child in children) == ["10", "20", "40"]
    assert {child.info.status for child in children} == {"FINISHED"}
    assert first.model_id not in {one.model_id for one in mlflow.search_logged_models(["0"], output_format="list")}
    assert not list(tmp_path.glob(f"{store.run_id}*"))


@pytest.mark.parametrize("lost", ["create_run", "create_logged_model", "log_model_artifacts"])
def test_a_delivery_finds_again_what_a_killed_process_had_begun(tracking, make_record, tmp_path, monkeypatch, lost):
    """The server did it, and the process died before it heard so."""

    class Killed(BaseException):
        pass

    original = getattr(mlflow.MlflowClient, lost)

    def dies(*arguments, **more):
        original(*arguments, **more)
        raise Killed

    store = MlflowStore(spool=tmp_path, resumable=resumable())
    abandon(store)
    store.save_snapshot(make_record())
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mlflow.MlflowClient, lost, dies)
        store._delivery(store._spool.first())
    with MlflowStore(spool=tmp_path, resumable=resumable(store.run_id)) as again:
        (snapshot,) = again.snapshots()
    (child,) = tracking.search_runs(["0"], f"tags.`{names.KIND}` = 'snapshot'")
    assert (child.info.run_id, child.info.status) == (snapshot.run_id, "FINISHED")
    (model,) = mlflow.search_logged_models(["0"], output_format="list")
    assert (model.model_id, model.status.name) == (snapshot.model_id, "READY")
    assert load_model(snapshot.uri) is not None


def test_an_interrupted_training_is_killed_and_keeps_what_it_knows(tracking, make_record, tmp_path):
    with pytest.raises(Interrupted), MlflowStore(spool=tmp_path, resumable=resumable()) as store:
        store.save_snapshot(make_record())
        raise Interrupted("interrupted in epoch 2", 2)
    run = tracking.get_run(store.run_id)
    assert (run.info.status, run.data.tags[names.ERROR]) == ("KILLED", "Interrupted: interrupted in epoch 2")
    assert names.CONFIGURATION not in run.data.tags
    with MlflowStore(spool=tmp_path, resumable=resumable(store.run_id)) as again:
        assert [snapshot.step for snapshot in again.snapshots()] == [10]
        running = tracking.get_run(store.run_id)
        assert running.info.status == "RUNNING"
        assert names.ERROR not in running.data.tags
    assert tracking.get_run(store.run_id).info.status == "FINISHED"


def test_an_error_is_what_is_said_even_if_the_spool_takes_nothing_more(tracking, tmp_path, monkeypatch, caplog):
    from smp_ensemble.tracking.spool import Spool

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="the reason"), MlflowStore(spool=tmp_path, resumable=resumable()) as store:
        monkeypatch.setattr(Spool, "put", full)
        raise RuntimeError("the reason")
    assert "No space left" in caplog.text
    assert tracking.get_run(store.run_id).data.tags[names.ERROR] == "RuntimeError: the reason"


def test_two_processes_do_not_deliver_one_spool(tracking, tmp_path, monkeypatch):
    with MlflowStore(spool=tmp_path, resumable=resumable()) as store:
        pass
    with monkeypatch.context() as patch:
        patch.setattr("smp_ensemble.tracking.store.Lock.take", lambda self: False)
        with pytest.raises(
            ConfigError, match=r"process \d+ is delivering what waits in .*: wait for it, or end it first"
        ):
            MlflowStore(spool=tmp_path, resumable=resumable(store.run_id))
    assert tracking.get_run(store.run_id).info.status == "FINISHED"


def test_a_server_that_is_away_is_waited_for_once(tracking, make_record, tmp_path, monkeypatch):
    """What was done is there all the same; the end waits in the spool with the rest."""
    monkeypatch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 0.2)
    monkeypatch.setattr(Delivery, "__call__", away)
    with pytest.raises(UndeliveredError, match="ConnectionError: refused"), MlflowStore(spool=tmp_path) as store:
        store.save_snapshot(make_record())
        store.snapshots()
    assert [path.name.partition("-")[2] for path in sorted(tmp_path.glob("*/0*"))] == ["snapshot", "end"]
    assert tracking.get_run(store.run_id).info.status == "RUNNING"


def test_a_run_is_ended_with_the_reason_if_the_server_answers(tracking, tmp_path, monkeypatch):
    """What cannot be delivered may be due to the disk: the run does not stay open for that."""
    monkeypatch.setattr("smp_ensemble.tracking.store.STOP_SECONDS", 2.1)
    monkeypatch.setattr(Delivery, "__call__", away)
    with pytest.raises(RuntimeError, match="the reason"), MlflowStore(spool=tmp_path, resumable=resumable()) as store:
        raise RuntimeError("the reason")
    run = tracking.get_run(store.run_id)
    assert (run.info.status, run.data.tags[names.ERROR]) == ("FAILED", "RuntimeError: the reason")


def away(self, entry):
    raise ConnectionError("refused")


def test_a_run_whose_opening_was_heard_but_not_answered_is_taken_over(tracking, monkeypatch):
    monkeypatch.setattr("smp_ensemble.tracking.outages.FIRST_PAUSE", 0.01)
    create, calls = mlflow.MlflowClient.create_run, []

    def lost(*arguments, **more):
        calls.append(create(*arguments, **more))
        if len(calls) == 1:
            raise ConnectionError("the answer was cut")
        return calls[-1]

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", lost)
    with MlflowStore() as store:
        pass
    assert [run.info.run_id for run in calls] == [store.run_id]
    assert [run.info.status for run in tracking.search_runs(["0"])] == ["FINISHED"]
