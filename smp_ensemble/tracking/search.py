"""Searching tracked snapshots: filtered as in the UI's Runs tab, ranked on one data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow

from smp_ensemble.exceptions import NothingFoundError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.measured import check_one_data_set
from smp_ensemble.tracking.ranking import best_models, snapshot_of
from smp_ensemble.tracking.runs import experiment_id_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smp_ensemble.typing import Snapshot


def search_snapshots(
    where: str = "",
    *,
    experiment: str | None = None,
    metric: str = "val_iou",
    limit: int | None = None,
    dataset_digest: str | None = None,
) -> list[Snapshot]:
    """Tracked snapshots, best first; equal scores in the order of model ids.

    Snapshots without the score, or where it is not a number, are not among them, nor those whose weights or runs were
    deleted.

    Args:
        where: The filter that one types in the UI's Runs tab, applied to snapshot runs; empty: all of them.
        experiment: Names, separated by commas; None: what MLflow's environment says, else `Default`.
        metric: Ranks them; losses and errors ascending.
        limit: At most so many; None: all. Memory and time grow with it, hardly with the store.
        dataset_digest: Only scores measured on this data set; None: that on which all that match were measured.

    Raises:
        ConfigError: MLflow cannot read the filter; or no data set is named, and scores were measured on several.
    """
    client = mlflow.MlflowClient()
    experiment_ids = experiment_ids_of(client, experiment)
    models = best_models(client, experiment_ids, where, metric=metric, limit=limit, dataset_digest=dataset_digest)
    if not dataset_digest:
        check_one_data_set(client, experiment_ids, metric, where, models)
    return [snapshot_of(model, dataset_digest) for model in models]


def first_experiment(experiment: str | None) -> str | None:
    """The first of experiments separated by commas: where the run belongs that is made from what was found in them."""
    return experiment.split(",")[0].strip() if experiment else None


def experiment_ids_of(client: mlflow.MlflowClient, experiment: str | None) -> list[str]:
    """Ids of experiments by their names, separated by commas; None: what MLflow's environment says.

    Raises:
        NothingFoundError: There is none of that name; lists those that there are.
    """
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


def experiment_names(client: mlflow.MlflowClient, experiment_ids: Iterable[str]) -> str:
    """`experiment 'A', experiment 'B'`, for messages."""
    return ", ".join(f"experiment '{client.get_experiment(one).name}'" for one in experiment_ids)


def link_to(experiment: str | None, metric: str) -> str:
    """The address of the snapshots of an experiment (the first, if several are named) in the tracking UI."""
    ids = experiment_ids_of(mlflow.MlflowClient(), experiment)
    return names.snapshots_link(mlflow.get_tracking_uri(), ids[0], metric)
