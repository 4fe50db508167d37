"""`evaluate`: any model of ours, scored on a split of any data it fits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.payload import decide
from smp_ensemble.precision import choose_device
from smp_ensemble.tracking import names
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.tracking.report import draw_overlay_sheet, truth_for_overlay
from smp_ensemble.tracking.runs import tracked_run
from smp_ensemble.training.previews import preview_indices
from smp_ensemble.workflows.guards import check_fits, check_leaks, task_of
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.scoring import Score, score
from smp_ensemble.workflows.train import load_splits

if TYPE_CHECKING:
    from smp_ensemble.workflows.options import EvaluateOptions


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and of each of its members.

    Attributes:
        model: Its address.
        run_id: The run that keeps the scores.
        split: Which split.
        scores: Of each member and, last, of the model, all at the model's own threshold.
    """

    model: str
    run_id: str
    split: str
    scores: list[Score]

    def report(self) -> Report:
        """The table of scores."""
        members = len(self.scores) - 1
        labels = [f"member {index}" for index in range(members)] if members > 1 else []
        shown = [*self.scores[:members], self.scores[-1]] if members > 1 else self.scores[-1:]
        rows = [
            {"model": label, f"{self.split} IoU": found.metrics["iou"], "Dice": found.metrics["dice"],
             "ECE": found.metrics["ece"], "NLL": found.metrics["nll"]}
            for label, found in zip([*labels, self.model], shown, strict=True)
        ]  # fmt: skip
        values = {
            "model": self.model,
            "run_id": self.run_id,
            "split": self.split,
            "threshold": self.scores[-1].threshold,
            "metrics": self.scores[-1].metrics,
            "members": [found.metrics for found in self.scores[:-1]],
        }
        return Report(values, rows, [f"run {self.run_id}"])


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Scores a model and leaves metrics and overlays in a run of their own.

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
    engine = Engine(loaded, choose_device(options.accelerator), options.precision, options.passes)
    thresholds = [loaded.threshold] * (len(members) + 1)
    scores = score(engine, data, batch_size=options.batch_size, thresholds=thresholds, label=options.split)
    with tracked_run(names.EVALUATION, experiment=options.experiment) as run:
        run.log_params(
            {
                "model": options.model,
                "data": options.data,
                "split": options.split,
                "fold": options.fold,
                "passes": options.passes,
            }
        )
        reference = data.reference()
        run.log_dataset(reference, options.split)
        prefix = options.split.replace("-", "_")
        run.log_metrics({f"{prefix}_{name}": value for name, value in scores[-1].metrics.items()}, dataset=reference)
        pairs = [data.read(index) for index in preview_indices(data)]
        images_shown = [image for image, _ in pairs]
        masks = [decide(loaded, probabilities) for probabilities in engine.predict(images_shown)]
        truths = [truth_for_overlay(mask, data.task) for _, mask in pairs]
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "overlays.png"
            draw_overlay_sheet(images_shown, {"ground truth": truths, "prediction": masks}, data.task, path)
            run.log_file(path)
    return Evaluation(options.model, run.run_id, options.split, scores)
