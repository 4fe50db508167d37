"""The store that training writes to: first to local disk, and from there to MLflow in the background."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlflow
import numpy as np

from smp_ensemble.architectures import check_network
from smp_ensemble.ensembling import artifact
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError, DeliveryError, Interrupted, UndeliveredError
from smp_ensemble.locks import Lock
from smp_ensemble.tracking import names
from smp_ensemble.tracking.addresses import Address, without_secrets
from smp_ensemble.tracking.courier import Courier
from smp_ensemble.tracking.delivery import MODEL_FOLDER, PREVIEWS_FILE, Delivery
from smp_ensemble.tracking.finished import find_by_token
from smp_ensemble.tracking.outages import insist
from smp_ensemble.tracking.runs import (
    TrackedRun,
    as_param,
    end_if_answered,
    now,
    open_run,
    reason_of,
    reopen,
    status_of,
)
from smp_ensemble.tracking.spool import LOCK_FILE, Spool
from smp_ensemble.typing import DatasetReference, Snapshot, SnapshotRecord, Task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from torch import nn

    from smp_ensemble.data.normalization import Normalization
    from smp_ensemble.typing import Mode

DELIVERY_SECONDS = 600.0
"""How long the end of a training waits for a tracking server that takes nothing."""

STOP_SECONDS, AT_ONCE_SECONDS = 30.0, 2.0
"""How long a training that stops and can be gone on with waits: after its step, and when told to stop at once."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumable:
    """That and how a training can be gone on with by another process.

    Attributes:
        token: Tags its run from the first moment.
        configuration: The digest of all that determines its result; tags its run when it is finished.
        run_id: The run to go on with; None: a new one.
    """

    token: str
    configuration: str
    run_id: str | None = None


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
        parent_run_id: The run to nest the training's run under, in its experiment.
        resumable: Lets another process go on with the training: then the spool, with what it knows of the snapshots
            so far, stays until `discard`. None: an error is the training's end.

    Attributes:
        run: The training's run.
        history: Completed steps, and the metrics that were logged after them.

    Raises:
        TrackingError: The server does not answer: the run is opened here, and all else waits for as long as it takes.
        ConfigError: Another process delivers the same spool.
    """

    def __init__(
        self,
        *,
        experiment: str | None = None,
        run_name: str | None = None,
        keep: int | None = None,
        spool: Path | None = None,
        previews: Sequence[tuple[npt.NDArray[np.generic], npt.NDArray[np.uint8]]] = (),
        parent_run_id: str | None = None,
        resumable: Resumable | None = None,
    ) -> None:
        self._resumable = resumable
        continued = resumable.run_id if resumable else None
        token = resumable.token if resumable else uuid.uuid4().hex
        root = spool or Path(".smp_ensemble") / "spool"
        if continued:  # before anything is changed on the server
            self._lock = _taken(root / continued)

        def opened(failures: int) -> TrackedRun:
            if continued:
                return reopen(continued)
            lost = find_by_token(token, experiment=experiment, parent_run_id=parent_run_id) if failures else None
            if lost:  # the server opened it, and its answer did not arrive
                return reopen(lost)
            tags = {names.STATE: token}
            return open_run(
                names.TRAINING, experiment=experiment, run_name=run_name, parent_run_id=parent_run_id, tags=tags
            )

        self.run = insist(opened)
        folder = root / self.run.run_id
        if not continued:
            self._lock = _taken(folder)
        self._spool = Spool(folder)
        self._spool.drop("end")  # it did not end: it goes on
        address = Address(self.run_id, without_secrets(mlflow.get_tracking_uri()), keep, resumable is not None)
        address.write(folder, previews)
        self._has_ended = self._was_waited_for = False
        self.history, self._saved = _earlier(self._spool)
        self._delivery = Delivery(self.run, keep=keep, previews=previews, earlier=self._spool.receipts)
        self._courier = Courier(self._spool, self._delivery)

    @property
    def run_id(self) -> str:
        """The training's run."""
        return self.run.run_id

    @property
    def link(self) -> str:
        """The address of the snapshots' runs in the tracking UI, sorted by score."""
        return self.run.link

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
        content = {"metrics": dict(metrics), "step": step, "timestamp": now()}
        if self._courier.put("metrics", content, key=_key("metrics", step, *sorted(metrics))):
            self.history.append((step, dict(metrics)))

    def log_scores(
        self, metrics: Mapping[str, float], dataset: DatasetReference, snapshot: Snapshot | None = None
    ) -> None:
        """Keeps scores on a further data set: a delivered snapshot's, or the whole training's."""
        content: dict[str, Any] = {
            "metrics": dict(metrics),
            "dataset": asdict(dataset),
            "step": snapshot.step if snapshot else self.last_step,
            "timestamp": now(),
            "run_id": snapshot.run_id if snapshot else None,
            "model_id": snapshot.model_id if snapshot else None,
        }
        key = _key("scores", content["step"], content["run_id"], dataset.digest, *sorted(metrics))
        self._courier.put("scores", content, key=key)

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
        if self._courier.put(
            "snapshot", content, lambda entry: _write_snapshot(record, entry), key=_key("snapshot", record.step)
        ):
            self._saved += 1

    def next_index(self) -> int:
        """1 for the first snapshot, for callers who do not count."""
        return self._saved + 1

    def snapshots(self) -> list[Snapshot]:
        """References to all snapshots whose weights are kept, in the order of their steps, after delivery.

        Raises:
            UndeliveredError: The tracking server is away.
            DeliveryError: The tracking server refused something.
        """
        self._drain(DELIVERY_SECONDS)
        return self._delivery.kept()

    def finish_later(self) -> None:
        """The training is done but for its delivery: whoever does that, soon or with `smp-ensemble sync`, ends it."""
        self._put_end(None, "FINISHED")

    def close(self, error: str | None = None, status: str = "FAILED") -> None:
        """Delivers what is left and ends the run: FAILED (or `status`) with the reason if there is one.

        Raises:
            UndeliveredError: The tracking server is away: what is left waits for `smp-ensemble sync`.
            DeliveryError: The tracking server refused something.
        """
        self._end(error, status, DELIVERY_SECONDS if error is None or self._resumable is None else STOP_SECONDS)
        if self._resumable is None:
            self._spool.discard()

    def discard(self) -> None:
        """Forgets the spool of a training that is finished, if everything was delivered."""
        self._spool.discard()

    def _end(self, error: str | None, status: str, seconds: float) -> None:
        wait = seconds > AT_ONCE_SECONDS
        try:
            self._put_end(error, status)
            self._drain(seconds)
        except UndeliveredError as undelivered:
            interrupted = isinstance(undelivered.__cause__, KeyboardInterrupt)
            if error is not None and wait and not interrupted:  # perhaps the disk is full, and the server answers
                end_if_answered(self.run, error, status)
            wait = False  # the spool keeps everything, the end too
            raise
        except (DeliveryError, OSError) as undelivered:
            end_if_answered(self.run, error or str(undelivered), status)
            raise
        finally:
            self._courier.close(wait=wait, then=self._lock.let_go)

    def _put_end(self, error: str | None, status: str) -> None:
        if self._has_ended:
            return
        tags, settle = {}, False
        if self._resumable is not None and error is None:
            settle = self._resumable.run_id is not None
            tags = {names.CONFIGURATION: self._resumable.configuration}
        self._courier.put("end", {"error": error, "status": status, "settle": settle, "tags": tags})
        self._has_ended = True

    def _drain(self, seconds: float) -> None:
        """Waits for the server for so long, but only once."""
        try:
            self._courier.drain(0.0 if self._was_waited_for else seconds, since_last=seconds >= DELIVERY_SECONDS)
        except DeliveryError:
            self._was_waited_for = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, UndeliveredError):
            if self._resumable is None:
                self._put_end(None, "FINISHED")
            self._courier.close(wait=False, then=self._lock.let_go)
        elif isinstance(error, DeliveryError):
            end_if_answered(self.run, str(error))
            self._courier.close(wait=self._courier.is_stopped, then=self._lock.let_go)
        elif self._resumable is None:
            self.close(reason_of(error), status_of(error))
        else:
            at_once = isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted)
            try:  # what happened is what is to be said; the spool keeps what could not be delivered
                self._end(reason_of(error), status_of(error), AT_ONCE_SECONDS if at_once else STOP_SECONDS)
            except (DeliveryError, OSError) as undelivered:
                logger.warning("%s", undelivered)


