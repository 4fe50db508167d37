"""What each entry of the spool becomes in MLflow; runs on the courier's thread."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import log_folder
from smp_ensemble.tracking.report import draw_overlay_sheet
from smp_ensemble.tracking.runs import TrackedRun, attach, open_run
from smp_ensemble.tracking.settling import drop_doubles, find_snapshot_run, models_in, settle
from smp_ensemble.typing import DatasetReference, Snapshot, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import mlflow
    import numpy.typing as npt

    from smp_ensemble.tracking.ledger import Receipt
    from smp_ensemble.tracking.spool import Entry

MODEL_FOLDER = "model"
PREVIEWS_FILE = "previews.npz"
RANK_METRIC = "val_iou"

logger = logging.getLogger(__name__)


class Delivery:
    """Sends the entries of one training's spool to its run.

    Args:
        run: The training's run.
        keep: Keep the weights of the best `keep` snapshots only; None: all.
        previews: Raw images and their masks, for the overlays of each snapshot.
        earlier: What earlier processes of the same training delivered.
    """

    def __init__(
        self,
        run: TrackedRun,
        *,
        keep: int | None = None,
        previews: Sequence[tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]] = (),
        earlier: Iterable[Receipt] = (),
    ) -> None:
        self.run = run
        self._keep = keep
        self._previews = previews
        self._delivered: list[Snapshot] = []
        self._pruned: set[str] = set()
        self._may_have_doubles = False
        for receipt in earlier:
            if receipt.kind == "snapshot":
                self._may_have_doubles = True  # an earlier process may have been cut off
                self._delivered.append(Snapshot(**receipt.result))
                self._pruned |= {snapshot.model_id for snapshot in self._surplus()}

    def kept(self) -> list[Snapshot]:
        """All delivered snapshots whose weights are still there, in the order of their steps."""
        kept = [snapshot for snapshot in self._delivered if snapshot.model_id not in self._pruned]
        return sorted(kept, key=lambda snapshot: snapshot.step)

    def __call__(self, entry: Entry) -> Mapping[str, Any] | None:
        """Sends one entry; safe to repeat after it broke off anywhere. Gives what a later process needs to know."""
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
                return {"metrics": content["metrics"], "step": content["step"]}
            case "scores":
                run = attach(content["run_id"]) if content["run_id"] else self.run
                run.log_metrics(
                    content["metrics"],
                    content["step"],
                    model_id=content["model_id"],
                    dataset=DatasetReference(**content["dataset"]),
                    timestamp=content["timestamp"],
                )
            case "file":
                self.run.log_file(entry.folder / content["name"], content["folder"])
            case "snapshot":
                return asdict(self._snapshot(entry))
            case "end":
                if self._may_have_doubles:
                    drop_doubles(self.run, self._delivered)
                if content.get("settle"):
                    settle(self.run)
                if content.get("tags"):
                    self.run.set_tags(content["tags"])
                self.run.end(content["error"], content.get("status", "FAILED"))
            case _:
                raise ValueError(f"the spool holds an entry of unknown kind '{entry.kind}': {entry.folder}")
        return None

    def _snapshot(self, entry: Entry) -> Snapshot:
        content, client = entry.content, self.run.client
        child = self._child_run(entry)
        dataset = DatasetReference(**content["dataset"]) if content["dataset"] else None
        if dataset:
            child.log_dataset(dataset, "validation")
        child.log_params(content["params"])
        tags = {names.KIND: names.SNAPSHOT}
        model_id = self._model(entry, child, tags)
        log_folder(client, entry.folder / MODEL_FOLDER, model_id=model_id, run_id=child.run_id, step=content["step"])
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
        snapshot = Snapshot(
            uri=f"models:/{model_id}",
            run_id=child.run_id,
            step=content["step"],
            params=content["params"],
            metrics=content["metrics"],
            tags={**tags, names.MODEL_ID: model_id},
        )
        self._delivered = [one for one in self._delivered if one.model_id != model_id] + [snapshot]
        self._prune()
        return snapshot

    def _child_run(self, entry: Entry) -> TrackedRun:
        """The snapshot's run: the one that an earlier attempt opened, or a new one."""
        run_id = entry.progress.get("run_id")
        step = entry.content["step"]
        if run_id is None and entry.progress.get("opens_run"):
            self._may_have_doubles = True
            run_id = find_snapshot_run(self.run, step)
        if run_id is None:
            entry.remember(opens_run=True)
            name = f"{self.run.name}-snapshot-{entry.content['index']:02d}"
            tags = {names.STEP: str(step)}
            child = open_run(names.SNAPSHOT, run_name=name, parent_run_id=self.run.run_id, tags=tags)
            entry.remember(run_id=child.run_id)
            return child
        entry.remember(run_id=run_id)
        found = attach(run_id)
        return TrackedRun(found.client, found.run_id, found.experiment_id, found.name, owned=True)

    def _model(self, entry: Entry, child: TrackedRun, tags: dict[str, str]) -> str:
        """The snapshot's logged model: the one that an earlier attempt created, emptied, or a new one."""
        client = self.run.client
        model_id: str | None = entry.progress.get("model_id")
        if model_id is None and entry.progress.get("creates_model"):
            self._may_have_doubles = True
            model_id = next((one.model_id for one in models_in(client, child.experiment_id, child.run_id)), None)
        if model_id is None:
            entry.remember(creates_model=True)
            model_id = client.create_logged_model(
                child.experiment_id,
                name="snapshot",
                source_run_id=child.run_id,
                tags=tags,
                params=entry.content["params"],
                model_type=names.MODEL_TYPE,
            ).model_id
        elif client.get_logged_model(model_id).status == LoggedModelStatus.PENDING:
            _empty(client, model_id)  # an upload that broke off leaves hidden files
        entry.remember(model_id=model_id)
        return model_id

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
        for snapshot in self._surplus():
            delete_weights(self.run.client, snapshot)
            self._pruned.add(snapshot.model_id)

    def _surplus(self) -> list[Snapshot]:
        """Snapshots with weights, beyond the best so many that are kept."""
        ranked = sorted(self.kept(), key=lambda snapshot: snapshot.metrics.get(RANK_METRIC, -1.0), reverse=True)
        return [] if self._keep is None else ranked[self._keep :]


def delete_weights(client: mlflow.MlflowClient, snapshot: Snapshot) -> None:
    """Deletes a snapshot's logged model and its files; its run, with the scores, stays and says so. Safe to repeat."""
    client.set_tag(snapshot.run_id, names.PRUNED, "true")
    try:
        _empty(client, snapshot.model_id)
        client.delete_logged_model(snapshot.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _empty(client: mlflow.MlflowClient, model_id: str) -> None:
    """Deletes the files of a logged model."""
    location = client.get_logged_model(model_id).artifact_location
    try:
        get_artifact_repository(location).delete_artifacts()
    except (NotImplementedError, MlflowException) as error:
        logger.warning("the artifact store keeps the files of %s: %s", model_id, error)
