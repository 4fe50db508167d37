"""What killed processes leave in MLflow: found again by those that go on, and closed where nobody will."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mlflow.entities import LoggedModelStatus

from smp_ensemble.tracking import names
from smp_ensemble.tracking.queries import PAGE, SNAPSHOTS, find_runs, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    import mlflow
    from mlflow.entities import LoggedModel

    from smp_ensemble.tracking.runs import TrackedRun
    from smp_ensemble.typing import Snapshot

REASON = "its process was killed"

logger = logging.getLogger(__name__)


def find_snapshot_run(training: TrackedRun, step: int) -> str | None:
    """The run of a training's snapshot that a delivery had begun; the answer to its creation may have been lost."""
    where = f"{SNAPSHOTS} and tags.`{names.PARENT_RUN}` = '{training.run_id}' and tags.`{names.STEP}` = '{step}'"
    found = find_runs(training.client, [training.experiment_id], where)
    return str(found[0].info.run_id) if found else None


def models_in(client: mlflow.MlflowClient, experiment_id: str, run_id: str) -> list[LoggedModel]:
    """The logged models that a run created, whole or not."""
    found = client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = {quoted(run_id)}", max_results=PAGE
    )
    return list(found)


def settle(run: TrackedRun) -> int:
    """Closes what is still open below a run when nothing below it is at work any more.

    Runs that are RUNNING become KILLED, their models that are PENDING become FAILED.

    Returns:
        How many runs were open.
    """
    where = f"tags.`{names.PARENT_RUN}` = '{run.run_id}' and attributes.status = 'RUNNING'"
    stale = find_runs(run.client, [run.experiment_id], where)
    for child in stale:
        run_id = child.info.run_id
        for model in models_in(run.client, run.experiment_id, run_id):
            if model.status == LoggedModelStatus.PENDING:
                run.client.finalize_logged_model(model.model_id, "FAILED")
        run.client.set_tag(run_id, names.ERROR, REASON)
        run.client.set_terminated(run_id, "KILLED")
        logger.info("run %s (%s) was left open by a process that was killed: closed", run_id, child.info.run_name)
    return len(stale)


def drop_doubles(run: TrackedRun, kept: Sequence[Snapshot]) -> int:
    """Deletes what a server created twice: it heard a call whose sender had given up, and the one made in its place.

    Args:
        run: The training's.
        kept: All its snapshots that were delivered.

    Returns:
        How many runs and models were deleted.
    """
    models = {snapshot.run_id: snapshot.model_id for snapshot in kept}
    steps = {str(snapshot.step) for snapshot in kept}
    dropped = 0
    for child in find_runs(
        run.client, [run.experiment_id], f"{SNAPSHOTS} and tags.`{names.PARENT_RUN}` = '{run.run_id}'"
    ):
        run_id, tags = child.info.run_id, child.data.tags
        double = run_id not in models and names.MODEL_ID not in tags and tags.get(names.STEP) in steps
        if not double and run_id not in models:
            continue
        for model in models_in(run.client, run.experiment_id, run_id):
            if model.model_id != models.get(run_id) and model.tags.get(names.KIND) == names.SNAPSHOT:
                run.client.delete_logged_model(model.model_id)
                dropped += 1
        if double:
            run.client.set_terminated(run_id, "KILLED")
            run.client.delete_run(run_id)
            dropped += 1
    if dropped:
        logger.info("run %s: %d runs and models that the server had created twice are deleted", run.run_id, dropped)
    return dropped
