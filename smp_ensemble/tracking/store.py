"""The store that training writes to: first to local disk, and from there to MLflow in the background."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException

from smp_ensemble.architectures import check_network
from smp_ensemble.ensembling import artifact
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import MODEL_TYPE, log_folder
from smp_ensemble.tracking.report import draw_overlay_sheet
from smp_ensemble.tracking.runs import TrackedRun, as_param, attach, now, open_run
from smp_ensemble.tracking.spool import Courier, Entry, Spool
from smp_ensemble.typing import DatasetReference, Snapshot, SnapshotRecord, Task

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import Mode

DELIVERY_SECONDS = 600.0
"""How long the end of a training waits for the tracking server."""

MODEL_FOLDER = "model"
PREVIEWS_FILE = "previews.npz"
RANK_METRIC = "val_iou"

logger = logging.getLogger(__name__)


class MlflowStore:
    """Keeps a training's snapshots and curves in one MLflow run and its children.

    Every method that training calls writes to local disk and returns; a background thread does the rest. As a context
    manager it ends the run: FINISHED, or FAILED with the reason.

    Args:
        experiment: By name; None: what MLflow's environment says.
        run_name: Of the training's run; None: MLflow invents one.
        keep: Keep the weights of the best `keep` snapshots only; all scores stay. None: all.
        spool: The local folder for what is not delivered yet; None: `.smp_ensemble/spool` in the working folder.
        previews: Raw images and their masks, for the overlays of each snapshot.

    Attributes:
        run: The training's run.
        history: Completed steps, and the metrics that were logged after them.
    """

    def __init__(
        self,
        *,
        experiment: str | None = None,
        run_name: str | None = None,
        keep: int | None = None,
        spool: Path | None = None,
        previews: Sequence[tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]] = (),
    ) -> None:
        self.run = open_run(names.TRAINING, experiment=experiment, run_name=run_name)
        self._keep = keep
        self._saved = 0
        self._previews = previews
        folder = (spool or Path(".smp_ensemble") / "spool") / self.run.run_id
        self._spool = Spool(folder)
        self.history: list[tuple[int, dict[str, float]]] = []
        self._delivered: dict[str, Snapshot] = {}
        self._pruned: set[str] = set()
        self._courier = Courier(self._spool, self._deliver)

    @property
    def run_id(self) -> str:
        """The training's run."""
        return self.run.run_id

    @property
    def link(self) -> str:
        """The address of the snapshots' runs in the tracking UI, sorted by score."""
        return names.snapshots_link(mlflow.get_tracking_uri(), self.run.experiment_id)

    @property
    def last_step(self) -> int:
        """Completed steps at the last point of the curves."""
        return self.history[-1][0] if self.history else 0

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keeps the training's configuration."""
        self._courier.put("params", {name: as_param(value) for name, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags on the training's run."""
        self._courier.put("tags", dict(tags))

    def log_dataset(self, dataset: DatasetReference, context: str) -> None:
        """Says what data the training used, and what for."""
        self._courier.put("dataset", {"dataset": asdict(dataset), "context": context})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps points of the training's curves."""
        self.history.append((step, dict(metrics)))
        self._courier.put("metrics", {"metrics": dict(metrics), "step": step, "timestamp": now()})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Keeps a copy of a file as an artifact of the training's run."""
        content = path.read_bytes()
        self._courier.put(
            "file", {"name": path.name, "folder": folder}, lambda entry: _write(entry / path.name, content)
        )

    def save_snapshot(self, record: SnapshotRecord) -> None:
        """Keeps a snapshot: its weights are on disk when this returns."""
        content = {
            "index": record.index,
            "step": record.step,
            "epoch": record.epoch,
            "timestamp": now(),
            "metrics": dict(record.metrics),
            "params": {
                **{name: as_param(value) for name, value in record.params.items()},
                "mode": record.task.mode,
                "cycle": str(record.index),
                "epoch": str(record.epoch),
            },
            "dataset": asdict(record.dataset) if record.dataset else None,
            "task": asdict(record.task),
        }
        self._saved += 1
        self._courier.put("snapshot", content, lambda entry: _write_snapshot(record, entry))

    def next_index(self) -> int:
        """1 for the first snapshot, for callers who do not count."""
        return self._saved + 1

    def snapshots(self) -> list[Snapshot]:
        """References to all snapshots whose weights are kept, in the order of their steps, after delivery.

        Raises:
            DeliveryError: The tracking server did not take everything.
        """
        self._courier.drain(DELIVERY_SECONDS)
        kept = [snapshot for snapshot in self._delivered.values() if snapshot.model_id not in self._pruned]
        return sorted(kept, key=lambda snapshot: snapshot.step)

    def close(self, error: str | None = None) -> None:
        """Delivers what is left and ends the run: FAILED with the reason if there is one.

        Raises:
            DeliveryError: The tracking server did not take everything.
        """
        self._courier.put("end", {"error": error})
        try:
            self._courier.drain(DELIVERY_SECONDS)
        finally:
            self._courier.close()
        self._spool.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(f"{type(error).__name__}: {error}" if error is not None else None)

    # All below runs on the courier's thread.

    def _deliver(self, entry: Entry) -> None:
        content = entry.content
        match entry.kind:
            case "params":
                self.run.log_params(content)
            case "tags":
                self.run.set_tags(content)
            case "dataset":
                self.run.log_dataset(DatasetReference(**content["dataset"]), content["context"])
            case "metrics":
                self.run.log_metrics(content["metrics"], content["step"], timestamp=content["timestamp"])
            case "file":
                self.run.log_file(entry.folder / content["name"], content["folder"])
            case "snapshot":
                self._deliver_snapshot(entry)
            case "end":
                self.run.end(content["error"])
            case _:
                raise ValueError(f"the spool holds an entry of unknown kind '{entry.kind}': {entry.folder}")

    def _deliver_snapshot(self, entry: Entry) -> None:
        content, client = entry.content, self.run.client
        child = self._child_run(entry)
        dataset = DatasetReference(**content["dataset"]) if content["dataset"] else None
        if dataset:
            child.log_dataset(dataset, "validation")
        child.log_params(content["params"])
        tags = {names.KIND: names.SNAPSHOT}
        model_id = entry.progress.get("model_id")
        if model_id is None:
            model_id = client.create_logged_model(
                child.experiment_id,
                name="snapshot",
                source_run_id=child.run_id,
                tags=tags,
                params=content["params"],
                model_type=MODEL_TYPE,
            ).model_id
            entry.remember(model_id=model_id)
        log_folder(
            client, entry.folder / MODEL_FOLDER, model_id=model_id, run_id=child.run_id, step=content["step"]
        )
        child.log_metrics(
            content["metrics"],
            content["step"],
            model_id=model_id,
            dataset=dataset,
            timestamp=content["timestamp"],
        )
        child.set_tags({names.MODEL_ID: model_id})
        self._log_overlays(entry, child)
        child.end()
        self._delivered[model_id] = Snapshot(
            uri=f"models:/{model_id}",
            run_id=child.run_id,
            step=content["step"],
            params=content["params"],
            metrics=content["metrics"],
            tags={**tags, names.MODEL_ID: model_id},
        )
        self._prune()

    def _child_run(self, entry: Entry) -> TrackedRun:
        run_id = entry.progress.get("run_id")
        if run_id is None:
            name = f"{self.run.name}-snapshot-{entry.content['index']:02d}"
            child = open_run(names.SNAPSHOT, run_name=name, parent_run_id=self.run.run_id)
            entry.remember(run_id=child.run_id)
            return child
        found = attach(run_id)
        return TrackedRun(found.client, found.run_id, found.experiment_id, found.name, owned=True)

    def _log_overlays(self, entry: Entry, child: TrackedRun) -> None:
        path = entry.folder / PREVIEWS_FILE
        if not path.exists() or not self._previews:
            return
        with np.load(path, allow_pickle=False) as stored:
            masks = [stored[f"{index:03d}"] for index in range(len(stored.files))]
        sheet = entry.folder / f"snapshot-{entry.content['index']:02d}.png"
        task = Task(**{**entry.content["task"], "class_names": tuple(entry.content["task"]["class_names"])})
        images, truths = zip(*self._previews, strict=True)
        draw_overlay_sheet(images, {"ground truth": truths, child.name: masks}, task, sheet)
        child.log_file(sheet)
        self.run.log_file(sheet, "overlays")

    def _prune(self) -> None:
        """Deletes the weights of all but the best snapshots; their runs keep the scores."""
        if self._keep is None:
            return
        kept = [snapshot for snapshot in self._delivered.values() if snapshot.model_id not in self._pruned]
        ranked = sorted(kept, key=lambda snapshot: snapshot.metrics.get(RANK_METRIC, -1.0), reverse=True)
        for snapshot in ranked[self._keep :]:
            delete_weights(self.run.client, snapshot)
            self._pruned.add(snapshot.model_id)


def delete_weights(client: mlflow.MlflowClient, snapshot: Snapshot) -> None:
    """Deletes a snapshot's logged model and its files; its run, with the scores, stays and says so."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    location = client.get_logged_model(snapshot.model_id).artifact_location
    client.set_tag(snapshot.run_id, names.PRUNED, "true")
    try:
        get_artifact_repository(location).delete_artifacts()
    except (NotImplementedError, MlflowException) as error:
        logger.warning("the artifact store keeps the files of %s: %s", snapshot.model_id, error)
    client.delete_logged_model(snapshot.model_id)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_snapshot(record: SnapshotRecord, folder: Path) -> None:
    """A snapshot is an ensemble of one."""
    model = folder / MODEL_FOLDER
    model.mkdir()
    member = artifact.write_member(
        record.network, record.normalization, model, training_images=record.training_images
    )
    task = record.task
    artifact.write_spec(artifact.EnsembleSpec(task.mode, task.class_names, task.in_channels, (member,)), model)
    if record.previews:
        arrays: dict[str, Any] = {f"{index:03d}": mask for index, mask in enumerate(record.previews)}
        np.savez_compressed(folder / PREVIEWS_FILE, **arrays)


def log_snapshot(
    model: nn.Module,
    metrics: Mapping[str, float],
    step: int,
    *,
    mode: Mode,
    class_names: Sequence[str],
    normalization: Normalization,
    store: MlflowStore | None = None,
    params: Mapping[str, Any] | None = None,
    dataset: DatasetReference | None = None,
    training_images: Sequence[str] | None = None,
) -> None:
    """Keeps one snapshot of a plain training loop.

    With a store, of which one training has one, the weights are on local disk when this returns and a background
    thread delivers them: `with MlflowStore() as store: ... log_snapshot(model, {...}, step, store=store, ...)`.
    Without one, a store is opened for this snapshot alone and this waits for the delivery.

    Args:
        model: An smp network that gives logits.
        metrics: Scores measured for exactly these weights; `val_iou` ranks.
        step: Completed optimizer steps.
        mode: `binary`, `multiclass` or `multilabel`.
        class_names: In the order of their ids; in binary mode background and foreground.
        normalization: What the model's input goes through.
        store: The training's store.
        params: What it was trained with.
        dataset: What the scores were measured on.
        training_images: Digests of the training images, for the leak guard; None: unknown.

    Raises:
        NetworkError: The model has an activation or an auxiliary head, or nobody could build it again.
    """
    check_network(model)
    if store is None:
        with MlflowStore() as own:
            log_snapshot(
                model,
                metrics,
                step,
                mode=mode,
                class_names=class_names,
                normalization=normalization,
                store=own,
                params=params,
                dataset=dataset,
                training_images=training_images,
            )
        return
    store.save_snapshot(
        SnapshotRecord(
            network=model,
            normalization=normalization,
            task=Task(mode, tuple(class_names), normalization.in_channels),
            step=step,
            epoch=0,
            index=store.next_index(),
            metrics=metrics,
            params={"trainer": "loop", **(params or {})},
            dataset=dataset,
            training_images=training_images,
        )
    )
