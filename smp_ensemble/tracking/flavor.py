"""Our MLflow flavor: plain files, no pickle, and our own code travels along, so it loads where we are not installed."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from smp_ensemble.data.limits import FILES, SERVED, limits_from
from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError, InputError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.payload import answer
from smp_ensemble.tracking import names
from smp_ensemble.tracking.manifest import manifest_digest
from smp_ensemble.tracking.packing import complete
from smp_ensemble.tracking.runs import TrackedRun, attach, tracked_run
from smp_ensemble.tracking.verification import verify_mlmodel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smp_ensemble.ensembling.ensemble import Ensemble

IS_SERVED = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
"""The environment variable that MLflow's scoring server sets to `true`."""


def save_model(ensemble: Ensemble, path: str | Path, *, signature: str = "params") -> None:
    """Saves an ensemble as an MLflow model in a new local folder.

    Args:
        ensemble: Its members are `Member`s, and it knows its class names.
        path: Must not exist yet.
        signature: `params`, `arrays` or `images`.

    Raises:
        ConfigError: `path` exists, or the ensemble cannot be saved.
    """
    folder = Path(path)
    if folder.exists():
        raise ConfigError(f"{folder} exists already: choose another path, or delete it")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as name:
        staging = Path(name) / "model"
        artifact.save_ensemble(ensemble, staging)
        complete(staging, signature=signature)
        staging.rename(folder)


def log_folder(
    client: mlflow.MlflowClient,
    folder: Path,
    *,
    model_id: str,
    run_id: str,
    step: int = 0,
    signature: str = "params",
) -> None:
    """Uploads a folder as the artifacts of a logged model that was created before, and makes it READY.

    Safe to repeat: everything is written again to the same place.
    """
    location = client.get_logged_model(model_id).artifact_location
    model = Model(artifact_path=location, run_id=run_id, model_uuid=model_id, model_id=model_id)
    complete(folder, model=model, signature=signature)
    client.log_model_artifacts(model_id, str(folder))
    client.set_logged_model_tags(model_id, {names.FILES_SHA256: manifest_digest(folder)})
    client.finalize_logged_model(model_id, "READY")
    outputs = client.get_run(run_id).outputs
    if model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(model_id, step)])  # a second time would raise


