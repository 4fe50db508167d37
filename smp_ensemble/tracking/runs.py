"""One MLflow run from its start to its end: found or created, and FAILED with a reason if something goes wrong."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from smp_ensemble.exceptions import ConfigError, UndeliveredError
from smp_ensemble.tracking import names
from smp_ensemble.tracking.outages import brief_calls

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from smp_ensemble.typing import DatasetReference

PARAM_LIMIT = 6000
"""Longest value that MLflow keeps for a param, in characters."""


DATASET_TRIES = 3
"""MLflow looks for a data set, and adds it if it is new: of two runs that do so at the same moment one is refused, by
its database, in words that differ; the next time it finds the other's."""


def experiment_id_of(client: mlflow.MlflowClient, experiment: str | None) -> str:
    """The id of an experiment by name, created if need be; None: what MLflow's environment says, else `Default`.

    Raises:
        ConfigError: The experiment was deleted.
    """
    name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if not name:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name))
    if found.lifecycle_stage != "active":
        raise ConfigError(f"experiment '{name}' was deleted: restore it in MLflow, or use another name")
    return str(found.experiment_id)


@dataclass(frozen=True)
class TrackedRun:
    """A run that is open for writing; every method goes to the tracking server at once.

    Attributes:
        client: Of the tracking server.
        run_id: The run.
        experiment_id: Its experiment.
        name: Its name.
        owned: Whether it was created here, so that it is ended here.
    """

    client: mlflow.MlflowClient
    run_id: str
    experiment_id: str
    name: str
    owned: bool

    @property
    def link(self) -> str:
        """The address of the snapshots of its experiment in the tracking UI, sorted by score."""
        return names.snapshots_link(mlflow.get_tracking_uri(), self.experiment_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keeps params that the run does not have yet; None becomes the empty string.

        A param never changes in MLflow, and `mlflow run` has logged a project's own before it starts the project.
        """
        present = self.client.get_run(self.run_id).data.params
        entries = [Param(key, as_param(value)) for key, value in params.items() if key not in present]
        self.client.log_batch(self.run_id, params=entries)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        step: int = 0,
        *,
        model_id: str | None = None,
        dataset: DatasetReference | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Keeps metrics, linked to a logged model and a data set where given; repeating a call adds nothing."""
        timestamp = timestamp or now()
        entries = [
            Metric(
                key,
                float(value),
                timestamp,
                step,
                model_id=model_id,
                dataset_name=dataset.name if dataset else None,
                dataset_digest=dataset.digest if dataset else None,
                run_id=self.run_id,
            )
            for key, value in metrics.items()
        ]
        self.client.log_batch(self.run_id, metrics=entries)

    def log_new_metrics(self, metrics: Mapping[str, float], *, dataset: DatasetReference | None = None) -> None:
        """Keeps metrics that the run does not have yet: a process that was killed may have kept them."""
        present = self.client.get_run(self.run_id).data.metrics
        self.log_metrics({name: value for name, value in metrics.items() if name not in present}, dataset=dataset)

    def log_dataset(self, dataset: DatasetReference, context: str) -> None:
        """Says what data the run used, and what for (`training`, `validation`, `test`)."""
        entity = Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=dataset.source,
            profile=f'{{"images": {dataset.count}}}',
        )
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", context)])]
        for tries_left in reversed(range(DATASET_TRIES)):
            try:
                self.client.log_inputs(self.run_id, inputs)
            except MlflowException as error:
                if not tries_left or not any(word in str(error).lower() for word in ("unique", "duplicate")):
                    raise
            else:
                return

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Keeps a file as an artifact."""
        self.client.log_artifact(self.run_id, str(path), folder)

    def end(self, error: str | None = None, status: str = "FAILED") -> None:
        """Ends the run: with the reason as a tag and FAILED, or KILLED; else FINISHED if it was created here."""
        if error is not None:
            self.client.set_tag(self.run_id, names.ERROR, error[:4000])
            self.client.set_terminated(self.run_id, status)
        elif self.owned:
            self.client.set_terminated(self.run_id, "FINISHED")


def as_param(value: Any) -> str:
    """A param's value as MLflow keeps it."""
    return "" if value is None else str(value)[:PARAM_LIMIT]


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def open_run(
    kind: str,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> TrackedRun:
    """Opens a run of a kind: a child of `parent_run_id`, or the active run, or that of `mlflow run`, or a new one.

    Args:
        kind: What it is for.
        experiment: By name; None: what MLflow's environment says.
        run_name: Its name; None: MLflow invents one.
        parent_run_id: The run to nest it under, in its experiment.
        tags: Further tags that it has from its first moment.

    Raises:
        ConfigError: `experiment` is not the one of the run that is already there.
    """
    client = mlflow.MlflowClient()
    active = mlflow.active_run()
    present = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID")
    if parent_run_id is None and present:
        run = client.get_run(present)
        if experiment and experiment_id_of(client, experiment) != run.info.experiment_id:
            raise ConfigError(
                f"experiment '{experiment}' is not the one of the present run {present}: with `mlflow run`, choose it "
                "by --experiment-name"
            )
        known = {**(tags or {}), names.KIND: kind, **({names.RUN_NAME: run_name} if run_name else {})}
        client.log_batch(present, tags=[RunTag(key, value) for key, value in known.items()])
        return TrackedRun(client, present, run.info.experiment_id, run_name or run.info.run_name, owned=False)
    experiment_id = experiment_id_of(client, experiment)
    known = {**(tags or {}), names.KIND: kind}
    if parent_run_id is not None:
        experiment_id = client.get_run(parent_run_id).info.experiment_id
        known[names.PARENT_RUN] = parent_run_id
    run = client.create_run(experiment_id, tags=known, run_name=run_name)
    return TrackedRun(client, run.info.run_id, experiment_id, run.info.run_name, owned=True)


def attach(run_id: str) -> TrackedRun:
    """A run that is there already and that somebody else ends."""
    client = mlflow.MlflowClient()
    info = client.get_run(run_id).info
    return TrackedRun(client, run_id, info.experiment_id, info.run_name, owned=False)


def reopen(run_id: str) -> TrackedRun:
    """A run that broke off, to go on with: RUNNING again, and ended by whoever goes on with it.

    Where `mlflow run` opened a run for this process, that one says which run it goes on with.

    Raises:
        ConfigError: It is not there any more.
    """
    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConfigError(f"there is no run {run_id} on this tracking server to go on with: train anew") from error
    if run.info.lifecycle_stage != "active":
        raise ConfigError(f"run {run_id} was deleted: restore it in MLflow to go on with it, or train anew")
    client.update_run(run_id, status="RUNNING")
    if names.ERROR in run.data.tags:
        client.delete_tag(run_id, names.ERROR)
    project = os.environ.get("MLFLOW_RUN_ID")
    if project and project != run_id:
        client.set_tag(project, names.CONTINUES, run_id)
    return TrackedRun(client, run_id, run.info.experiment_id, run.info.run_name, owned=True)


@contextlib.contextmanager
def ending(run: TrackedRun) -> Iterator[TrackedRun]:
    """Ends a run with the block: if it raises, FAILED with the reason, or KILLED where somebody interrupted it."""
    try:
        yield run
    except UndeliveredError as error:
        end_if_answered(run, reason_of(error))
        raise
    except BaseException as error:
        run.end(reason_of(error), status_of(error))
        raise
    run.end()


def end_if_answered(run: TrackedRun, reason: str, status: str = "FAILED") -> None:
    """Ends a run with a reason, if the server answers soon: if it does not, there is something else to be said."""
    with contextlib.suppress(MlflowException, OSError), brief_calls():
        run.end(reason, status)


def reason_of(error: BaseException) -> str:
    """What a run that ended with an error says."""
    return f"{type(error).__name__}: {error}"


def status_of(error: BaseException | None) -> str:
    """The status in MLflow of a run that ended with an error."""
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


@contextlib.contextmanager
def tracked_run(
    kind: str, *, experiment: str | None = None, run_name: str | None = None, parent_run_id: str | None = None
) -> Iterator[TrackedRun]:
    """`open_run`, ended with the block: FAILED and the reason if it raises."""
    with ending(open_run(kind, experiment=experiment, run_name=run_name, parent_run_id=parent_run_id)) as run:
        yield run


def fail_project_run(reason: str) -> None:
    """Ends the run that `mlflow run` opened for this process, if there is one, as FAILED with the reason.

    A command may fail before it opens any run; MLflow would then leave its own run open.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        # The tracking server itself may be what failed: the first error is the one to report.
        with contextlib.suppress(MlflowException):
            client = mlflow.MlflowClient()
            TrackedRun(client, run_id, "", "", owned=False).end(reason)
