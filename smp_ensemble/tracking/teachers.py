"""Which tracked model a student learned from: one exact version, and a link to it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities import LoggedModelInput
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from smp_ensemble.tracking.flavor import local_folder
from smp_ensemble.tracking.packing import MLMODEL_FILE

if TYPE_CHECKING:
    from smp_ensemble.tracking.runs import TrackedRun

logger = logging.getLogger(__name__)


def exact_uri(uri: str) -> str:
    """`models:/m-...` of a model that an alias or a version names; the address itself where the server has none.

    Aliases move: what is written down about a training must mean the same model tomorrow.

    Raises:
        ConfigError: There is no such model.
    """
    path = local_folder(uri) / MLMODEL_FILE
    model_id = Model.load(str(path)).model_id if path.is_file() else None
    if model_id is None:
        return uri
    try:
        mlflow.MlflowClient().get_logged_model(model_id)
    except MlflowException:
        return uri  # a folder that came from another server
    return f"models:/{model_id}"


def link_teacher(run: TrackedRun, uri: str) -> None:
    """Makes a tracked teacher an input of the student's run, which is what MLflow calls lineage.

    A server that does not take it is a warning: the run's param `distilled_from` says the same.

    Args:
        run: Of the student's training.
        uri: As `exact_uri` gives it.
    """
    if not uri.startswith("models:/m-"):
        return
    try:
        run.client.log_inputs(run.run_id, models=[LoggedModelInput(uri.removeprefix("models:/"))])
    except MlflowException as error:
        logger.warning("run %s is not linked to its teacher %s: %s", run.run_id, uri, str(error).splitlines()[0])