def log_model(
    ensemble: Ensemble,
    name: str = "ensemble",
    *,
    run_id: str | None = None,
    signature: str = "params",
    params: dict[str, Any] | None = None,
    tags: dict[str, str] | None = None,
    registered_model_name: str | None = None,
) -> str:
    """Logs an ensemble to MLflow and returns its URI, `models:/m-...`.

    Args:
        ensemble: Its members are `Member`s, and it knows its class names.
        name: Of the logged model.
        run_id: The run it belongs to; None: the active run, or a new one.
        signature: `params`, `arrays` or `images`.
        params: Of the logged model.
        tags: Of the logged model, beside its kind.
        registered_model_name: Registers it under this name as well.

    Raises:
        ConfigError: The ensemble cannot be saved.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        artifact.save_ensemble(ensemble, folder)
        if run_id is not None:
            run = attach(run_id)
            uri = _log(run, folder, name, signature, params, tags)
        else:
            with tracked_run(names.ENSEMBLE) as run:
                uri = _log(run, folder, name, signature, params, tags)
    if registered_model_name:
        register(uri, registered_model_name)
    return uri


def _log(
    run: TrackedRun,
    folder: Path,
    name: str,
    signature: str,
    params: dict[str, Any] | None,
    tags: dict[str, str] | None,
) -> str:
    logged = run.client.create_logged_model(
        run.experiment_id,
        name=name,
        source_run_id=run.run_id,
        params=params,
        tags={names.KIND: names.ENSEMBLE, **(tags or {})},
        model_type=names.MODEL_TYPE,
    )
    try:
        log_folder(run.client, folder, model_id=logged.model_id, run_id=run.run_id, signature=signature)
    except BaseException:
        run.client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    return f"models:/{logged.model_id}"


def register(uri: str, name: str, alias: str | None = None) -> str:
    """Registers a logged model as a new version of `name`, and returns the version.

    Args:
        uri: `models:/m-...`, one exact logged model.
        name: Of the registered model; created if need be.
        alias: Moved to the new version, if given.
    """
    client = mlflow.MlflowClient()
    found = mlflow.register_model(uri, name)
    if alias:
        client.set_registered_model_alias(name, alias, found.version)
    return str(found.version)


def local_folder(uri: str) -> Path:
    """The artifact's files for reading: the store's own where it is local, else a download.

    Raises:
        ConfigError: There is no such model.
    """
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot find the model '{uri}': {reason}") from error


def load_model(uri: str) -> Ensemble:
    """Loads and verifies an ensemble, a soup or a snapshot.

    Args:
        uri: `models:/name@alias`, `models:/m-...`, `runs:/...`, or a local folder.

    Returns:
        An `nn.Module` in evaluation mode on the CPU: raw images `(N, C, H, W)` to probabilities `(N, K, H, W)`;
        H and W must be multiples of the members' stride, `Engine(ensemble)` takes any.

    Raises:
        ConfigError: There is no such model.
        IntegrityError: A file is missing or changed. Everything is verified before anything is built, and the model's
            `code/` is not imported.
    """
    folder = local_folder(uri)
    verify_mlmodel(folder, uri)
    ensemble = artifact.load_ensemble(folder)
    first = ensemble.members[0]
    if len(ensemble.members) == 1 and isinstance(first, Member) and uri.startswith("models:/m-"):
        first.source = first.source or uri  # a snapshot cannot know its own address when it is written
    return ensemble


class PyfuncModel:
    """What `mlflow.pyfunc.load_model` wraps: one engine, and `predict` for arrays, lists and DataFrames.

    Threads may call it at once: each request has its params to itself, and the engine runs for one of them at a time.

    Args:
        engine: Runs the ensemble.
        environment: Where limits of requests may be set, see `data.limits.VARIABLES`; None: the process's.

    Raises:
        ConfigError: A limit is no whole number above 0.
    """

    def __init__(self, engine: Engine, environment: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        environment = os.environ if environment is None else environment
        self._limits = limits_from(environment, FILES)
        self._served_limits = limits_from(environment, SERVED)
        self._turn = threading.Lock()

    def get_raw_model(self) -> Engine:
        """The engine, for `mlflow.pyfunc.load_model(uri).get_raw_model()`."""
        return self.engine

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """Answers arrays with arrays and DataFrames with DataFrames; see `inference.payload.answer`."""
        served = os.environ.get(IS_SERVED) == "true"  # MLflow says so after it has loaded the model
        try:
            return answer(self.engine, data, params or {}, self._served_limits if served else self._limits, self._turn)
        except InputError as error:
            if not all(isinstance(name, Hashable) for name in getattr(data, "columns", ())):
                raise  # MLflow's server puts the data into its answer, and fails where pandas cannot print them
            raise MlflowException.invalid_parameter_value(str(error)) from error


def _load_pyfunc(path: str) -> PyfuncModel:
    """MLflow's entry: `path` is the model's folder."""
    folder = Path(path)
    if in_spark_worker():
        return _load_once(folder, artifact.file_sha256(folder / artifact.ENSEMBLE_FILE))
    return _load(folder)


def _load(folder: Path, _sha256: str = "") -> PyfuncModel:
    verify_mlmodel(folder)
    return PyfuncModel(Engine(artifact.load_ensemble(folder)))


_load_once = lru_cache(maxsize=2)(_load)  # MLflow loads anew for each task of a local Spark; a worker does many of them


def in_spark_worker() -> bool:
    """Whether this process runs a task of Spark."""
    pyspark = sys.modules.get("pyspark")
    return pyspark is not None and pyspark.TaskContext.get() is not None
