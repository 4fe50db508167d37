"""`ensemble`: tracked snapshots to one registered model, scored against its best member."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.exceptions import NothingFoundError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking import names
from smp_ensemble.tracking.candidates import find_candidates
from smp_ensemble.tracking.flavor import log_model, register
from smp_ensemble.tracking.lineage import link_members, mark_used, members_table, registered_lineage
from smp_ensemble.tracking.pages import REPORT_FOLDER, log_report
from smp_ensemble.tracking.runs import TrackedRun, tracked_run
from smp_ensemble.tracking.search import first_experiment
from smp_ensemble.tracking.versions import describe_version
from smp_ensemble.workflows.assembling import Built, assemble
from smp_ensemble.workflows.combining import combination_of
from smp_ensemble.workflows.promotion import Promotion, carry_out, check_champion, judge, rule_of
from smp_ensemble.workflows.reporting import log_overlays
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.selecting import choose_members, log_selection, selecting_of
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.evaluation.adaptive_measuring import AdaptiveScore
    from smp_ensemble.evaluation.measurement import Measurement
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
        alias: The one that the new version has: that which was asked for, or `challenger`; None: none.
        members: The tracked snapshots.
        ensemble: As it was logged.
        validation: What it and its members score on validation data, each with its own threshold and temperature.
        test: The same thresholds and temperatures on test data; None without test data.
        promotion: What became of the alias; None where none was asked for.
    """

    uri: str
    run_id: str
    registered: str | None
    alias: str | None
    members: list[Snapshot]
    ensemble: Ensemble
    validation: Measurement
    test: Measurement | None
    promotion: Promotion | None = None

    @property
    def best_member(self) -> int:
        """The member with the best validation IoU: chosen without looking at test data."""
        return self.validation.best_member

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
            label + (" best single" if index == self.best_member else "")
            for index, label in enumerate(labels_of(self.members))
        ]
        validation = self.validation.scores
        test = self.test.scores if self.test is not None else None
        weights = self.ensemble.weights
        rows = []
        for index, label in enumerate([*labels, "ensemble"]):
            found = validation[index]
            row = {
                "member": label,
                "weight": weights[index] if index < len(weights) and self.ensemble.combiner != "stacking" else None,
                "threshold": round(found.threshold, 3),
                "val IoU": found.metrics["iou"],
                "val ECE": found.metrics["ece"],
            }
            if test is not None:
                row |= {"test IoU": test[index].metrics["iou"], "test ECE": test[index].metrics["ece"]}
            if self.ensemble.reject:
                row["coverage"] = (test or validation)[index].metrics["coverage"]
            rows.append(row)
        rows += self._adaptive_row(rows[-1])
        promotion = self.promotion
        if promotion is not None and promotion.champion is not None:
            champion = promotion.champion
            row = {
                "member": f"{promotion.asked} {promotion.opponent}",
                "threshold": round(champion.score.threshold, 3),
                "test IoU": champion.score.metrics["iou"],
                "test ECE": champion.score.metrics["ece"],
                "coverage": champion.score.metrics["coverage"],
            }
            rows.append({heading: row.get(heading) for heading in rows[0]})
        values = {
            "uri": self.uri,
            "run_id": self.run_id,
            "registered": self.registered,
            "load": self.load_uri,
            "members": [member.uri for member in self.members],
            "weights": list(weights),
            "temperature": self.ensemble.temperature,
            "postprocess": self.ensemble.postprocess.to_dict(),
            "best_member": self.members[self.best_member].uri,
            "val": [one.metrics for one in validation],
            "test": [one.metrics for one in test] if test is not None else None,
            "thresholds": [one.threshold for one in validation],
            "promotion": promotion.values() if promotion is not None else None,
            "adaptive": {split: score.to_dict() for split, score in self._adaptive_scores().items()},
        }
        notes = [
            f"report: {REPORT_FOLDER}/report.html in run {self.run_id}",
            f'model = mlflow.pyfunc.load_model("{self.load_uri}")',
        ]
        if promotion is not None:
            notes.insert(1, promotion.sentence())
        notes[1:1] = [
            f"adaptive on {split} data: {score.members:.2f} of {len(weights)} members on average, "
            f"{100 * score.agreement:.3f} % of pixels as with all (promised: {100 * (1 - score.tolerance):g} %)"
            for split, score in self._adaptive_scores().items()
        ]
        return Report(values, rows, notes)

    def _adaptive_scores(self) -> dict[str, AdaptiveScore]:
        """By split; empty without an adaptive rule."""
        both = {"val": self.validation, "test": self.test}
        return {split: one.adaptive for split, one in both.items() if one is not None and one.adaptive is not None}

    def _adaptive_row(self, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The ensemble whose images skip members, below the one in which all run."""
        found = self._adaptive_scores()
        if not found:
            return []
        row = {"member": "ensemble, adaptive", "threshold": whole["threshold"]}
        row |= {f"{split} IoU": score.iou for split, score in found.items()}
        return [{heading: row.get(heading) for heading in whole}]


def labels_of(members: Sequence[Snapshot]) -> list[str]:
    """What people call each member: the start of its id, and where in which training it was taken."""
    return [f"{member.model_id[:12]} ({_place(member, members)})" for member in members]


def _place(member: Snapshot, members: Sequence[Snapshot]) -> str:
    """Where in its training a member was taken, and what tells that training from the others."""
    fold = "bootstrap " if member.params.get("bootstrap") else "fold "
    parts = [
        f"{word}{member.params.get(param)}, "
        for word, param in (("", "arch"), ("", "encoder_name"), ("", "trainer"), (fold, "fold"), ("seed ", "seed"))
        if len({one.params.get(param) for one in members}) > 1
    ]
    return f"{''.join(parts)}step {member.step}"


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
    combination, selecting = combination_of(options), selecting_of(options)
    rule_of(options)
    splits = splits or load_splits(options)
    check_champion(options, splits.task)
    if snapshots is None:
        snapshots = _find(options, splits)
    chosen = choose_members(
        snapshots,
        splits,
        selecting,
        views=combination.views,
        batch_size=options.batch_size,
        precision=options.precision,
        accelerator=options.accelerator,
    )
    built = assemble(
        chosen.members,
        splits,
        combination.weighted_by(chosen.weights),
        names=labels_of(chosen.members),
        batch_size=options.batch_size,
        precision=options.precision,
        accelerator=options.accelerator,
    )
    test = None
    if splits.test is not None:
        predictions = Predictions(built.engine, splits.test, batch_size=options.batch_size, label="test")
        test = measure_all(predictions, split="test", names=labels_of(built.members))
    promotion = judge(options, built.engine, splits.test, test)
    # `where` may span experiments; the ensemble's own run belongs to the first.
    experiment = first_experiment(options.experiment)
    with tracked_run(names.ENSEMBLE, experiment=experiment, parent_run_id=parent_run_id) as run:
        uri = _track(run, built, options, splits, test)
        log_selection(run, chosen.numbers)
        note = _note(built, test)
        link_members(run, uri.removeprefix("models:/"), built.members, note)
        registered = None
        if options.register_as:
            version = register(uri, options.register_as)
            registered = f"{options.register_as}/{version}"
            describe_version(options.register_as, version, note, {})
        mark_used(built.members, registered or uri.removeprefix("models:/"))
        if promotion is not None:
            promotion = carry_out(promotion, run, version, note)  # moves the alias: the last step
    alias = promotion.alias if promotion is not None else None
    return EnsembleResult(
        uri, run.run_id, registered, alias, built.members, built.ensemble, built.validation, test, promotion
    )


def _find(options: EnsembleOptions, splits: DataSplits) -> list[Snapshot]:
    """Candidates; where members of a registered ensemble are asked for, what became of them since."""
    try:
        found = find_candidates(
            where=options.where,
            pick=options.pick,
            experiment=options.experiment,
            metric=options.metric,
            dataset_digest=splits.val.digest,
        )
    except NothingFoundError as error:
        gone = [str(member) for member in registered_lineage(options.pick) if member.state == "deleted"]
        if not gone:
            raise
        raise NothingFoundError(
            f"snapshots that '{options.pick}' was made of are gone ({'; '.join(gone)}): that ensemble carries their "
            "weights and works on; pick the others by id"
        ) from error
    uris = {snapshot.uri for snapshot in found}
    for member in registered_lineage(options.pick):
        if member.state == "altered" and member.source in uris:
            logger.warning("since '%s' was built: %s", options.pick, member)
    return found


def _track(
    run: TrackedRun, built: Built, options: EnsembleOptions, splits: DataSplits, test: Measurement | None
) -> str:
    run.log_params(_params(built, options))
    ensemble, best = built.ensemble, built.validation.best_member
    uri = log_model(
        ensemble,
        "ensemble",
        run_id=run.run_id,
        params={"mode": ensemble.mode, "combiner": ensemble.combiner, "members": str(len(built.members))},
    )
    model_id = uri.removeprefix("models:/")
    for prefix, data, measurement in (("val", splits.val, built.validation), ("test", splits.test, test)):
        if data is None or measurement is None:
            continue
        scores = measurement.scores
        reference = data.reference()
        run.log_dataset(reference, "validation" if prefix == "val" else "test")
        own = {f"{prefix}_{name}": value for name, value in scores[-1].metrics.items()}
        if measurement.adaptive is not None:
            own |= measurement.adaptive.metrics(prefix)
        run.log_metrics(own, model_id=model_id, dataset=reference)
        run.log_metrics({f"best_member_{prefix}_{name}": value for name, value in scores[best].metrics.items()})
    shown, measurement = (splits.test, test) if splits.test is not None else (splits.val, built.validation)
    assert measurement is not None
    log_overlays(run, shown, {"best member": _alone(built, best), "ensemble": built.engine})
    title = f"Ensemble of {len(built.members)}"
    log_report(run, measurement, shown, built.engine, title=title, notes=[_describe(ensemble)])
    return uri


def _note(built: Built, test: Measurement | None) -> str:
    """What MLflow shows as the description: how members are combined, and who they are."""
    columns: dict[str, list[float | None]] = {}
    if built.ensemble.combiner != "stacking":
        columns["weight"] = list(built.ensemble.weights)
    for split, measurement in (("val", built.validation), ("test", test)):
        if measurement is not None:
            columns[f"{split} IoU"] = [one.metrics["iou"] for one in measurement.scores[:-1]]
    return f"{_describe(built.ensemble)}\n\n{members_table(built.members, columns)}"


def _describe(ensemble: Ensemble) -> str:
    """In one line how members are combined; what is as always is left out."""
    parts = [f"combiner {ensemble.combiner}", f"temperature {ensemble.temperature:.3g}"]
    if len(set(ensemble.weights)) > 1:
        parts.append(f"weights {', '.join(f'{weight:.3g}' for weight in ensemble.weights)}")
    if ensemble.views != ("none",):
        parts.append(f"views {'+'.join(ensemble.views)}")
    if ensemble.reject:
        parts.append(f"rejects up to {ensemble.reject:g}")
    if ensemble.postprocess.active:
        parts.append(f"post-processing {json.dumps(ensemble.postprocess.to_dict())}")
    if ensemble.adaptive is not None:
        parts.append(f"adaptive rule for {ensemble.adaptive.tolerance:g} of pixels")
    return "; ".join(parts)


def _params(built: Built, options: EnsembleOptions) -> dict[str, Any]:
    ensemble = built.ensemble
    return {
        "mode": ensemble.mode,
        "combiner": ensemble.combiner,
        "selector": options.selector,
        "where": options.where,
        "pick": options.pick,
        "members": ",".join(member.model_id for member in built.members),
        "weights": ",".join(f"{weight:.4g}" for weight in ensemble.weights),
        "views": "+".join(ensemble.views),
        "temperature": ensemble.temperature,
        "threshold": ensemble.threshold,
        "reject": ensemble.reject,
        "postprocess": json.dumps(ensemble.postprocess.to_dict()) if ensemble.postprocess.active else "",
        "adaptive": "" if ensemble.adaptive is None else ensemble.adaptive.tolerance,
        "data": options.data,
    }


def _alone(built: Built, index: int) -> Engine:
    """One member as it would be served alone."""
    member = built.ensemble.members[index]
    assert isinstance(member, Member)
    single = Ensemble(
        [member],
        mode=built.ensemble.mode,
        views=built.ensemble.views,
        temperature=member.temperature,
        threshold=member.threshold,
        class_names=built.ensemble.class_names,
    )
    return Engine(single, built.engine.device, built.engine.precision)
