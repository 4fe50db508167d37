"""Candidates for an ensemble: found by a filter, or picked by a tag, an id or a registered model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow
from mlflow.exceptions import MlflowException

from smp_ensemble.ensembling import artifact
from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import local_folder
from smp_ensemble.tracking.search import (
    experiment_ids_of,
    experiment_names,
    find_runs,
    models_of,
    search_snapshots,
    snapshot_of,
)

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from smp_ensemble.typing import Snapshot


def find_candidates(
    *,
    where: str = "",
    pick: str = "",
    experiment: str | None = None,
    metric: str = "val_iou",
    limit: int | None = None,
    dataset_digest: str | None = None,
) -> list[Snapshot]:
    """Candidates by a filter or by a pick, best first; never none.

    Args:
        where: As in `search_snapshots`.
        pick: A name that runs were tagged with (`ensemble=NAME`; a tagged training stands for all its snapshots), or
            model ids separated by commas, or the name of a registered model, whose members become candidates.
        experiment: As in `search_snapshots`.
        metric: Ranks them.
        limit: At most so many.
        dataset_digest: Only scores measured on this data set.

    Raises:
        ConfigError: Both `where` and `pick`, or a filter that MLflow cannot read.
        NothingFoundError: Nothing matches; the message says what was searched, where, and what would match.
    """
    if where.strip() and pick.strip():
        raise ConfigError(f"expected either where or pick, got where={where!r} and pick={pick!r}: leave one empty")
    if pick.strip():
        return picked(pick.strip(), experiment=experiment, metric=metric)[:limit]
    found = search_snapshots(where, experiment=experiment, metric=metric, limit=limit, dataset_digest=dataset_digest)
    if not found:
        client = mlflow.MlflowClient()
        ids = experiment_ids_of(client, experiment)
        there = len(client.search_runs(ids, f"tags.`{names.KIND}` = '{names.SNAPSHOT}'", max_results=100))
        asked = f'where="{where}"' if where.strip() else "no filter"
        measured = f" with {metric} measured on data {dataset_digest}" if dataset_digest else f" with {metric}"
        raise NothingFoundError(
            f"no snapshot found ({asked}{measured}) in {experiment_names(client, ids)} at {mlflow.get_tracking_uri()}, "
            + (
                f"which holds {there}{'+' if there == 100 else ''} snapshots: loosen the filter, or use the data that "
                "they were scored on"
                if there
                else "which holds no snapshots: train some (smp-ensemble train), or name another experiment"
            )
        )
    return found


def picked(pick: str, *, experiment: str | None = None, metric: str = "val_iou") -> list[Snapshot]:
    """Snapshots that a person picked: by tag, by model id, or by a registered model's name; best first.

    Raises:
        NothingFoundError: Nothing stands under this name.
    """
    client = mlflow.MlflowClient()
    parts = [part.strip().removeprefix("models:/") for part in pick.split(",") if part.strip()]
    if all(part.startswith("m-") for part in parts):
        snapshots = [snapshot_of(_get_model(client, part)) for part in parts]
    else:
        ids = experiment_ids_of(client, experiment)
        tagged = find_runs(client, ids, f"tags.`{names.PICK}` = '{pick}'")
        runs = {run.info.run_id: run for run in tagged if run.data.tags.get(names.KIND) == names.SNAPSHOT}
        for parent in tagged:
            if parent.info.run_id not in runs:
                children = find_runs(
                    client,
                    [parent.info.experiment_id],
                    f"tags.`{names.PARENT_RUN}` = '{parent.info.run_id}' AND tags.`{names.KIND}` = '{names.SNAPSHOT}'",
                )
                runs |= {run.info.run_id: run for run in children}
        snapshots = [snapshot_of(model) for model in models_of(client, runs.values())]
        if not snapshots:
            snapshots = [snapshot_of(_get_model(client, one)) for one in _registered_members(client, pick)]
        if not snapshots:
            raise NothingFoundError(
                f"nothing is picked as '{pick}': no run in {experiment_names(client, ids)} has the tag "
                f"{names.PICK}={pick}, and no registered model has that name. Tick snapshot runs in the tracking UI "
                f"and add the tag {names.PICK}={pick}, or pass model ids: pick=m-...,m-..."
            )
    sign = 1 if names.is_ascending(metric) else -1
    worst = float("inf")
    return sorted(
        snapshots,
        key=lambda snapshot: (sign * snapshot.metrics[metric] if metric in snapshot.metrics else worst, snapshot.uri),
    )


def _get_model(client: mlflow.MlflowClient, model_id: str) -> LoggedModel:
    try:
        return client.get_logged_model(model_id)
    except MlflowException as error:
        raise NothingFoundError(
            f"there is no logged model '{model_id}' at {mlflow.get_tracking_uri()}: copy the id from the model's page"
        ) from error


def _registered_members(client: mlflow.MlflowClient, name: str) -> list[str]:
    """Model ids of the members of a registered model: `name`, `name@alias` or `name/version`."""
    base = name.partition("@")[0].partition("/")[0]
    versions = client.search_model_versions(f"name = '{base}'")
    if not versions:
        return []
    uri = f"models:/{name}" if name != base else f"models:/{base}/{max(int(one.version) for one in versions)}"
    spec = artifact.read_spec(local_folder(uri))
    return [member.source.removeprefix("models:/") for member in spec.members if member.source]
