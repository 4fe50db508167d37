"""Candidates for an ensemble: found by a filter, or picked by a tag, an id or a registered model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlflow

from smp_ensemble.exceptions import ConfigError, NothingFoundError
from smp_ensemble.tracking.measured import described, digest_of, scored_data
from smp_ensemble.tracking.picking import picked
from smp_ensemble.tracking.queries import SNAPSHOTS
from smp_ensemble.tracking.search import experiment_ids_of, experiment_names, search_snapshots

if TYPE_CHECKING:
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
        dataset_digest: Only scores measured on this data set. Snapshots without are no candidates by a filter; those
            that somebody picked come last, with a warning that names them.

    Raises:
        ConfigError: Both `where` and `pick`; a filter that MLflow cannot read; or no data set is named, and scores were
            measured on several.
        NothingFoundError: Nothing matches; the message says what was searched, where, and what would match.
    """
    if where.strip() and pick.strip():
        raise ConfigError(f"expected either where or pick, got where={where!r} and pick={pick!r}: leave one empty")
    if pick.strip():
        return picked(pick.strip(), experiment=experiment, metric=metric, dataset_digest=dataset_digest)[:limit]
    found = search_snapshots(where, experiment=experiment, metric=metric, limit=limit, dataset_digest=dataset_digest)
    if not found:
        client = mlflow.MlflowClient()
        ids = experiment_ids_of(client, experiment)
        there = len(client.search_runs(ids, SNAPSHOTS, max_results=100))
        asked = f'where="{where}"' if where.strip() else "no filter"
        measured = f" with {metric} measured on data {dataset_digest}" if dataset_digest else f" with {metric}"
        raise NothingFoundError(
            f"no snapshot found ({asked}{measured}) in {experiment_names(client, ids)} at {mlflow.get_tracking_uri()}, "
            + (
                f"which holds {there}{' or more' if there == 100 else ''} snapshots, scored on "
                f"{described(client, ids, scored_data(client, ids, metric)) or f'no data by {metric}'}: "
                "loosen the filter, or use the data that they were scored on"
                if there
                else "which holds no snapshots: train some (smp-ensemble train), or name another experiment"
            )
        )
    return found


def known_digest(beginning: str, *, experiment: str | None = None, metric: str = "val_iou") -> str:
    """The digest of the data that snapshots were scored on, from its first characters.

    Raises:
        NothingFoundError: No snapshot was scored on such data; lists what there is.
        ConfigError: It is no beginning of a digest, or of several.
    """
    client = mlflow.MlflowClient()
    return digest_of(client, experiment_ids_of(client, experiment), beginning, metric)
