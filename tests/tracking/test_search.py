"""Searching snapshots: ranked by the server, filtered as in the UI."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from smp_ensemble.data.forms import load_data
from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.search import search_snapshots
from smp_ensemble.tracking.store import MlflowStore


def scores(snapshots):
    return [snapshot.metrics["val_iou"] for snapshot in snapshots]


def test_ranked_by_score_best_first(track):
    track(0.3, 0.6, 0.5)
    assert scores(search_snapshots()) == [0.6, 0.5, 0.3]
    assert scores(search_snapshots(limit=2)) == [0.6, 0.5]
    assert scores(search_snapshots(metric="val_loss")) == [0.6, 0.5, 0.3]  # a loss: least first
    assert search_snapshots(metric="val_nothing") == []


def test_a_reference_says_all_that_selection_needs(track):
    (tracked,) = track(0.5)
    (found,) = search_snapshots()
    assert (found.uri, found.run_id, found.step) == (tracked.uri, tracked.run_id, tracked.step)
    assert found.metrics == tracked.metrics
    assert found.params["arch"] == "unet"


def test_filtered_as_in_the_runs_tab(track):
    track(0.3, 0.6, 0.5)
    assert scores(search_snapshots("metrics.val_iou > 0.4")) == [0.6, 0.5]
    assert scores(search_snapshots("metrics.val_iou > 0.4 and params.cycle = '3'")) == [0.5]
    assert search_snapshots("params.arch = 'fpn'") == []
    with pytest.raises(ConfigError, match="MLflow cannot read the filter"):
        search_snapshots("val_iou >> 3")


def test_all_filters_of_the_documentation_can_be_read(track):
    track(0.5)
    page = (Path(__file__).parents[2] / "docs" / "finding.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (`+)(.+?)\1 \|$", page.split("## Filters")[1].split("## ")[0], re.MULTILINE)
    filters = [where for _, where in rows if where != "--where"]
    assert len(filters) == 9
    for where in filters:
        assert len(search_snapshots(where)) in (0, 1)
    assert len(search_snapshots("metrics.`val_iou/building` > 0.4")) == 1


def test_a_server_that_fails_is_not_taken_for_a_filter_that_cannot_be_read(track, monkeypatch):
    track(0.5)

    def fail(*_, **__):
        raise MlflowException("the database is away", TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr("mlflow.MlflowClient.search_runs", fail)
    with pytest.raises(MlflowException, match="the database is away"):
        search_snapshots("metrics.val_iou > 0.4")


def test_snapshots_whose_runs_were_deleted_are_not_found(track, tracking):
    first, _ = track(0.7, 0.5)
    tracking.delete_run(first.run_id)
    for where in ("", "metrics.val_iou > 0"):
        assert scores(search_snapshots(where)) == [0.5]
        assert scores(search_snapshots(where, limit=1)) == [0.5]


def test_experiments_are_apart_and_together(track):
    track(0.3, experiment="a")
    track(0.6, experiment="b")
    assert scores(search_snapshots(experiment="a")) == [0.3]
    assert scores(search_snapshots(experiment="a, b")) == [0.6, 0.3]
    with pytest.raises(NothingFoundError, match=r"no experiment 'c'; the tracking server has: Default, a, b"):
        search_snapshots(experiment="c")


def test_scores_on_other_data_do_not_compete(track, tracking, make_record, tiny_splits):
    track(0.5)
    other = load_data("synthetic:count=16,size=64,seed=3")
    track(0.9, splits=other)
    assert scores(search_snapshots(dataset_digest=tiny_splits.val.digest)) == [0.5]
    assert scores(search_snapshots(dataset_digest=other.val.digest)) == [0.9]
    assert scores(search_snapshots("metrics.val_iou > 0", dataset_digest=tiny_splits.val.digest)) == [0.5]


def test_pruned_and_unfinished_snapshots_are_no_candidates(track, tracking, make_record):
    with MlflowStore(keep=1) as store:
        for index, iou in enumerate((0.5, 0.7), 1):
            store.save_snapshot(make_record(index, iou=iou))
    assert scores(search_snapshots()) == [0.7]
    assert scores(search_snapshots("metrics.val_iou > 0")) == [0.7]
    pending = tracking.create_logged_model("0", tags={names.KIND: names.SNAPSHOT})
    assert pending.status.name == "PENDING"
    assert scores(search_snapshots()) == [0.7]


def test_equal_scores_keep_one_order(track):
    track(0.5, 0.5, 0.5)
    assert [one.uri for one in search_snapshots()] == sorted(one.uri for one in search_snapshots())


def test_references_are_values(track):
    (snapshot,) = track(0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.step = 3
