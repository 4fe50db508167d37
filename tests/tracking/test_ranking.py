"""The best of many snapshots: what is found fast is what one finds by looking at every run and every model."""

from __future__ import annotations

import math
import random
import shutil
from types import SimpleNamespace

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric, Param, RunTag

from smp_ensemble.tracking import names, ranking
from smp_ensemble.tracking.ranking import Best, latest_metrics
from smp_ensemble.tracking.search import search_snapshots

VAL, OTHER = ("roofs/val", "aaaa1111"), ("roofs/val", "aaaa2222")
FILTERS = (
    "",
    "metrics.val_iou > 0.5",
    "metrics.val_iou < 0.3",
    "params.trainer = 'swa'",
    "params.trainer = 'nothing'",
    "tags.ensemble = 'mine'",
    "metrics.val_iou >= 0.25 and params.trainer != 'swa'",
)


def write_snapshot(client, experiment_id, scores, *, trainer="snapshot", status="READY", tags=(), nan=False):
    """A snapshot as MLflow has it, without files; `scores` are (data, IoU) in the order in which they were measured."""
    run_id = client.create_run(experiment_id, tags={names.KIND: names.SNAPSHOT, **dict(tags)}).info.run_id
    model_id = client.create_logged_model(
        experiment_id, name="snapshot", source_run_id=run_id, tags={names.KIND: names.SNAPSHOT}
    ).model_id
    for order, ((name, digest), iou) in enumerate(scores):
        entries = [
            Metric(key, value, 1000 + order, 10, model_id, name, digest, run_id)
            for key, value in (("val_iou", iou), ("val_loss", math.nan if nan else 1 - iou))
        ]
        client.log_batch(run_id, metrics=entries)
    done = [RunTag(names.MODEL_ID, model_id)] if status else []
    client.log_batch(run_id, params=[Param("trainer", trainer)], tags=done)
    if status:
        client.finalize_logged_model(model_id, status)
    return run_id, model_id


def mixed_store(client):
    """Snapshots in two experiments: on two data sets, tied, diverged, pending, failed, pruned and deleted."""
    draw = random.Random(1)
    second = client.create_experiment("second")
    for index in range(48):
        where = second if index % 5 == 4 else "0"
        iou = draw.choice((0.0, 0.25, 0.5, 0.5, round(draw.random(), 3)))
        scores = {0: [(OTHER, iou)], 1: [(VAL, iou / 2), (OTHER, iou)], 2: [(VAL, 0.1), (VAL, iou)], 3: []}.get(
            index % 12, [(VAL, iou)]
        )
        status = {5: None, 17: "FAILED"}.get(index, "READY")
        trainer = draw.choice(("swa", "snapshot"))
        tags = {"ensemble": "mine"} if index % 9 == 0 else {}
        run_id, model_id = write_snapshot(
            client, where, scores, trainer=trainer, status=status, tags=tags, nan=index % 7 == 0
        )
        if index in (10, 22):
            client.set_tag(run_id, names.PRUNED, "true")
        if index == 22:
            client.delete_logged_model(model_id)
        if index == 13:
            client.delete_run(run_id)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, empty_store):
    """The mixed store, filled once, with all its runs and models as one by one calls give them."""
    path = tmp_path_factory.mktemp("mixed") / "mlflow.db"
    shutil.copy(empty_store, path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{path.as_posix()}")
    client = mlflow.MlflowClient()
    mixed_store(client)
    ids = {"Default": ["0"], "second": [client.get_experiment_by_name("second").experiment_id]}
    ids["Default,second"] = ids["Default"] + ids["second"]
    models = {}
    for run in client.search_runs(ids["Default,second"]):
        if names.MODEL_ID in run.data.tags and run.data.tags.get(names.PRUNED) != "true":
            models[run.info.run_id] = client.get_logged_model(run.data.tags[names.MODEL_ID])
    yield SimpleNamespace(client=client, ids=ids, models=models)
    mlflow.set_tracking_uri(before)


def by_looking_at_everything(stored, where, experiment, metric, limit, digest):
    """The slow way: every run that matches, its model, the last score on the data; sorted in Python."""
    found = []
    clause = f"tags.`{names.KIND}` = 'snapshot'" + (f" and {where}" if where else "")
    for run in stored.client.search_runs(stored.ids[experiment], clause):
        model = stored.models.get(run.info.run_id)
        if model is None or str(model.status) != "READY":
            continue
        rows = [one for one in model.metrics or [] if one.key == metric and one.dataset_digest == digest]
        if not rows:
            continue
        value = max(rows, key=lambda one: (one.timestamp, one.step)).value
        if value == 0 and math.isnan(run.data.metrics[metric]):
            continue
        found.append((value if metric == "val_loss" else -value, model.model_id))
    return [(abs(cost), model_id) for cost, model_id in sorted(found)][:limit]


@settings(max_examples=40)
@given(
    where=st.sampled_from(FILTERS),
    experiment=st.sampled_from(("Default", "second", "Default,second")),
    metric=st.sampled_from(("val_iou", "val_loss")),
    limit=st.one_of(st.none(), st.integers(1, 50)),
    digest=st.sampled_from((VAL[1], OTHER[1])),
    page=st.sampled_from((1, 3, 10, 500)),
)
def test_found_fast_is_what_one_finds_by_looking_at_everything(stored, where, experiment, metric, limit, digest, page):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "FIRST_PAGE", page)
        found = search_snapshots(where, experiment=experiment, metric=metric, limit=limit, dataset_digest=digest)
    got = [(one.metrics[metric], one.model_id) for one in found]
    assert got == by_looking_at_everything(stored, where, experiment, metric, limit, digest)


