"""Trainings that are finished, found again: by all that determines their result, with the snapshots that they kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException

from smp_ensemble.tracking import names
from smp_ensemble.tracking.queries import SNAPSHOTS, find_runs, models_of, usable
from smp_ensemble.tracking.runs import experiment_id_of
from smp_ensemble.typing import Snapshot

if TYPE_CHECKING:
    from collections.abc import Mapping


def find_finished(kind: str, configuration: str, *, experiment: str | None, parent_run_id: str | None) -> str | None:
    """The newest finished run of a configuration, of a plan where one is named."""
    client = mlflow.MlflowClient()
    where = f"tags.`{names.KIND}` = '{kind}' and tags.`{names.CONFIGURATION}` = '{configuration}'"
    if parent_run_id is not None:
        where += f" and tags.`{names.PARENT_RUN}` = '{parent_run_id}'"
        experiment_id = client.get_run(parent_run_id).info.experiment_id
    else:
        experiment_id = experiment_id_of(client, experiment)
    found = find_runs(client, [experiment_id], where)
    return str(found[0].info.run_id) if found else None


def find_by_token(token: str, *, experiment: str | None, parent_run_id: str | None) -> str | None:
    """The run that a process opened for a training and died before it could write down which."""
    client = mlflow.MlflowClient()
    if parent_run_id is not None:
        experiment_id = client.get_run(parent_run_id).info.experiment_id
    else:
        experiment_id = experiment_id_of(client, experiment)
    found = find_runs(client, [experiment_id], f"tags.`{names.STATE}` = '{token}'")
    return str(found[0].info.run_id) if found else None


def configuration_of(run_id: str) -> tuple[str | None, Mapping[str, str]]:
    """The digest that a run was finished with, None for one that is not; and its params. Empty for no run."""
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None, {}
    return run.data.tags.get(names.CONFIGURATION), run.data.params


def snapshots_of(run_id: str) -> list[Snapshot]:
    """References to the snapshots of a finished training whose weights are kept, in the order of their steps."""
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    runs = find_runs(client, [experiment_id], f"{SNAPSHOTS} and tags.`{names.PARENT_RUN}` = '{run_id}'")
    present = {model.model_id for model in models_of(client, runs)}
    found = []
    for run in runs:
        tags = run.data.tags
        if usable(run) and tags[names.MODEL_ID] in present:
            step = int(tags[names.STEP])
            found.append(
                Snapshot(
                    f"models:/{tags[names.MODEL_ID]}", run.info.run_id, step, run.data.params, run.data.metrics, tags
                )
            )
    return sorted(found, key=lambda snapshot: snapshot.step)