def _taken(folder: Path) -> Lock:
    """The lock of a spool, held."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK_FILE)
    if not lock.take():
        raise ConfigError(f"process {lock.holder()} is delivering what waits in {folder}: wait for it, or end it first")
    return lock


def _earlier(spool: Spool) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """The curves, and the number of snapshots, that earlier processes of a training left in its spool."""
    known: list[tuple[str, Mapping[str, Any]]] = [(one.kind, one.result) for one in spool.receipts]
    known += [(entry.kind, entry.content) for entry in spool.waiting()]
    history = [(int(what["step"]), dict(what["metrics"])) for kind, what in known if kind == "metrics"]
    return sorted(history, key=lambda point: point[0]), sum(kind == "snapshot" for kind, _ in known)


def _key(kind: str, *parts: object) -> str:
    """Says which thing an entry is, in every process of one training: short, however many parts there are."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    return f"{kind}-{digest}"


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_snapshot(record: SnapshotRecord, folder: Path) -> None:
    """A snapshot is an ensemble of one."""
    model = folder / MODEL_FOLDER
    model.mkdir()
    member = artifact.write_member(
        Member(record.network, record.normalization, training_images=record.training_images), model
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
    with contextlib.nullcontext(store) if store is not None else MlflowStore() as kept:
        kept.save_snapshot(
            SnapshotRecord(
                network=model,
                normalization=normalization,
                task=Task(mode, tuple(class_names), normalization.in_channels),
                step=step,
                epoch=0,
                index=kept.next_index(),
                metrics=metrics,
                params={"trainer": "loop", **(params or {})},
                dataset=dataset,
                training_images=training_images,
            )
        )
