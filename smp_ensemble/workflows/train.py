"""`train`: data to snapshots in MLflow, by one training or by a plan of several."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from smp_ensemble.data.forms import load_data
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest
from smp_ensemble.tracking import names
from smp_ensemble.tracking.runs import as_param, attach, ending, open_run, reopen
from smp_ensemble.tracking.settling import settle
from smp_ensemble.training.plans import make_plan
from smp_ensemble.typing import MODES
from smp_ensemble.workflows.crossval import summarize
from smp_ensemble.workflows.joining import place_for
from smp_ensemble.workflows.options import PartOptions
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.resuming import AUTO, begun, identity_of, telling
from smp_ensemble.workflows.starting import find_start, new_network
from smp_ensemble.workflows.training import Training, configuration, environment, links, method_of, run_training

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.tracking.runs import TrackedRun
    from smp_ensemble.training.plans import PlannedTraining
    from smp_ensemble.typing import Mode, Snapshot, Task, Trainer
    from smp_ensemble.workflows.options import DataOptions, TrainOptions
    from smp_ensemble.workflows.starting import Start
    from smp_ensemble.workflows.states import TrainingState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What `train` left.

    Attributes:
        run_id: The run of the plan; of the training, where there is just one.
        trainings: In the order of the plan.
        splits: The data; `val` and `test` are those of all trainings.
        cross_validated: `cv_iou` (of all left-out pixels together), `cv_iou_mean`, `cv_iou_std`, ...; empty where
            nothing was left out, or for one training, which has scores of its own.
    """

    run_id: str
    trainings: Sequence[Training]
    splits: DataSplits
    cross_validated: Mapping[str, float] = field(default_factory=dict)

    @property
    def snapshots(self) -> list[Snapshot]:
        """Of all trainings."""
        return [snapshot for training in self.trainings for snapshot in training.snapshots]

    @property
    def link(self) -> str:
        """The address of the snapshots in the tracking UI."""
        return self.trainings[0].link

    def cross_validation(self) -> list[str]:
        """A line that says what the trainings score on the images that they left out, where they left any out."""
        found = self.cross_validated
        if "cv_iou_std" in found:
            return [
                f"cross-validated IoU: {found['cv_iou_mean']:.4f} +- {found['cv_iou_std']:.4f} over "
                f"{len(self.trainings)} trainings, {found['cv_iou']:.4f} over all left-out pixels together"
            ]
        first = self.trainings[0].left_out
        if len(self.trainings) == 1 and first is not None:
            return [f"left-out images, snapshots combined: IoU {first.combined['cv_iou']:.4f}"]
        return []

    def report(self) -> Report:
        """The table of snapshots; of trainings, where there are several."""
        first = self.trainings[0]
        snapshots = [row for training in self.trainings for row in training.rows()]
        values: dict[str, Any] = {
            "run_id": self.run_id,
            "experiment": first.experiment,
            "link": self.link,
            "snapshots": snapshots,
        }
        notes = [
            *self.cross_validation(),
            f"run {self.run_id} in experiment '{first.experiment}'",
            *pick_advice(self.link),
        ]
        if len(self.trainings) == 1:
            if first.left_out is not None:
                values["cv"] = first.left_out.combined
            return Report(values, snapshots, notes)
        values["trainings"] = [
            {
                "training": training.planned.label,
                "run_id": training.run_id,
                "seed": training.planned.seed,
                "fold": training.planned.fold,
                "snapshots": [snapshot.model_id for snapshot in training.snapshots],
                "cv": training.left_out.combined if training.left_out is not None else None,
                "seconds": training.seconds,
            }
            for training in self.trainings
        ]
        values["cv"] = dict(self.cross_validated) or None
        return Report(values, [training.row() for training in self.trainings], notes)


def pick_advice(link: str) -> list[str]:
    """How to go on from snapshots to an ensemble."""
    return [
        f"see and pick snapshots (mlflow server, then): {link}",
        f"tick runs, add the tag {names.PICK}=NAME, then: mlflow run . -e ensemble -P pick=NAME",
    ]


def load_splits(options: DataOptions) -> DataSplits:
    """The data that options describe.

    Raises:
        ConfigError: Unknown mode.
        DataError: The data cannot be read as described.
    """
    part = options if isinstance(options, PartOptions) else PartOptions()
    return load_data(
        options.data,
        mask_column=options.mask_column,
        mode=as_mode(options.mode),
        holdout=options.holdout,
        folds=part.folds,
        bootstrap=part.bootstrap,
        fold=part.fold,
        split_seed=options.split_seed,
    )


def as_mode(mode: str | None) -> Mode | None:
    """A mode by name.

    Raises:
        ConfigError: Unknown mode.
    """
    for known in MODES:
        if mode == known:
            return known
    if mode is None:
        return None
    raise ConfigError(f"unknown mode '{mode}': {nearest(mode, MODES)}")


