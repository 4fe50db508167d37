"""On which data sets snapshots have scores: only scores on one of them compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking.queries import (
    PAGE,
    READY_SNAPSHOTS,
    SNAPSHOTS,
    models_of,
    quoted,
    run_pages,
    snapshots_where,
)
from smp_ensemble.typing import DatasetReference

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import mlflow
    from mlflow.entities import LoggedModel

KINDS_OF_DATA = 20
"""More data sets than these are not told apart one by one."""

UNKNOWN = DatasetReference("unknown data", "")


def data_of(models: Iterable[LoggedModel], metric: str) -> set[DatasetReference]:
    """The data sets on which models have scores by a metric."""
    return {
        DatasetReference(one.dataset_name or "", one.dataset_digest) if one.dataset_digest else UNKNOWN
        for model in models
        for one in model.metrics or []
        if one.key == metric
    }


def scored_data(
    client: mlflow.MlflowClient,
    experiment_ids: Sequence[str],
    metric: str,
    *,
    where: str = "",
    known: Iterable[DatasetReference] = (),
) -> list[DatasetReference]:
    """The data sets on which snapshots have scores, found by asking for runs that used none of those known so far.

    A question costs one page, so that thousands of snapshots on one data set are asked for once. Scores without a data
    set are only known from `known`.
    """
    found = set(known)
    passed = {one.digest for one in found if one.digest}
    for _ in range(KINDS_OF_DATA):
        others = "".join(f" AND dataset.digest != {quoted(digest)}" for digest in sorted(passed))
        filter_string = snapshots_where(where) + (others or " AND dataset.digest != ''")
        page = next(run_pages(client, experiment_ids, filter_string, size=10))
        used = {data.dataset.digest for run in page if run.inputs for data in run.inputs.dataset_inputs}
        if not used - passed:
            break
        found |= data_of(models_of(client, page), metric)
        passed |= used
    return sorted(found, key=lambda one: (one.name, one.digest))


def check_one_data_set(
    client: mlflow.MlflowClient,
    experiment_ids: Sequence[str],
    metric: str,
    where: str,
    models: Sequence[LoggedModel],
) -> None:
    """Refuses a ranking over several data sets.

    Args:
        client: Of the tracking server.
        experiment_ids: Where was searched.
        metric: What was ranked by.
        where: The filter.
        models: What was found.

    Raises:
        ConfigError: Matching snapshots have scores on more than one; lists them.
    """
    if not models:
        return
    found = scored_data(client, experiment_ids, metric, where=where, known=data_of(models, metric))
    if len(found) > 1:
        raise ConfigError(
            f"snapshots have {metric} measured on {len(found)} data sets, and such scores do not compare: "
            f"{described(client, experiment_ids, found)}. Say which: --dataset DIGEST (its first characters do), "
            "dataset_digest=DIGEST in Python"
        )


def described(client: mlflow.MlflowClient, experiment_ids: Sequence[str], found: Iterable[DatasetReference]) -> str:
    """Names, digests and how many snapshots, for messages."""
    return "; ".join(
        f"{one.name} {one.digest} ({_count(client, experiment_ids, one)} snapshots)" if one.digest else one.name
        for one in sorted(found, key=lambda one: (one.name, one.digest))
    )


def _count(client: mlflow.MlflowClient, experiment_ids: Sequence[str], data: DatasetReference) -> str:
    page = client.search_logged_models(
        list(experiment_ids),
        filter_string=READY_SNAPSHOTS,
        datasets=[{"dataset_name": data.name, "dataset_digest": data.digest}],
        max_results=PAGE,
    )
    return f"{len(page)}{' or more' if page.token else ''}"


def digest_of(client: mlflow.MlflowClient, experiment_ids: Sequence[str], prefix: str, metric: str = "val_iou") -> str:
    """The digest of the data set that its first characters mean.

    Raises:
        NothingFoundError: No snapshot was scored on such data; lists what there is.
        ConfigError: It is no beginning of a digest, or of several.
    """
    if not prefix.isalnum():
        raise ConfigError(f"expected the first characters of a data set's digest, got '{prefix}': letters and digits")
    found: dict[str, DatasetReference] = {}
    for _ in range(KINDS_OF_DATA):
        others = "".join(f" AND dataset.digest != {quoted(digest)}" for digest in found)
        filter_string = f"{SNAPSHOTS} AND dataset.digest LIKE '{prefix}%'{others}"
        page = next(run_pages(client, experiment_ids, filter_string, size=10))
        new = {
            data.dataset.digest: DatasetReference(data.dataset.name, data.dataset.digest)
            for run in page
            if run.inputs
            for data in run.inputs.dataset_inputs
            if data.dataset.digest.startswith(prefix) and data.dataset.digest not in found
        }
        if not new:
            break
        found |= new
    if prefix in found or len(found) == 1:
        return prefix if prefix in found else next(iter(found))
    if found:
        raise ConfigError(
            f"'{prefix}' is the beginning of several digests: {described(client, experiment_ids, found.values())}; "
            "pass more of it"
        )
    there = described(client, experiment_ids, scored_data(client, experiment_ids, metric))
    raise NothingFoundError(f"no snapshot was scored on data '{prefix}'; there is: {there or 'none'}")
