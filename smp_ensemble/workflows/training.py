"""One training: from data to scored snapshots in a run of MLflow."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble import registry
from smp_ensemble.exceptions import DeliveryError, UndeliveredError
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.tracking import names
from smp_ensemble.tracking.finished import snapshots_of
from smp_ensemble.tracking.report import draw_curves, draw_learning_rate, truth_for_overlay
from smp_ensemble.tracking.runs import as_param, attach
from smp_ensemble.tracking.settling import settle
from smp_ensemble.tracking.store import MlflowStore, Resumable
from smp_ensemble.training.checkpointing import completed_epochs
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.previews import preview_indices
from smp_ensemble.training.processes import leave_group
from smp_ensemble.training.trainers import GROUP, describe, make_trainer
from smp_ensemble.training.warmup import warmed_up
from smp_ensemble.workflows.crossval import LeftOutScores, score_left_out
from smp_ensemble.workflows.joining import place_for, refuse_finished, train_along
from smp_ensemble.workflows.resuming import begun, identity_of
from smp_ensemble.workflows.starting import new_network, normalization_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.training.distillation import Lesson
    from smp_ensemble.training.plans import PlannedTraining
    from smp_ensemble.typing import Snapshot, Trainer
    from smp_ensemble.workflows.options import TrainOptions
    from smp_ensemble.workflows.starting import Start
    from smp_ensemble.workflows.states import Identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What one training left: references, no weights.

    Attributes:
        planned: Its place in the plan.
        run_id: Its run.
        experiment: Name of its experiment.
        link: The address of its snapshots in the tracking UI.
        snapshots: In the order of their steps.
        left_out: Scores on the images that it left out, where it left any out.
        seconds: How long it took, with all scores.
    """

    planned: PlannedTraining
    run_id: str
    experiment: str
    link: str
    snapshots: list[Snapshot]
    left_out: LeftOutScores | None
    seconds: float

    @property
    def best(self) -> Snapshot:
        """The snapshot with the best IoU on validation data."""
        return max(self.snapshots, key=lambda snapshot: snapshot.metrics.get("val_iou", float("-inf")))

    def rows(self) -> list[dict[str, Any]]:
        """A line for each snapshot."""
        return [
            {
                "snapshot": snapshot.model_id,
                "epoch": int(snapshot.params["epoch"]),
                "step": snapshot.step,
                "val IoU": snapshot.metrics.get("val_iou"),
                "val loss": snapshot.metrics.get("val_loss"),
                "val ECE": snapshot.metrics.get("val_ece"),
            }
            | ({} if self.planned.fold is None else {"cv IoU": snapshot.metrics.get("cv_iou")})
            for snapshot in self.snapshots
        ]

    def row(self) -> dict[str, Any]:
        """Its line in the table of a plan."""
        found: dict[str, Any] = {
            "training": self.planned.label,
            "best snapshot": self.best.model_id,
            "val IoU": self.best.metrics.get("val_iou"),
        }
        if self.planned.fold is not None:
            combined = self.left_out.combined["cv_iou"] if self.left_out is not None else None
            found |= {"cv IoU": self.best.metrics.get("cv_iou"), "cv IoU combined": combined}
        return {**found, "seconds": round(self.seconds)}


def method_of(options: TrainOptions) -> Trainer:
    """The training method, with its options; one that starts from trained weights needs no ordinary phase before it.

    Raises:
        ConfigError: Unknown method or option of it.
    """
    chosen = dict(options.trainer_options)
    if options.cycles is not None:
        chosen["cycles"] = options.cycles
    if options.init:
        known = {field.name: field.default for field in fields(registry.load(GROUP, options.trainer))}
        if isinstance(known.get("start"), float):
            chosen.setdefault("start", 0.0)
    return make_trainer(options.trainer, chosen)


