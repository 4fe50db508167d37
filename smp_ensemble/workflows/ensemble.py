"""`ensemble`: tracked snapshots to one registered model, scored against its best member."""

from __future__ import annotations

import json
import logging
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
from smp_ensemble.tracking.pages import log_report
from smp_ensemble.tracking.runs import TrackedRun, tracked_run
from smp_ensemble.tracking.search import first_experiment
from smp_ensemble.tracking.versions import describe_version
from smp_ensemble.workflows.assembling import Built, assemble
from smp_ensemble.workflows.combining import combination_of
from smp_ensemble.workflows.ensemble_result import EnsembleResult, labels_of
from smp_ensemble.workflows.promotion import carry_out, check_champion, judge, rule_of
from smp_ensemble.workflows.reporting import log_overlays
from smp_ensemble.workflows.selecting import choose_members, log_selection, selecting_of
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.options import EnsembleOptions

logger = logging.getLogger(__name__)


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
        uri, run.run_id, registered, alias, built.members, built.ensemble, built.validation, test, promotion,
        chosen.numbers,
    )  # fmt: skip


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
