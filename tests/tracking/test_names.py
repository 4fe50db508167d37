"""The words in MLflow and the link into its UI."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from smp_ensemble.tracking import names


@pytest.mark.parametrize(
    ("metric", "ascending"),
    [("val_iou", False), ("val_loss", True), ("test_ece", True), ("val_nll", True), ("val_dice/roof_loss", False)],
)
def test_losses_and_errors_ascend(metric, ascending):
    assert names.is_ascending(metric) is ascending


@pytest.mark.parametrize("uri", ["http://tracking.example:5001/", "sqlite:///mlflow.db"])
def test_the_link_opens_snapshot_runs_sorted_in_training_mode(uri):
    link = names.snapshots_link(uri, "7", "val_loss")
    base, _, fragment = link.partition("/#")
    assert base == ("http://tracking.example:5001" if uri.startswith("http") else "http://127.0.0.1:5000")
    assert urlsplit(fragment).path == "/experiments/7/runs"
    assert parse_qs(urlsplit(fragment).query) == {
        "workflowType": ["machine_learning"],
        "searchFilter": ["tags.`smp_ensemble.kind` = 'snapshot'"],
        "orderByKey": ["metrics.`val_loss`"],
        "orderByAsc": ["true"],
    }


def test_the_link_is_the_one_measured_in_a_browser():
    link = names.snapshots_link("http://localhost:5000", "0", "val_iou")
    assert link.endswith(
        "/#/experiments/0/runs?workflowType=machine_learning&searchFilter=tags.%60smp_ensemble.kind%60+%3D+%27snapshot"
        "%27&orderByKey=metrics.%60val_iou%60&orderByAsc=false"
    )
