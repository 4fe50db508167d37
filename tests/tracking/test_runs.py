"""Runs begin and end as they should, whoever opened them."""

from __future__ import annotations

import mlflow
import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.runs import (
    DATASET_TRIES,
    ending,
    experiment_id_of,
    fail_project_run,
    open_run,
    reopen,
    tracked_run,
)
from smp_ensemble.typing import DatasetReference


def status(client, run_id):
    return client.get_run(run_id).info.status


def test_a_new_run_is_finished_or_failed_with_the_reason(tracking):
    with tracked_run("training", experiment="mine", run_name="first") as run:
        assert status(tracking, run.run_id) == "RUNNING"
    found = tracking.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    assert found.data.tags[names.KIND] == "training"
    assert tracking.get_experiment(run.experiment_id).name == "mine"

    with pytest.raises(ConfigError), tracked_run("training") as failed:
        raise ConfigError("expected this, got that")
    found = tracking.get_run(failed.run_id)
    assert found.info.status == "FAILED"
    assert found.data.tags[names.ERROR] == "ConfigError: expected this, got that"


def test_the_run_of_mlflow_run_is_used_and_left_open(tracking, monkeypatch):
    present = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", present)
    with tracked_run("training") as run:
        assert run.run_id == present
    assert status(tracking, present) == "RUNNING"  # `mlflow run` ends it
    with pytest.raises(ConfigError, match="choose it by --experiment-name"):
        open_run("training", experiment="another")


def test_params_that_mlflow_run_logged_already_stay(tracking, monkeypatch):
    """`mlflow run` logs a project's parameters as they were typed, quotes and all; a param never changes."""
    present = tracking.create_run("0").info.run_id
    tracking.log_param(present, "mode", "''")
    monkeypatch.setenv("MLFLOW_RUN_ID", present)
    with tracked_run("training") as run:
        run.log_params({"mode": "binary", "lr": 0.1})
    assert tracking.get_run(present).data.params == {"mode": "''", "lr": "0.1"}


def test_an_active_run_is_used(tracking):
    with mlflow.start_run() as active, tracked_run("training") as run:
        assert run.run_id == active.info.run_id
    assert status(tracking, active.info.run_id) == "FINISHED"


def test_a_child_is_a_run_of_its_own(tracking):
    with tracked_run("training", experiment="mine") as parent, tracked_run("x", parent_run_id=parent.run_id) as child:
        pass
    tags = tracking.get_run(child.run_id).data.tags
    assert tags[names.PARENT_RUN] == parent.run_id
    assert child.experiment_id == parent.experiment_id


def test_metrics_twice_are_metrics_once(tracking):
    dataset = DatasetReference("aerial-val", "0123", "somewhere", 3)
    with tracked_run("training") as run:
        for _ in range(2):
            run.log_dataset(dataset, "validation")
            run.log_metrics({"val_iou": 0.5}, 7, dataset=dataset, timestamp=1000)
            run.log_params({"lr": 0.1, "cycles": None})
    (point,) = tracking.get_metric_history(run.run_id, "val_iou")
    assert (point.value, point.step) == (0.5, 7)
    found = tracking.get_run(run.run_id)
    assert found.data.params == {"lr": "0.1", "cycles": ""}
    (used,) = found.inputs.dataset_inputs
    assert (used.dataset.name, used.tags[0].value) == ("aerial-val", "validation")


def test_an_early_failure_ends_the_project_run(tracking, monkeypatch):
    fail_project_run("nothing to end")
    present = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", present)
    fail_project_run("no such folder")
    assert status(tracking, present) == "FAILED"
    assert tracking.get_run(present).data.tags[names.ERROR] == "no such folder"


def test_experiments_by_name_environment_and_default(tracking, monkeypatch):
    assert experiment_id_of(tracking, None) == "0"
    made = experiment_id_of(tracking, "roofs")
    assert experiment_id_of(tracking, "roofs") == made
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "roofs")
    assert experiment_id_of(tracking, None) == made
    tracking.delete_experiment(made)
    with pytest.raises(ConfigError, match="experiment 'roofs' was deleted"):
        experiment_id_of(tracking, "roofs")


def test_a_run_that_broke_off_is_opened_again(tracking, monkeypatch):
    run = open_run(names.TRAINING, run_name="roofs", tags={names.STATE: "token"})
    run.end("KeyboardInterrupt", "KILLED")
    assert tracking.get_run(run.run_id).info.status == "KILLED"
    project = tracking.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", project)
    again = reopen(run.run_id)
    assert (again.run_id, again.name, again.owned) == (run.run_id, "roofs", True)
    found = tracking.get_run(run.run_id)
    assert found.info.status == "RUNNING"
    assert names.ERROR not in found.data.tags
    assert found.data.tags[names.STATE] == "token"
    assert tracking.get_run(project).data.tags[names.CONTINUES] == run.run_id
    again.end()
    assert tracking.get_run(run.run_id).info.status == "FINISHED"


def test_a_run_that_is_gone_cannot_be_opened_again(tracking):
    run = open_run(names.TRAINING)
    tracking.delete_run(run.run_id)
    with pytest.raises(ConfigError, match=f"run {run.run_id} was deleted: restore it"):
        reopen(run.run_id)
    with pytest.raises(ConfigError, match=f"there is no run {'0' * 32} on this tracking server"):
        reopen("0" * 32)


def test_a_run_that_was_interrupted_is_killed(tracking):
    run = open_run(names.PLAN)
    with pytest.raises(KeyboardInterrupt), ending(run):
        raise KeyboardInterrupt
    assert tracking.get_run(run.run_id).info.status == "KILLED"


def test_metrics_that_are_there_are_not_kept_again(tracking):
    run = open_run(names.PLAN)
    run.log_new_metrics({"a": 1.0})
    run.log_new_metrics({"a": 1.0, "b": 2.0})
    assert [len(tracking.get_metric_history(run.run_id, name)) for name in "ab"] == [1, 1]


DATA = DatasetReference("roofs-val", "abc", "there", 4)


def test_of_two_runs_that_log_the_same_data_at_once_both_have_it(tracking):
    """The other run adds them between this one's look and its own insert, which the database then refuses."""
    first, second = open_run("training"), open_run("training")
    inserted = []

    def meanwhile(connection, cursor, statement, *_):
        if statement.startswith("INSERT INTO datasets") and not inserted:
            inserted.append(statement)
            second.log_dataset(DATA, "validation")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", meanwhile)
    try:
        first.log_dataset(DATA, "validation")
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", meanwhile)
    assert inserted
    for run in (first, second):
        (found,) = tracking.get_run(run.run_id).inputs.dataset_inputs
        assert (found.dataset.name, found.dataset.digest) == ("roofs-val", "abc")


@pytest.mark.parametrize(
    ("said", "calls"),
    [("(psycopg2.errors.UniqueViolation) duplicate key value", DATASET_TRIES), ("run is deleted", 1)],
)
def test_what_is_refused_again_and_again_is_said(tracking, monkeypatch, said, calls):
    run, asked = open_run("training"), []

    def refuse(*_):
        asked.append(1)
        raise MlflowException(said, error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(run.client, "log_inputs", refuse)
    with pytest.raises(MlflowException, match="run is deleted|duplicate key"):
        run.log_dataset(DATA, "validation")
    assert len(asked) == calls