def test_the_store_holds_what_the_law_is_about(stored):
    every = by_looking_at_everything(stored, "", "Default,second", "val_loss", None, VAL[1])
    assert 20 < len(every) < len(stored.models)
    assert len({cost for cost, _ in every}) < len(every)  # ties
    assert by_looking_at_everything(stored, "", "second", "val_iou", None, OTHER[1])


def test_of_equal_scores_at_the_limit_the_first_ids_are_taken_whatever_the_order_of_writing(tracking):
    ids = sorted(write_snapshot(tracking, "0", [(VAL, 0.5)])[1] for _ in range(9))
    best = write_snapshot(tracking, "0", [(VAL, 0.75)])[1]
    for limit in range(1, 11):
        for where in ("", "metrics.val_iou > 0"):
            found = [one.model_id for one in search_snapshots(where, limit=limit, dataset_digest=VAL[1])]
            assert found == [best, *ids][:limit]


def test_ties_without_end_are_not_followed_without_end(tracking, monkeypatch, caplog):
    for _ in range(6):
        write_snapshot(tracking, "0", [(VAL, 0.5)])
    monkeypatch.setattr(ranking, "TIES", 1)
    assert len(search_snapshots(limit=1, dataset_digest=VAL[1])) == 1
    assert "more than 1 snapshots have the same val_iou" in caplog.text


def test_a_loss_that_is_not_a_number_is_not_the_best_loss(tracking):
    write_snapshot(tracking, "0", [(VAL, 0.9)], nan=True)
    _, good = write_snapshot(tracking, "0", [(VAL, 0.5)])
    for where in ("", "params.trainer = 'snapshot'"):
        assert [one.model_id for one in search_snapshots(where, metric="val_loss", limit=1)] == [good]
    assert len(search_snapshots()) == 2  # its IoU is a number


@pytest.mark.parametrize("limit", [1, 3, 7, None])
def test_best_keeps_the_best_once(limit):
    scores = [0.5, 0.25, 0.5, 0.75, 0.25, 0.5]
    models = [model(f"m-{index}", [(None, score)]) for index, score in enumerate(scores)]
    best = Best("val_iou", limit, None)
    for _ in range(2):  # a page may bring what came before
        best.offer(models)
    ranked = sorted(range(6), key=lambda index: (-scores[index], index))
    assert [one.model_id for one in best.models()] == [f"m-{index}" for index in ranked][:limit]


def test_the_last_value_counts_on_the_data_asked_for():
    one = model("m-1", [("a", 0.5), ("b", 0.75), ("a", 0.25)])
    assert latest_metrics(one)["val_iou"].value == 0.25
    assert latest_metrics(one, "b")["val_iou"].value == 0.75
    assert latest_metrics(one, "c") == {}


def model(model_id, scores):
    rows = [
        Metric("val_iou", score, 1000 + order, 10, model_id, digest and "data", digest)
        for order, (digest, score) in enumerate(scores)
    ]
    return SimpleNamespace(model_id=model_id, metrics=rows)
