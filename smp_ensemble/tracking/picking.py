"""What a person picked: runs with a tag, model ids, or a registered model's members."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from smp_ensemble.ensembling import artifact
from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.registry import nearest
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import local_folder
from smp_ensemble.tracking.measured import data_of
from smp_ensemble.tracking.queries import PAGE, find_runs, models_of, quoted, run_pages, usable
from smp_ensemble.tracking.ranking import Best, latest_metrics, snapshot_of
from smp_ensemble.tracking.search import experiment_ids_of, experiment_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow.entities import LoggedModel, Run

    from smp_ensemble.typing import Snapshot

NAMED = 10
"""So many snapshots are named one by one in a warning."""

logger = logging.getLogger(__name__)


def picked(
    pick: str, *, experiment: str | None = None, metric: str = "val_iou", dataset_digest: str | None = None
) -> list[Snapshot]:
    """Snapshots that a person picked: by tag, by model id, or by a registered model's name; best first.

    All that are picked are given, those without a score last; what is left out, and why, is logged.

    Args:
        pick: The tag's value, model ids separated by commas, or `NAME`, `NAME/VERSION` or `NAME@ALIAS`.
        experiment: Where tags are looked for; model ids and registered models have no experiment.
        metric: Ranks them.
        dataset_digest: Only scores measured on this data set count; None: any.

    Raises:
        ConfigError: A name that MLflow's filters cannot write, or ids and names in one list.
        NothingFoundError: Nothing stands under this name; the message says what does.
    """
    client = mlflow.MlflowClient()
    parts = list(dict.fromkeys(part.strip().removeprefix("models:/") for part in pick.split(",") if part.strip()))
    ids = [part for part in parts if part.startswith("m-")]
    if ids and len(ids) == len(parts):
        models = [_get_model(client, part) for part in ids]
    elif ids and len(parts) > 1:
        raise ConfigError(f"expected model ids or one name, got both in pick='{pick}': {', '.join(ids)} are ids")
    else:
        experiment_ids = experiment_ids_of(client, experiment)
        models = _tagged(client, experiment_ids, pick)
        if not models:
            models = [_get_model(client, one) for one in _registered_members(client, pick)]
        if not models:
            raise NothingFoundError(_nothing(client, experiment_ids, pick))
    best = Best(metric, None, dataset_digest)
    _say_what_does_not_compare(models, metric, dataset_digest)
    worst = float("inf")

    def rank(model: LoggedModel) -> tuple[float, str]:
        cost = best.cost(model)
        return (worst if cost is None else cost, model.model_id)

    return [snapshot_of(model, dataset_digest) for model in sorted(models, key=rank)]


def _tagged(client: mlflow.MlflowClient, experiment_ids: Sequence[str], pick: str) -> list[LoggedModel]:
    """Models of tagged snapshot runs, and of all snapshots below tagged trainings and plans."""
    runs: dict[str, Run] = {}
    seen: set[str] = set()
    level = find_runs(client, experiment_ids, f"tags.`{names.PICK}` = {quoted(pick)}")
    while level:
        below = []
        for run in level:
            if run.info.run_id in seen:
                continue
            seen.add(run.info.run_id)
            if run.data.tags.get(names.KIND) == names.SNAPSHOT:
                runs[run.info.run_id] = run
            else:
                children = f"tags.`{names.PARENT_RUN}` = '{run.info.run_id}'"
                below += find_runs(client, [run.info.experiment_id], children)
        level = below
    models = models_of(client, runs.values())
    found = {model.model_id for model in models}
    missing = [run for run in runs.values() if run.data.tags.get(names.MODEL_ID) not in found]
    if missing:
        logger.warning(
            "picked, but without weights (%s), so left out: %s",
            "pruned by keep=N, deleted, or not delivered yet" if any(map(usable, missing)) else "pruned or not whole",
            _some([str(run.info.run_name) for run in missing]),
        )
    return models


def _say_what_does_not_compare(models: Sequence[LoggedModel], metric: str, dataset_digest: str | None) -> None:
    if dataset_digest:
        others = [model for model in models if metric not in latest_metrics(model, dataset_digest)]
        if others:
            lines = [
                f"{model.model_id} (on {', '.join(sorted(one.digest or one.name for one in data_of([model], metric)))})"
                if data_of([model], metric)
                else f"{model.model_id} (none at all)"
                for model in others
            ]
            logger.warning(
                "%d of %d picked snapshots have no %s on the data asked for (%s), so they rank last: %s",
                len(others),
                len(models),
                metric,
                dataset_digest,
                _some(lines),
            )
        return
    data = data_of(models, metric)
    if len(data) > 1:
        logger.warning(
            "picked snapshots have %s measured on %d data sets, and such scores do not compare: %s",
            metric,
            len(data),
            ", ".join(sorted(f"{one.name} {one.digest}".strip() for one in data)),
        )


def _some(lines: Sequence[str]) -> str:
    return ", ".join(lines[:NAMED]) + (f" and {len(lines) - NAMED} more" if len(lines) > NAMED else "")


def _nothing(client: mlflow.MlflowClient, experiment_ids: Sequence[str], pick: str) -> str:
    """What was searched, and what would match."""
    reason = (
        f"nothing is picked as '{pick}': no snapshot in {experiment_names(client, experiment_ids)} at "
        f"{mlflow.get_tracking_uri()} has the tag {names.PICK}={pick}, and no registered model has that name. "
    )
    others = [one for one in client.search_experiments() if one.experiment_id not in experiment_ids]
    if others:
        there = [one.experiment_id for one in others]
        page = next(run_pages(client, there, f"tags.`{names.PICK}` = {quoted(pick)}", size=100))
        if page:
            holding = {run.info.experiment_id for run in page}
            labels = ", ".join(sorted(one.name for one in others if one.experiment_id in holding))
            return f"{reason}Runs with this tag are in other experiments: pass experiment={labels}"
    page = next(run_pages(client, experiment_ids, f"tags.`{names.PICK}` LIKE '%'", size=PAGE))
    values = {run.data.tags[names.PICK] for run in page}
    if values:
        return f"{reason}Tags {names.PICK}=NAME there: {nearest(pick, values)}"
    return (
        f"{reason}Tick snapshot runs in the tracking UI and add the tag {names.PICK}={pick}, or pass model ids: "
        "pick=m-...,m-..."
    )


def _get_model(client: mlflow.MlflowClient, model_id: str) -> LoggedModel:
    try:
        model = client.get_logged_model(model_id)
    except MlflowException as error:
        raise NothingFoundError(
            f"there is no logged model '{model_id}' at {mlflow.get_tracking_uri()}: copy the id from the model's page"
        ) from error
    if model.status != LoggedModelStatus.READY:
        raise NothingFoundError(f"logged model '{model_id}' is not whole: its status is {model.status}; pick another")
    return model


def _registered_members(client: mlflow.MlflowClient, name: str) -> list[str]:
    """Model ids of the members of a registered model: `name`, `name@alias` or `name/version`."""
    base = name.partition("@")[0].partition("/")[0]
    versions = client.search_model_versions(f"name = {quoted(base)}")
    if not versions:
        return []
    uri = f"models:/{name}" if name != base else f"models:/{base}/{max(int(one.version) for one in versions)}"
    spec = artifact.read_spec(local_folder(uri))
    return [member.source.removeprefix("models:/") for member in spec.members if member.source]
