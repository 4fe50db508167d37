"""The words under which everything stands in MLflow: tags, kinds and links."""

from __future__ import annotations

from urllib.parse import quote

KIND = "smp_ensemble.kind"
MODEL_ID = "smp_ensemble.model_id"
PRUNED = "smp_ensemble.pruned"
ERROR = "smp_ensemble.error"
SNAPSHOTS_LINK = "smp_ensemble.snapshots_link"
FILES_SHA256 = "smp_ensemble.files_sha256"
"""On a logged model: the SHA-256 of the list of its files, so that a changed list is found too."""
USED_BY = "smp_ensemble.used_by"
"""On a snapshot's run: the ensembles that have it as a member."""
MEMBERS = "smp_ensemble.members"
"""On an ensemble's logged model: ids of its members."""
CHAMPION = "smp_ensemble.champion"
"""What an ensemble was compared with before its alias was moved, or not: `NAME/VERSION`."""
PROMOTION = "smp_ensemble.promotion"
"""Whether the alias was moved, and why."""
STATE = "smp_ensemble.state"
"""On a training's run from its first moment: what its state on local disk is called."""
CONFIGURATION = "smp_ensemble.configuration"
"""On a training that is finished: the digest of all that determines its result; `resume=auto` finds it by that."""
STEP = "smp_ensemble.step"
"""On a snapshot's run from its first moment: completed steps, so that a delivery that broke off finds it again."""
CONTINUES = "smp_ensemble.continues"
"""On the run that `mlflow run` opened for a command that goes on with an earlier one: that run."""
PICK = "ensemble"
"""The tag that people set in the UI to pick members: `ensemble=NAME`."""

MODEL_TYPE = "segmentation"
"""What MLflow calls a model's type: of ours, and what our evaluator takes."""

PARENT_RUN = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
NOTE = "mlflow.note.content"

TRAINING, SNAPSHOT, ENSEMBLE, EVALUATION = "training", "snapshot", "ensemble", "evaluation"
PLAN = "plan"
"""Several trainings in one call: their runs are its children."""

LOWER_IS_BETTER = frozenset({"loss", "ece", "nll", "brier", "aurc"})


def is_ascending(metric: str) -> bool:
    """Whether less is better, by the metric's last word: `val_loss`, `val_ece`, ...

    Example:
        >>> is_ascending("val_loss"), is_ascending("val_iou/building")
        (True, False)
    """
    return metric.split("/", maxsplit=1)[0].rpartition("_")[2] in LOWER_IS_BETTER


def snapshots_link(tracking_uri: str, experiment_id: str, metric: str = "val_iou") -> str:
    """The address that opens the snapshot runs in the tracking UI, sorted by a metric, in model-training mode.

    For a store without a server (sqlite, files) the address is that of `mlflow server` with its defaults.
    """
    base = tracking_uri.rstrip("/") if tracking_uri.startswith("http") else "http://127.0.0.1:5000"
    search = quote(f"tags.`{KIND}` = '{SNAPSHOT}'", safe="").replace("%20", "+")
    order = quote(f"metrics.`{metric}`", safe=".")
    return (
        f"{base}/#/experiments/{experiment_id}/runs?workflowType=machine_learning&searchFilter={search}"
        f"&orderByKey={order}&orderByAsc={'true' if is_ascending(metric) else 'false'}"
    )
