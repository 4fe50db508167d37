"""What MLflow is asked about runs and logged models: page by page, in bulk, and with every value quoted.

A page that was cut on its way is an error: it would look like the end of the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow.entities import LoggedModelStatus, ViewType
from mlflow.exceptions import MlflowException

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.cut_answers import refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import mlflow
    from mlflow.entities import LoggedModel, Run

PAGE = 500
"""Entities in a page; each costs a server on sqlite about 1.5 ms, asked for or not."""

SNAPSHOTS = f"tags.`{names.KIND}` = '{names.SNAPSHOT}'"
# MLflow's filters know statuses by number: READY is 2, and 'READY' finds nothing.
READY_SNAPSHOTS = f"{SNAPSHOTS} AND status = {LoggedModelStatus.READY.to_int()}"


def quoted(value: str) -> str:
    r"""A value as MLflow's filters take it: in single quotes, or in double ones if it holds a single one.

    Raises:
        ConfigError: It holds both, or a line break: the filter has no way to write it.

    Example:
        >>> quoted("mine"), quoted("the roofs' best")
        ("'mine'", '"the roofs\' best"')
    """
    if ("'" in value and '"' in value) or not value.isprintable():
        raise ConfigError(
            f"expected a name without line breaks and with one kind of quotes at most, got {value!r}: MLflow's filters "
            "cannot write it, use another name"
        )
    return f'"{value}"' if "'" in value else f"'{value}'"


def among(ids: Iterable[str]) -> str:
    """The list behind IN; twice a single one, which MLflow's parser would not take for a list."""
    listed = [f"'{one}'" for one in ids]
    return f"({', '.join(listed * 2 if len(listed) == 1 else listed)})"


def snapshots_where(where: str) -> str:
    """The filter for snapshot runs that match what a person typed."""
    return f"{SNAPSHOTS} AND {where}" if where.strip() else SNAPSHOTS


def run_pages(
    client: mlflow.MlflowClient,
    experiment_ids: Sequence[str],
    filter_string: str,
    *,
    size: int = PAGE,
    deleted: bool = False,
) -> Iterator[list[Run]]:
    """Runs that a filter matches, page by page; the pages grow from `size` to `PAGE`.

    Raises:
        ConfigError: MLflow cannot read the filter.
    """
    token = None
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    while True:
        try:
            with refused():
                page = client.search_runs(
                    list(experiment_ids), filter_string, run_view_type=view, max_results=size, page_token=token
                )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f'MLflow cannot read the filter "{filter_string}": {reason} '
                "Write it as in the UI's Runs tab, for example: metrics.val_iou > 0.5 and params.trainer = 'snapshot'"
            ) from error
        yield list(page)
        token = page.token
        size = min(PAGE, 2 * size)
        if not token:
            return


def find_runs(
    client: mlflow.MlflowClient, experiment_ids: Sequence[str], filter_string: str, *, deleted: bool = False
) -> list[Run]:
    """All runs that a filter matches.

    Raises:
        ConfigError: MLflow cannot read the filter.
    """
    return [run for page in run_pages(client, experiment_ids, filter_string, deleted=deleted) for run in page]


def ranked_pages(
    client: mlflow.MlflowClient,
    experiment_ids: Sequence[str],
    metric: str,
    dataset_digest: str | None,
    *,
    size: int = PAGE,
) -> Iterator[list[LoggedModel]]:
    """All snapshots' models by pages in the server's order: best first, equal ones newest first, unscored last."""
    order: dict[str, Any] = {"field_name": f"metrics.{metric}", "ascending": names.is_ascending(metric)}
    if dataset_digest:
        order["dataset_digest"] = dataset_digest
    token = None
    while True:
        with refused():
            page = client.search_logged_models(
                list(experiment_ids),
                filter_string=READY_SNAPSHOTS,
                max_results=size,
                order_by=[order],
                page_token=token,
            )
        yield list(page)
        token = page.token
        size = min(PAGE, 2 * size)
        if not token:
            return


def usable(run: Run) -> bool:
    """Whether a snapshot's run has weights: delivered whole, and not pruned since."""
    return names.MODEL_ID in run.data.tags and run.data.tags.get(names.PRUNED) != "true"


def models_of(client: mlflow.MlflowClient, runs: Iterable[Run]) -> list[LoggedModel]:
    """The logged models of snapshot runs, in bulk; without those that are pruned or not whole."""
    owners = {run.data.tags[names.MODEL_ID]: run.info for run in runs if usable(run)}
    infos = list(owners.values())
    found: dict[str, LoggedModel] = {}
    for start in range(0, len(infos), PAGE):
        part = infos[start : start + PAGE]
        experiment_ids = list(dict.fromkeys(info.experiment_id for info in part))
        filter_string = f"{READY_SNAPSHOTS} AND source_run_id IN {among(info.run_id for info in part)}"
        token = None
        while True:
            with refused():
                page = client.search_logged_models(
                    experiment_ids, filter_string=filter_string, max_results=PAGE, page_token=token
                )
            found |= {model.model_id: model for model in page}
            token = page.token
            if not token:
                break
    return [found[model_id] for model_id in owners if model_id in found]