def run_training(
    options: TrainOptions,
    splits: DataSplits,
    method: Trainer,
    planned: PlannedTraining,
    *,
    start: Start | None = None,
    parent_run_id: str | None = None,
    lesson: Lesson | None = None,
    then: Callable[[MlflowStore | None, Sequence[Snapshot]], None] | None = None,
    identity: Identity | None = None,
) -> Training:
    """Trains once, by one method, and leaves every snapshot in MLflow, scored; or goes on where that broke off.

    Args:
        options: With the seed and the fold of this training.
        splits: What trains, what is scored, and what is left out.
        method: The training method.
        planned: Its place in a plan.
        start: Trained weights to start from.
        parent_run_id: The plan's run, to nest under.
        lesson: What a teacher says about the training images.
        then: Is called with the snapshots before the run ends, with what belongs to it too; with no store where the
            training was finished before, and all is there.
        identity: What makes it the same training in another process; None: as the options say.

    Raises:
        InputError: Something in the options or the data does not fit; nothing is tracked unless training had begun,
            and then the run is FAILED with the reason.
        UndeliveredError: It is trained, and waits on local disk for a tracking server that is away.
    """
    began = time.perf_counter()
    place = place_for(options)
    if not place.is_first:
        train_along(options, splits, method, start, fit_options(options))
    task = splits.task
    params = {**configuration(options, method, start), "mode": task.mode, **(lesson.params if lesson else {})}
    identity = identity or identity_of(
        names.TRAINING, options, splits, parent_run_id, lesson.params if lesson else None
    )
    with begun(
        identity,
        options.resume,
        experiment=options.experiment,
        params={name: as_param(value) for name, value in params.items()},
    ) as found:
        if isinstance(found, str):
            refuse_finished(place, found)
            finished = _finished(found, splits, options, planned)
            if then is not None:
                then(None, finished.snapshots)
            return finished
        known = start.normalization if start is not None else None
        normalization = known or normalization_for(options.normalization, splits.train)
        network = new_network(options, task, start)
        previews = [splits.val.read(index) for index in preview_indices(splits.val)]
        store = MlflowStore(
            experiment=options.experiment,
            run_name=options.run_name,
            keep=options.keep,
            spool=found.spool,
            previews=[(image, truth_for_overlay(mask, task)) for image, mask in previews],
            parent_run_id=parent_run_id,
            resumable=Resumable(found.token, identity.digest, found.run_id),
        )
        with store:
            state = found.with_run(store.run_id)
            if state.checkpoint is not None:
                done = completed_epochs(state.checkpoint)
                logger.info("run %s goes on after epoch %d of %d", store.run_id, done, options.epochs)
            store.log_params({**params, **environment(options)})
            store.set_tags(links(store.link))
            store.log_dataset(splits.train.reference(), "training")
            store.log_dataset(splits.val.reference(), "validation")
            try:
                snapshots = fit(
                    network,
                    splits.train,
                    splits.val,
                    trainer=method,
                    epochs=options.epochs,
                    normalization=normalization,
                    store=store,
                    options=fit_options(options),
                    params=params,
                    trained_on=_seen_before(start, lesson),
                    lesson=lesson,
                    resume_from=state.checkpoint,
                    checkpoint_folder=state.folder,
                )
            except UndeliveredError as error:
                leave_group()
                if splits.left_out is not None or then is not None:
                    raise DeliveryError(f"{error}; what comes after the training is not done yet") from error
                _draw(store, method, options, [])
                store.finish_later()
                raise
            leave_group()
            del network  # what comes now works on the stored snapshots
            left_out = None
            if splits.left_out is not None:
                snapshots, left_out = _cross_validate(store, snapshots, splits, options)
            _draw(store, method, options, snapshots)
            if then is not None:
                then(store, snapshots)
        state.discard()
    experiment = store.run.client.get_experiment(store.run.experiment_id).name
    seconds = time.perf_counter() - began
    return Training(planned, store.run_id, experiment, store.link, snapshots, left_out, seconds)


def _seen_before(start: Start | None, lesson: Lesson | None) -> frozenset[str] | None:
    """Digests of images that are in the weights already, or come in through a teacher; None: unknown."""
    sources = [start.trained_on if start is not None else frozenset(), lesson.seen if lesson else frozenset()]
    known = [one for one in sources if one is not None]
    return frozenset().union(*known) if len(known) == len(sources) else None


