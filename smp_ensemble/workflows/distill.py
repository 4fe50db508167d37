"""`distill`: an ensemble to one student that learned from its predictions, tracked as any snapshot, and compared."""

from __future__ import annotations

import copy
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smp_ensemble.data.unlabelled import join_unlabelled
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.guards import check_leaks, task_of
from smp_ensemble.evaluation.measuring import measure_all, member_names
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.evaluation.teaching import teach
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.files import find_images
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.tracking.teachers import exact_uri, link_teacher
from smp_ensemble.training.distillation import Lesson, check_shares
from smp_ensemble.training.plans import make_plan
from smp_ensemble.typing import Resampling
from smp_ensemble.workflows.assembling import assemble
from smp_ensemble.workflows.combining import Combination
from smp_ensemble.workflows.comparing import (
    BEST_MEMBER,
    STUDENT,
    TEACHER,
    Comparison,
    compare,
    forward_passes,
    table,
    time_ratio,
)
from smp_ensemble.workflows.guards import check_fits
from smp_ensemble.workflows.joining import place_for
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.resuming import telling
from smp_ensemble.workflows.starting import TRACKED, describe_network, find_start, new_network, start_from
from smp_ensemble.workflows.train import load_splits
from smp_ensemble.workflows.training import method_of, run_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.tracking.store import MlflowStore
    from smp_ensemble.training.plans import PlannedTraining
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.options import DistillOptions
    from smp_ensemble.workflows.starting import Start
    from smp_ensemble.workflows.training import Training

COMPARISON_FILE = "distillation.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """A loaded ensemble and what it scores, before any student is trained.

    Attributes:
        uri: `models:/m-...` where it is tracked.
        ensemble: On the CPU; without rejection, which makes scores incomparable.
        views: In which it predicts.
        measured: By split: `val`, and `test` where there is one.
        best: The member with the best validation IoU.
    """

    uri: str
    ensemble: Ensemble
    views: tuple[str, ...]
    measured: dict[str, Measurement]
    best: int

    @property
    def best_member(self) -> Member:
        """That member."""
        member = self.ensemble.members[self.best]
        assert isinstance(member, Member)
        return member

    @property
    def seen(self) -> frozenset[str] | None:
        """Digests of all images that a member was trained on; None: unknown of one of them."""
        known = [member.training_images for member in self.ensemble.members if isinstance(member, Member)]
        found = [images for images in known if images is not None]
        return frozenset().union(*found) if len(found) == len(known) else None

    def engine(self, options: DistillOptions) -> Engine:
        """Runs it."""
        return Engine(self.ensemble, choose_device(options.accelerator), options.precision, views=self.views)


@dataclass(frozen=True)
class Outcome:
    """What was found out about a student.

    Attributes:
        snapshot: The one with the best validation IoU.
        comparisons: With its teacher, on each split.
        passes: Forward passes for one image, by model.
        time_ratio: How many times as long as the student the teacher takes.
    """

    snapshot: Snapshot
    comparisons: Sequence[Comparison]
    passes: dict[str, int]
    time_ratio: float

    def values(self) -> dict[str, Any]:
        """Plain values, for `--json` and the run's file."""
        return {
            "student": self.snapshot.uri,
            "passes": self.passes,
            "time_ratio": self.time_ratio,
            **{one.split: one.values() for one in self.comparisons},
        }


def distill(options: DistillOptions) -> Report:
    """Trains one student on a teacher's probabilities and on masks, and compares the two.

    The teacher predicts every training image once, whole, and the predictions wait in a temporary folder; each crop of
    an image takes the same crop of them along.

    Raises:
        ConfigError: An option that means nothing here, or contradicts another.
        LeakError: A member of the teacher was trained on images that are scored, or unlabelled images are such.
        NetworkError: The teacher does not fit the data.
        IntegrityError: A file of the teacher is missing or changed.
    """
    check_shares(options.alpha, options.soften)
    if place_for(options).count > 1:
        raise ConfigError(f"a student learns from its teacher in one process, got devices={options.devices}: use 1")
    if options.alpha == 1 and options.unlabelled:
        raise ConfigError("alpha=1 learns from masks alone, which unlabelled images do not have: choose a smaller one")
    planned = _one_training(options)
    uri = exact_uri(options.model)
    splits = load_splits(options)
    teacher = _measured(load_model(uri), uri, options, splits)
    splits, unlabelled = _with_unlabelled(options, splits)
    options = _like_first_member(options, teacher)
    method = method_of(options)
    method.schedule(options.epochs, 1)  # cycles that do not fit are an error before the teacher predicts
    if unlabelled and isinstance(method, Resampling):
        raise ConfigError(f"trainer={options.trainer} draws images by the loss on their masks: leave unlabelled out")
    start = _start(options, teacher, splits)
    new_network(options, splits.task, start)  # so are options that build no network
    outcomes: list[Outcome] = []

    def then(store: MlflowStore | None, snapshots: Sequence[Snapshot]) -> None:
        outcomes.append(_compared(store, snapshots, teacher, splits, options))

    with tempfile.TemporaryDirectory(prefix="smp_ensemble-teacher-") as folder:
        logger.info("the teacher predicts %d images", len(splits.train))
        lesson = Lesson(
            teach(teacher.engine(options), splits.train, Path(folder), batch_size=options.batch_size),
            options.alpha,
            options.soften,
            teacher.seen,
            {
                "distilled_from": uri,
                "teacher_views": "+".join(teacher.views),
                "teacher_members": len(teacher.ensemble.members),
                "unlabelled_images": unlabelled,
            },
        )
        teacher.ensemble.to("cpu")  # the student has the device to itself
        with telling(options):
            training = run_training(options, splits, method, planned, start=start, lesson=lesson, then=then)
    return _report(training, outcomes[0], teacher, splits, unlabelled)


