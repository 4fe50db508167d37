"""Finding tracked snapshots: ranked, filtered as in the UI, or picked by a tag, an id or a registered model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from smp_ensemble.ensembling import artifact
from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import local_folder
from smp_ensemble.tracking.runs import experiment_id_of
from smp_ensemble.typing import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlflow.entities import LoggedModel, Run

PAGE = 500
# MLflow's filters know statuses by number: READY is 2, and 'READY' finds nothing.
READY_SNAPSHOTS = f"tags.`{names.KIND}` = '{names.SNAPSHOT}' AND status = {LoggedModelStatus.READY.to_int()}"


def search_snapshots(
    where: str = "",
    *,
    experiment: str | None = None,
    metric: str = "val_iou",
    limit: int | None = None,
    dataset_digest: str | None = None,
) -> list[Snapshot]:
    """Tracked snapshots, best first.

    Args:
        where: The filter that one types in the UI's Runs tab, applied to snapshot runs; empty: all of them.
        experiment: Names, separated by commas; None: what MLflow's environment says, else `Default`.
        metric: Ranks them; losses and errors ascending.
        limit: At most so many; None: all.
        dataset_digest: Only scores measured on this data set; None: any.

    Raises:
        ConfigError: MLflow cannot read the filter.
    """
    client = mlflow.MlflowClient()
    experiment_ids = _experiment_ids(client, experiment)
    models = (
        _by_runs(client, experiment_ids, where)
        if where.strip()
        else _ranked(client, experiment_ids, metric, limit, dataset_digest)
    )
    snapshots = [_snapshot(model, dataset_digest) for model in models]
    scored = [snapshot for snapshot in snapshots if metric in snapshot.metrics]
    sign = 1 if names.is_ascending(metric) else -1
    scored.sort(key=lambda snapshot: (sign * snapshot.metrics[metric], snapshot.uri))
    return scored[:limit]


def _experiment_ids(client: mlflow.MlflowClient, experiment: str | None) -> list[str]:
    if not experiment:
        return [experiment_id_of(client, None)]
    ids = []
    for name in (part.strip() for part in experiment.split(",")):
        found = client.get_experiment_by_name(name)
        if found is None:
            known = ", ".join(sorted(known.name for known in client.search_experiments())) or "none"
            raise NothingFoundError(f"there is no experiment '{name}'; the tracking server has: {known}")
        ids.append(found.experiment_id)
    return ids


def _ranked(
    client: mlflow.MlflowClient,
    experiment_ids: list[str],
    metric: str,
    limit: int | None,
    dataset_digest: str | None,
) -> Iterable[LoggedModel]:
    """The server ranks: 45 times faster than sorting runs by a metric when there are thousands."""
    order: dict[str, Any] = {"field_name": f"metrics.{metric}", "ascending": names.is_ascending(metric)}
    datasets = None
    if dataset_digest:
        name = _dataset_name(client, experiment_ids, dataset_digest)
        if name is None:
            return []
        order |= {"dataset_name": name, "dataset_digest": dataset_digest}
        datasets = [{"dataset_name": name, "dataset_digest": dataset_digest}]
    found: list[LoggedModel] = []
    token = None
    while limit is None or len(found) < limit:
        page = client.search_logged_models(
            experiment_ids,
            filter_string=READY_SNAPSHOTS,
            datasets=datasets,
            max_results=min(PAGE, limit - len(found)) if limit else PAGE,
            order_by=[order],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            break
    return found


def _dataset_name(client: mlflow.MlflowClient, experiment_ids: list[str], digest: str) -> str | None:
    """The name under which scores on a data set were logged; ranking wants both."""
    runs = client.search_runs(
        experiment_ids,
        f"tags.`{names.KIND}` = '{names.SNAPSHOT}' AND dataset.digest = '{digest}'",
        max_results=1,
    )
    for run in runs:
        for used in run.inputs.dataset_inputs if run.inputs else ():
            if used.dataset.digest == digest:
                return str(used.dataset.name)
    return None


def _by_runs(client: mlflow.MlflowClient, experiment_ids: list[str], where: str) -> Iterable[LoggedModel]:
    return _models_of(client, _runs(client, experiment_ids, f"tags.`{names.KIND}` = '{names.SNAPSHOT}' AND {where}"))


def _runs(client: mlflow.MlflowClient, experiment_ids: list[str], filter_string: str) -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        try:
            page = client.search_runs(experiment_ids, filter_string, max_results=PAGE, page_token=token)
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f'MLflow cannot read the filter "{filter_string}": {reason} '
                "Write it as in the UI's Runs tab, for example: metrics.val_iou > 0.5 and params.trainer = 'snapshot'"
            ) from error
        found += page
        token = page.token
        if not token:
            return found


def _models_of(client: mlflow.MlflowClient, runs: Iterable[Run]) -> list[LoggedModel]:
    models = []
    for run in runs:
        model_id = run.data.tags.get(names.MODEL_ID)
        if model_id is None or run.data.tags.get(names.PRUNED) == "true":
            continue
        model = client.get_logged_model(model_id)
        if model.status == LoggedModelStatus.READY:
            models.append(model)
    return models


def _snapshot(model: LoggedModel, dataset_digest: str | None = None) -> Snapshot:
    metrics = model.metrics or []
    step = max((metric.step for metric in metrics), default=0)
    return Snapshot(
        uri=f"models:/{model.model_id}",
        run_id=model.source_run_id or "",
        step=step,
        params=dict(model.params or {}),
        metrics={
            metric.key: metric.value
            for metric in metrics
            if dataset_digest is None or metric.dataset_digest == dataset_digest
        },
        tags=dict(model.tags or {}),
    )


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
        ids = _experiment_ids(client, experiment)
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


def experiment_names(client: mlflow.MlflowClient, experiment_ids: Iterable[str]) -> str:
    """`experiment 'A', experiment 'B'`, for messages."""
    return ", ".join(f"experiment '{client.get_experiment(one).name}'" for one in experiment_ids)


def picked(pick: str, *, experiment: str | None = None, metric: str = "val_iou") -> list[Snapshot]:
    """Snapshots that a person picked: by tag, by model id, or by a registered model's name; best first.

    Raises:
        NothingFoundError: Nothing stands under this name.
    """
    client = mlflow.MlflowClient()
    parts = [part.strip().removeprefix("models:/") for part in pick.split(",") if part.strip()]
    if all(part.startswith("m-") for part in parts):
        snapshots = [_snapshot(_get_model(client, part)) for part in parts]
    else:
        ids = _experiment_ids(client, experiment)
        tagged = _runs(client, ids, f"tags.`{names.PICK}` = '{pick}'")
        runs = {run.info.run_id: run for run in tagged if run.data.tags.get(names.KIND) == names.SNAPSHOT}
        for parent in tagged:
            if parent.info.run_id not in runs:
                children = _runs(
                    client,
                    [parent.info.experiment_id],
                    f"tags.`{names.PARENT_RUN}` = '{parent.info.run_id}' AND tags.`{names.KIND}` = '{names.SNAPSHOT}'",
                )
                runs |= {run.info.run_id: run for run in children}
        snapshots = [_snapshot(model) for model in _models_of(client, runs.values())]
        if not snapshots:
            snapshots = [_snapshot(_get_model(client, one)) for one in _registered_members(client, pick)]
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


def link_to(experiment: str | None, metric: str) -> str:
    """The address of the snapshots of an experiment (the first, if several are named) in the tracking UI."""
    ids = _experiment_ids(mlflow.MlflowClient(), experiment)
    return names.snapshots_link(mlflow.get_tracking_uri(), ids[0], metric)