def train(options: TrainOptions, check: Callable[[Task], None] | None = None) -> TrainResult:
    """Trains by one method, once or as often as the plan says, and leaves every snapshot in MLflow, scored.

    Args:
        options: What to train.
        check: May refuse the task, before anything is tracked, for what comes after the training.

    Raises:
        InputError: Something in the options or the data does not fit; nothing is tracked unless training had begun,
            and then the run is FAILED with the reason. Trainings of a plan that were finished before stay.
    """
    plan = make_plan(
        folds=options.folds,
        bootstrap=options.bootstrap,
        seeds=options.seeds,
        fold=options.fold,
        seed=options.seed,
    )
    place_for(options, trainings=len(plan))
    method = method_of(options)
    method.schedule(options.epochs, 1)  # cycles that do not fit are an error before any data is read
    whole = load_splits(replace(options, fold=None))
    task = whole.task
    if check is not None:
        check(task)
    if options.in_channels not in {None, task.in_channels}:
        raise ConfigError(f"in-channels={options.in_channels}, but the images have {task.in_channels} bands")

    def part(planned: PlannedTraining) -> DataSplits:
        return whole.part(planned.fold, folds=options.folds, bootstrap=options.bootstrap, split_seed=options.split_seed)

    start = find_start(options, whole)
    with telling(options):
        if len(plan) == 1:
            splits = part(plan[0])
            training = run_training(_options_of(plan[0], options), splits, method, plan[0], start=start)
            return TrainResult(training.run_id, [training], splits)
        part(plan[0])  # too few images, and options that build no network, are errors before anything is tracked
        new_network(options, task, start)
        return _run_plan(plan, options, whole, part, method, start)


def _options_of(planned: PlannedTraining, options: TrainOptions) -> TrainOptions:
    """The options with which one training of a plan would run alone."""
    return replace(options, seed=planned.seed, fold=planned.fold, seeds=None)


def _run_plan(
    plan: Sequence[PlannedTraining],
    options: TrainOptions,
    whole: DataSplits,
    part: Callable[[PlannedTraining], DataSplits],
    method: Trainer,
    start: Start | None,
) -> TrainResult:
    """One training after the other, in runs nested under the plan's; no weights stay in memory."""
    identity = identity_of(names.PLAN, options, whole)
    params = {**configuration(options, method, start), "mode": whole.task.mode}
    known = {name: as_param(value) for name, value in params.items()}
    with begun(identity, options.resume, experiment=options.experiment, params=known) as begins:
        if isinstance(begins, str):
            run = attach(begins)
            trainings, found = _run_all(run, plan, options, part, method, start)
            return TrainResult(run.run_id, trainings, whole, found)
        run = _plan_run(begins, options)
        state = begins.with_run(run.run_id)
        with ending(run):
            run.log_params({**params, **environment(options)})
            run.set_tags(links(run.link))
            run.log_dataset(whole.train.reference(), "training")
            run.log_dataset(whole.val.reference(), "validation")
            chosen = replace(options, resume=AUTO if state.is_continued else "")
            trainings, found = _run_all(run, plan, chosen, part, method, start)
            # All folds together leave out the whole training data; bootstrap samples do not.
            run.log_new_metrics(found, dataset=whole.train.reference() if options.folds else None)
            if state.is_continued:
                settle(run)
            run.set_tags({names.CONFIGURATION: identity.digest})
        state.discard()
    return TrainResult(run.run_id, trainings, whole, found)


def _plan_run(state: TrainingState, options: TrainOptions) -> TrackedRun:
    """The plan's run: the one that it began with, or a new one."""
    if state.run_id is not None:
        return reopen(state.run_id)
    tags = {names.STATE: state.token}
    return open_run(names.PLAN, experiment=options.experiment, run_name=options.run_name, tags=tags)


def _run_all(
    run: TrackedRun,
    plan: Sequence[PlannedTraining],
    options: TrainOptions,
    part: Callable[[PlannedTraining], DataSplits],
    method: Trainer,
    start: Start | None,
) -> tuple[list[Training], dict[str, float]]:
    """The trainings, and their cross-validated scores; after a resume, those that are finished are not run again."""
    trainings: list[Training] = []
    for index, planned in enumerate(plan, 1):
        logger.info("training %d of %d: %s", index, len(plan), planned.label)
        chosen, splits = _options_of(planned, options), part(planned)
        identity = identity_of(names.TRAINING, chosen, splits, run.run_id)
        try:
            trainings.append(
                run_training(
                    replace(chosen, run_name=f"{run.name}-{planned.label}"),
                    splits,
                    method,
                    planned,
                    start=start,
                    parent_run_id=run.run_id,
                    identity=identity,
                )
            )
        except BaseException:
            logger.warning(
                "%s failed; the trainings that were finished before it stay: %s",
                planned.label,
                ", ".join(f"{one.planned.label} (run {one.run_id})" for one in trainings) or "none",
            )
            raise
        gc.collect()  # a trainer and its network refer to each other
    return trainings, summarize([training.left_out for training in trainings if training.left_out is not None])
