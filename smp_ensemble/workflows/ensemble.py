"""`ensemble`: tracked snapshots to one registered model, scored against its best member."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.selection import make_selector
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.payload import decide
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking import names
from smp_ensemble.tracking.candidates import find_candidates
from smp_ensemble.tracking.flavor import log_model, register
from smp_ensemble.tracking.report import draw_overlay_sheet, truth_for_overlay
from smp_ensemble.tracking.runs import TrackedRun, tracked_run
from smp_ensemble.tracking.search import first_experiment
from smp_ensemble.training.previews import preview_indices
from smp_ensemble.workflows.assembling import Built, assemble
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.scoring import Score, score
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.options import EnsembleOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnsembleResult:
    """What `ensemble` left.

    Attributes:
        uri: `models:/m-...`, the logged model.
        run_id: Its run.
        registered: `name/version` where it was registered.
        alias: Where one was given.
        members: The tracked snapshots.
        weights: One for each member.
        validation: Scores of each member and, last, the ensemble; each at its own best threshold (binary mode).
        test: The same thresholds on test data; None without test data.
    """

    uri: str
    run_id: str
    registered: str | None
    alias: str | None
    members: list[Snapshot]
    weights: Sequence[float]
    validation: list[Score]
    test: list[Score] | None

    @property
    def best_member(self) -> int:
        """The member with the best validation IoU: chosen without looking at test data."""
        return best_index(self.validation[:-1])

    @property
    def load_uri(self) -> str:
        """The address under which people load it."""
        if self.registered is None:
            return self.uri
        name, _, registered_version = self.registered.rpartition("/")
        return f"models:/{name}@{self.alias}" if self.alias else f"models:/{name}/{registered_version}"

    def report(self) -> Report:
        """The table of members, the best single one and the ensemble."""
        labels = [
            f"{member.model_id[:12]} ({_place(member, self.members)})"
            + (" best single" if index == self.best_member else "")
            for index, member in enumerate(self.members)
        ]
        rows = []
        for index, label in enumerate([*labels, "ensemble"]):
            found = self.validation[index]
            row = {
                "member": label,
                "weight": float(self.weights[index]) if index < len(self.weights) else None,
                "threshold": round(found.threshold, 3),
                "val IoU": found.metrics["iou"],
                "val ECE": found.metrics["ece"],
            }
            if self.test is not None:
                row |= {"test IoU": self.test[index].metrics["iou"], "test ECE": self.test[index].metrics["ece"]}
            rows.append(row)
        values = {
            "uri": self.uri,
            "run_id": self.run_id,
            "registered": self.registered,
            "load": self.load_uri,
            "members": [member.uri for member in self.members],
            "weights": list(self.weights),
            "best_member": self.members[self.best_member].uri,
            "val": [one.metrics for one in self.validation],
            "test": [one.metrics for one in self.test] if self.test is not None else None,
            "thresholds": [one.threshold for one in self.validation],
        }
        return Report(values, rows, [f'model = mlflow.pyfunc.load_model("{self.load_uri}")'])


def _place(member: Snapshot, members: Sequence[Snapshot]) -> str:
    """Where in its training a member was taken, and what tells that training from the others."""
    parts = [
        f"{word} {member.params.get(param)}, "
        for word, param in (("bootstrap" if member.params.get("bootstrap") else "fold", "fold"), ("seed", "seed"))
        if len({one.params.get(param) for one in members}) > 1
    ]
    return f"{''.join(parts)}step {member.step}"


def best_index(scores: Sequence[Score]) -> int:
    """The index of the best IoU; the first of equals."""
    return max(range(len(scores)), key=lambda index: (scores[index].metrics["iou"], -index))


def ensemble(
    options: EnsembleOptions,
    *,
    snapshots: list[Snapshot] | None = None,
    splits: DataSplits | None = None,
    parent_run_id: str | None = None,
) -> EnsembleResult:
    """Finds candidates, selects members, combines, scores, logs and registers.

    Args:
        options: What to look for and how to combine.
        snapshots: Candidates that are known already; None: found by `options.where` or `options.pick`.
        splits: Data that is loaded already.
        parent_run_id: The run to nest under.

    Raises:
        NothingFoundError: No candidates.
        LeakError: A member was trained on validation or test images.
        NetworkError: Members do not fit each other or the data.
    """
    splits = splits or load_splits(options)
    if options.alias and not options.register_as:
        raise ConfigError(f"alias={options.alias} needs a registered model: pass register-as=NAME too")
    if snapshots is None:
        snapshots = find_candidates(
            where=options.where,
            pick=options.pick,
            experiment=options.experiment,
            metric=options.metric,
            dataset_digest=splits.val.digest,
        )
    members = make_selector(options.selector)(snapshots, options.max_members)
    weights = _weights(options.weights, len(members))
    built = assemble(
        members,
        splits,
        combiner=options.combiner,
        weights=weights,
        batch_size=options.batch_size,
        precision=options.precision,
        accelerator=options.accelerator,
    )
    engine = Engine(built.ensemble, choose_device(options.accelerator), options.precision)
    test = None
    if splits.test is not None:
        thresholds = [one.threshold for one in built.validation]
        test = score(engine, splits.test, batch_size=options.batch_size, thresholds=thresholds, label="test")
    # `where` may span experiments; the ensemble's own run belongs to the first.
    experiment = first_experiment(options.experiment)
    with tracked_run(names.ENSEMBLE, experiment=experiment, parent_run_id=parent_run_id) as run:
        uri = _track(run, built, options, splits, test, engine)
        registered = None
        if options.register_as:
            registered = f"{options.register_as}/{register(uri, options.register_as, options.alias)}"
    return EnsembleResult(
        uri, run.run_id, registered, options.alias, members, built.ensemble.weights, built.validation, test
    )


def _weights(text: str | None, members: int) -> list[float] | None:
    if not text:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"expected weights as numbers separated by commas, got '{text}'") from error
    if len(weights) != members:
        raise ConfigError(f"expected one weight for each of {members} members, got {len(weights)}: '{text}'")
    return weights


def _track(
    run: TrackedRun,
    built: Built,
    options: EnsembleOptions,
    splits: DataSplits,
    test: list[Score] | None,
    engine: Engine,
) -> str:
    best = best_index(built.validation[:-1])
    task = splits.task
    run.log_params(
        {
            "mode": task.mode,
            "combiner": options.combiner,
            "selector": options.selector,
            "where": options.where,
            "pick": options.pick,
            "members": ",".join(member.model_id for member in built.members),
            "weights": ",".join(f"{weight:g}" for weight in built.ensemble.weights),
            "threshold": built.ensemble.threshold,
            "data": options.data,
        }
    )
    uri = log_model(
        built.ensemble,
        "ensemble",
        run_id=run.run_id,
        params={"mode": task.mode, "combiner": options.combiner, "members": str(len(built.members))},
    )
    model_id = uri.removeprefix("models:/")
    for prefix, data, scores in (("val", splits.val, built.validation), ("test", splits.test, test)):
        if data is None or scores is None:
            continue
        reference = data.reference()
        run.log_dataset(reference, "validation" if prefix == "val" else "test")
        own = {f"{prefix}_{name}": value for name, value in scores[-1].metrics.items()}
        run.log_metrics(own, model_id=model_id, dataset=reference)
        run.log_metrics({f"best_member_{prefix}_{name}": value for name, value in scores[best].metrics.items()})
    _log_overlays(run, built, splits, engine, best)
    return uri


def _log_overlays(run: TrackedRun, built: Built, splits: DataSplits, engine: Engine, best: int) -> None:
    """One sheet: ground truth, the best member and the ensemble, on test images where there are some."""
    data = splits.test if splits.test is not None else splits.val
    pairs = [data.read(index) for index in preview_indices(data)]
    images = [image for image, _ in pairs]
    single = Ensemble(
        [engine.ensemble.members[best]],
        mode=built.ensemble.mode,
        threshold=built.validation[best].threshold,
        class_names=built.ensemble.class_names,
    )
    columns = {"ground truth": [truth_for_overlay(mask, data.task) for _, mask in pairs]}
    for heading, model in (("best member", single), ("ensemble", built.ensemble)):
        predictor = Engine(model, engine.device, engine.precision)
        columns[heading] = [decide(model, probabilities) for probabilities in predictor.predict(images)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "overlays.png"
        draw_overlay_sheet(images, columns, data.task, path)
        run.log_file(path)
