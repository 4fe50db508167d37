"""`evaluate`: any model of ours, scored on a split of any data it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.member import Member
from smp_ensemble.evaluation.guards import check_leaks, task_of
from smp_ensemble.evaluation.measuring import measure_all, member_names
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.tracking.lineage import verify_lineage
from smp_ensemble.tracking.pages import REPORT_FOLDER, log_report
from smp_ensemble.tracking.runs import tracked_run
from smp_ensemble.workflows.guards import check_fits
from smp_ensemble.workflows.reporting import log_overlays
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.workflows.options import EvaluateOptions


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and of each of its members.

    Attributes:
        model: Its address.
        run_id: The run that keeps the scores.
        split: Which split.
        measurement: Of it and its members; members with the threshold and temperature that they would have alone.
        lineage: What became of the snapshots that it was made from, if one of them is gone or altered.
    """

    model: str
    run_id: str
    split: str
    measurement: Measurement
    lineage: Sequence[str] = ()

    def report(self) -> Report:
        """The table of scores."""
        found = self.measurement
        rows = [
            {
                "model": self.model if one is found.ensemble else one.name,
                f"{self.split} IoU": one.score.metrics["iou"],
                "Dice": one.score.metrics["dice"],
                "boundary IoU": one.score.metrics["boundary_iou"],
                "ECE": one.score.metrics["ece"],
                "NLL": one.score.metrics["nll"],
                "AURC": one.score.metrics["aurc"],
            }
            for one in found.models
        ]
        if found.ensemble.score.metrics["coverage"] < 1:
            for row, one in zip(rows, found.models, strict=True):
                row["coverage"] = one.score.metrics["coverage"]
        values = {
            "model": self.model,
            "run_id": self.run_id,
            "split": self.split,
            "threshold": found.ensemble.score.threshold,
            "metrics": found.ensemble.score.metrics,
            "members": [one.score.metrics for one in found.members],
            "adaptive": found.adaptive.to_dict() if found.adaptive is not None else None,
            "lineage": list(self.lineage),
        }
        notes = [f"report: {REPORT_FOLDER}/report.html in run {self.run_id}"]
        return Report(values, rows, [*notes, *(f"note: {problem}" for problem in self.lineage)])


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Scores a model and leaves metrics, a report and overlays in a run of their own.

    Raises:
        ConfigError: No such model or split, or several passes of a model without dropout.
        LeakError: A member was trained on images of this split.
        NetworkError: The model does not fit the data.
        IntegrityError: A file of the model is missing or changed.
    """
    loaded = load_model(options.model)
    members = [member for member in loaded.members if isinstance(member, Member)]
    data = load_splits(options).split(options.split)
    check_fits(options.model, task_of(loaded), data.task)
    check_leaks(members, data, options.split)
    engine = Engine(loaded, choose_device(options.accelerator), options.precision, options.passes, options.views)
    predictions = Predictions(engine, data, batch_size=options.batch_size, label=options.split)
    measurement = measure_all(predictions, split=options.split, names=member_names(loaded))
    with tracked_run(names.EVALUATION, experiment=options.experiment) as run:
        run.log_params(
            {
                "model": options.model,
                "data": options.data,
                "split": options.split,
                "fold": options.fold,
                "views": "+".join(engine.views),
                "passes": options.passes,
            }
        )
        reference = data.reference()
        run.log_dataset(reference, options.split)
        prefix = options.split.replace("-", "_")
        own = {f"{prefix}_{name}": value for name, value in measurement.ensemble.score.metrics.items()}
        if measurement.adaptive is not None:
            own |= measurement.adaptive.metrics(prefix)
        run.log_metrics(own, dataset=reference)
        log_overlays(run, data, {"prediction": engine})
        log_report(run, measurement, data, engine, title=f"Evaluation of {options.model}")
    return Evaluation(options.model, run.run_id, options.split, measurement, verify_lineage(options.model))