def _finished(run_id: str, splits: DataSplits, options: TrainOptions, planned: PlannedTraining) -> Training:
    """The training of a run that was finished before; what was left out is scored again, for the plan, not tracked."""
    began = time.perf_counter()
    run = attach(run_id)
    settle(run)  # whatever a killed command had begun on top of it
    snapshots = snapshots_of(run_id)
    left_out = None
    if splits.left_out is not None:
        left_out = _score(snapshots, splits.left_out, options)
    experiment = run.client.get_experiment(run.experiment_id).name
    return Training(planned, run_id, experiment, run.link, snapshots, left_out, time.perf_counter() - began)


def _score(snapshots: list[Snapshot], data: SegmentationDataset, options: TrainOptions) -> LeftOutScores | None:
    return score_left_out(
        snapshots,
        data,
        batch_size=options.batch_size,
        precision=options.precision,
        accelerator=options.accelerator,
    )


def _cross_validate(
    store: MlflowStore, snapshots: list[Snapshot], splits: DataSplits, options: TrainOptions
) -> tuple[list[Snapshot], LeftOutScores | None]:
    """Scores on the left-out images, tracked; and the snapshots with these scores."""
    assert splits.left_out is not None
    reference = splits.left_out.reference()
    store.log_dataset(reference, "left-out")
    found = _score(snapshots, splits.left_out, options)
    if found is None:
        return snapshots, None
    scored = []
    for snapshot, metrics in zip(snapshots, found.snapshots, strict=True):
        store.log_scores(metrics, reference, snapshot)
        scored.append(replace(snapshot, metrics={**snapshot.metrics, **metrics}))
    store.log_scores(found.combined, reference)
    return scored, found


def fit_options(options: TrainOptions) -> FitOptions:
    """The part of the options that says how to train, whatever the method."""
    return FitOptions(**{known.name: getattr(options, known.name) for known in fields(FitOptions)})


def configuration(options: TrainOptions, method: Trainer, start: Start | None) -> dict[str, Any]:
    """All options as params, with the method's own, and with what trained weights say about themselves."""
    own = {"trainer_options", "cycles"}  # the method says them
    elsewhere = {"experiment", "run_name", "where", "pick", "register_as", "alias", "model", "views", "resume"}
    left_out = own | elsewhere
    wanted = {known.name for known in fields(type(options))} - left_out
    found = {name: value for name, value in asdict(options).items() if name in wanted}
    return {**found, **(start.params if start is not None else {}), **describe(method)}


def environment(options: TrainOptions) -> dict[str, str]:
    """What the training ran on."""
    device = choose_device(options.accelerator)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "env/python": platform.python_version(),
        "env/torch": torch.__version__,
        "env/smp": version("segmentation-models-pytorch"),
        "env/smp_ensemble": version("smp-ensemble"),
        "env/device": f"{device.type} ({hardware}, {torch.get_num_threads()} threads)",
        "env/precision": resolve_precision(options.precision, device),
    }


def links(link: str) -> dict[str, str]:
    """Tags of a run that lead to its snapshots in the tracking UI."""
    note = (
        f"[Snapshots of this experiment, sorted by validation IoU]({link})\n\n"
        f"Pick members: tick snapshot runs, add the tag `{names.PICK}=NAME`, then "
        "`mlflow run . -e ensemble -P pick=NAME`."
    )
    return {names.SNAPSHOTS_LINK: link, names.NOTE: note}


def _draw(store: MlflowStore, method: Trainer, options: TrainOptions, snapshots: list[Snapshot]) -> None:
    if not store.history:
        return
    steps, measured = store.history[0]  # of an epoch's end; the last one may come early
    steps_per_epoch = max(1, steps // int(measured["epoch"]))
    schedule = warmed_up(method.schedule(options.epochs, steps_per_epoch), options.warmup_epochs, steps_per_epoch)
    taken = {step for step in schedule.snapshot_steps if step <= store.last_step} | {one.step for one in snapshots}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = {one.step: one.metrics["val_iou"] for one in snapshots if "val_iou" in one.metrics}
        draw_learning_rate(
            schedule,
            options.lr,
            steps_per_epoch,
            folder / "learning_rate.png",
            title=f"{method.name}: {options.epochs} epochs, {len(schedule.snapshot_steps)} snapshots",
            scores=scores,
        )
        draw_curves(store.history, sorted(taken), folder / "curves.png")
        for figure in sorted(folder.iterdir()):
            store.log_file(figure)