def _one_training(options: DistillOptions) -> PlannedTraining:
    plan = make_plan(
        folds=options.folds, bootstrap=options.bootstrap, seeds=options.seeds, fold=options.fold, seed=options.seed
    )
    if len(plan) != 1:
        raise ConfigError(f"distill trains one student, got a plan of {len(plan)}: choose one with fold, or one seed")
    return plan[0]


def _measured(loaded: Ensemble, uri: str, options: DistillOptions, splits: DataSplits) -> Teacher:
    check_fits(uri, task_of(loaded), splits.task)
    members = [member for member in loaded.members if isinstance(member, Member)]
    for what, data in (("validation", splits.val), ("test", splits.test), ("left-out", splits.left_out)):
        if data is not None:
            check_leaks(members, data, what)
    ensemble = copy.copy(loaded)
    ensemble.reject = 0.0
    engine = Engine(ensemble, choose_device(options.accelerator), options.precision, views=options.views)
    measured = {
        split: measure_all(
            Predictions(engine, data, batch_size=options.batch_size, label=f"teacher, {split}"),
            split=split,
            names=member_names(ensemble),
        )
        for split, data in _scored(splits)
    }
    return Teacher(uri, ensemble, engine.views, measured, measured["val"].best_member)


def _scored(splits: DataSplits) -> list[tuple[str, SegmentationDataset]]:
    return [(name, data) for name, data in (("val", splits.val), ("test", splits.test)) if data is not None]


def _with_unlabelled(options: DistillOptions, splits: DataSplits) -> tuple[DataSplits, int]:
    """The data with images that have no mask among those that train; and how many these are."""
    if not options.unlabelled:
        return splits, 0
    joined = join_unlabelled(splits, [(image.name, image.path) for image in find_images(options.unlabelled)])
    if joined.known:
        logger.info("%d of the unlabelled images are left out: they train already", joined.known)
    return replace(splits, train=joined.train), joined.added


def _like_first_member(options: DistillOptions, teacher: Teacher) -> DistillOptions:
    """The options with the first member's network where they name none; trained weights bring their own."""
    if options.init == TEACHER or options.init.startswith(TRACKED):
        return options
    first = teacher.ensemble.members[0]
    assert isinstance(first, Member)
    found = describe_network(first.network)
    same = (options.arch or found["arch"], options.encoder_name or found["encoder_name"]) == (
        found["arch"],
        found["encoder_name"],
    )
    return replace(
        options,
        arch=options.arch or found["arch"],
        encoder_name=options.encoder_name or found["encoder_name"],
        model_options=options.model_options or (found["model_options"] if same else {}),
    )


def _start(options: DistillOptions, teacher: Teacher, splits: DataSplits) -> Start | None:
    if options.init != TEACHER:
        return find_start(options, splits)
    if options.encoder_weights is not None:
        raise ConfigError(
            f"init=teacher brings the encoder's weights too: leave encoder-weights={options.encoder_weights} out"
        )
    member = teacher.best_member
    return start_from(member, member.normalization, options, splits)


def _compared(
    store: MlflowStore | None,
    snapshots: Sequence[Snapshot],
    teacher: Teacher,
    splits: DataSplits,
    options: DistillOptions,
) -> Outcome:
    """Measures the student beside its teacher, and keeps it all in the training's run, unless it is there already."""
    if store is not None:
        link_teacher(store.run, teacher.uri)
    best = max(snapshots, key=lambda one: one.metrics.get("val_iou", float("-inf")))
    built = assemble(
        [best],
        splits,
        Combination(),
        batch_size=options.batch_size,
        precision=options.precision,
        accelerator=options.accelerator,
    )
    comparisons = []
    for split, data in _scored(splits):
        measured = built.validation
        if split != "val":
            measured = measure_all(Predictions(built.engine, data, batch_size=options.batch_size), split=split)
        comparisons.append(compare(split, teacher.measured[split], teacher.best, measured))
        if store is not None:
            store.log_scores(comparisons[-1].metrics(), data.reference())
    engine = teacher.engine(options)
    whole = forward_passes(engine)
    passes = {
        TEACHER: whole,
        BEST_MEMBER: whole // len(teacher.ensemble.members),
        STUDENT: forward_passes(built.engine),
    }
    ratio = time_ratio(engine, built.engine, splits.val, batch_size=options.batch_size)
    outcome = Outcome(best, comparisons, passes, ratio)
    if store is None:
        return outcome
    costs = {"teacher_passes": float(whole), "student_passes": float(passes[STUDENT]), "teacher_time_ratio": ratio}
    store.log_scores(costs, splits.val.reference())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / COMPARISON_FILE
        path.write_text(Report(outcome.values()).json(), encoding="utf-8")
        store.log_file(path)
    return outcome


def _report(training: Training, outcome: Outcome, teacher: Teacher, splits: DataSplits, unlabelled: int) -> Report:
    values = {
        "run_id": training.run_id,
        "experiment": training.experiment,
        "link": training.link,
        "teacher": teacher.uri,
        "images": {"with masks": len(splits.train) - unlabelled, "without": unlabelled},
        "snapshots": training.rows(),
        **outcome.values(),
    }
    notes = [
        *(one.sentence() for one in outcome.comparisons),
        f"one image costs the teacher {outcome.passes[TEACHER]} forward passes and the student "
        f"{outcome.passes[STUDENT]}; measured, the teacher takes {outcome.time_ratio:.1f} times as long",
        f"snapshot {outcome.snapshot.model_id} in run {training.run_id}: {training.link}",
        f"to register it: smp-ensemble ensemble --pick {outcome.snapshot.model_id} --register-as NAME",
    ]
    return Report(values, table(outcome.comparisons, outcome.passes), notes)
