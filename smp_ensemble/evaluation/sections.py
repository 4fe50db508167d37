"""The sections of the page: tables, figures, what they say in a sentence, and how to read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smp_ensemble.evaluation import reading
from smp_ensemble.evaluation.drawing import number, percent
from smp_ensemble.evaluation.findings import LEVEL, image_ious
from smp_ensemble.evaluation.markup import Cell, Html, Picture, element, picture, section, table
from smp_ensemble.evaluation.summary import calibration_sentence, most_uncertain, p_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.evaluation.findings import Findings
    from smp_ensemble.evaluation.measurement import Measurement, ModelMeasurement

    Figures = Mapping[str, Picture]

COLUMNS = {
    "iou": ("IoU", 1), "dice": ("Dice", 1), "boundary_iou": ("Boundary IoU", 1), "ece": ("ECE", -1),
    "classwise_ece": ("Classwise ECE", -1), "nll": ("NLL", -1), "brier": ("Brier", -1), "aurc": ("AURC", -1),
    "error_auroc": ("Error AUROC", 1), "coverage": ("Coverage", 0),
}  # fmt: skip
"""Heading of each metric, and whether more (1) or less (-1) is better; 0: neither."""

_ARROWS = {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}
_LEVEL = f"{100 * LEVEL:.0f} %"


def models(measurement: Measurement, findings: Findings, figures: Figures) -> Html:
    """All models by all metrics, and the paired differences."""
    parts: list[str] = [_models_table(measurement)]
    how = f"{reading.SCORES} {reading.MULTILABEL}" if measurement.task.mode == "multilabel" else reading.SCORES
    if not measurement.members:
        return section("models", "Scores", *parts, how=how)
    rows = [
        [f"{index}. {member.name}", number(found.estimate, signed=True), _range(found.low, found.high, signed=True),
         p_text(found.p_value).removeprefix("p = ").removeprefix("p ")]
        for index, (member, found) in enumerate(zip(measurement.members, findings.differences, strict=True), 1)
    ]  # fmt: skip
    headings = ["Ensemble minus", "IoU difference", f"{_LEVEL} interval", "p-value"]
    parts += _picture(figures, "differences")
    parts.append(table(headings, rows, caption="IoU of the ensemble minus IoU of each member, on the same images"))
    least = f"{findings.resamples} resamples give no p-value below {2 / (findings.resamples + 1):.3f}."
    how = f"{how} {reading.DIFFERENCES} {least}"
    return section("models", "The ensemble and its members", *parts, how=how)


def classes(measurement: Measurement, findings: Findings, figures: Figures) -> Html:
    """Each class with its interval, and what members reach."""
    counts, metrics = measurement.ensemble.counts, measurement.ensemble.score.metrics
    headings = ["Class", "Images with it", "Pixels", "IoU\u00a0↑", f"{_LEVEL} interval", "Dice\u00a0↑"]
    outlined = any(name.startswith("boundary_iou/") for name in metrics)
    headings += ["Boundary IoU\u00a0↑"] if outlined else []
    headings += ["Members' IoU", "Best member's IoU"] if measurement.members else []
    rows = []
    for index, name in enumerate(measurement.task.output_names):
        there, found = counts[:, index, 0] + counts[:, index, 2], findings.classes[-1][index]
        pixels = f"{int(there.sum()):,}".replace(",", "\u202f")
        row = [name, str(int((there > 0).sum())), pixels, number(found.estimate),
               _range(found.low, found.high), number(metrics.get(f"dice/{name}", math.nan))]  # fmt: skip
        row += [number(metrics.get(f"boundary_iou/{name}", math.nan))] if outlined else []
        rows.append(row + _members_of(findings, [each[index].estimate for each in findings.classes[:-1]]))
    mean = None
    if len(rows) > 1:
        mean, found = len(rows), findings.means[-1]
        row = ["mean over classes", str(len(counts)), "", number(found.estimate), _range(found.low, found.high),
               number(metrics["dice"])]  # fmt: skip
        row += [number(metrics["boundary_iou"])] if outlined else []
        rows.append(row + _members_of(findings, [each.estimate for each in findings.means[:-1]]))
    caption = "IoU of each class"
    if findings.units > 1:
        caption += f", with {_LEVEL} intervals from {findings.resamples} resamples of {findings.units} {findings.what}"
    how = f"{reading.CLASSES} {reading.BEST_MEMBER}" if measurement.members else reading.CLASSES
    parts = [*_picture(figures, "scores"), table(headings, rows, caption=caption, strong=mean)]
    return section("classes", "Classes", *parts, how=how)


def calibration(measurement: Measurement, figures: Figures) -> Html:
    """Whether the ensemble is as right as it says."""
    parts = [element("p", calibration_sentence(measurement)), *_picture(figures, "reliability")]
    return section("calibration", "Calibration", *parts, how=reading.CALIBRATION)


def uncertainty(measurement: Measurement, figures: Figures) -> Html:
    """Whether uncertainty finds errors, and the images where it is greatest."""
    metrics = measurement.ensemble.score.metrics
    auroc = metrics.get("error_auroc", math.nan)
    said = "Uncertainty cannot be compared with errors: there are none, or nothing else."
    if not math.isnan(auroc):
        said = f"A wrong pixel is more uncertain than a right one in {percent(auroc)} of pairs"
        said += f" (error AUROC {number(auroc)})."
    several = bool(measurement.members)
    headings = [
        "Image",
        "Entropy (nats)",
        *(["Mutual information (nats)", "Variation ratio"] if several else []),
        "IoU",
    ]
    ious = image_ious(measurement.ensemble.counts)
    shown = measurement.uncertainty[:, : 3 if several else 1]
    rows = [
        [measurement.images[index], *(number(float(value)) for value in shown[index]), number(float(ious[index]), 3)]
        for index in most_uncertain(measurement)
    ]
    caption = f"The {len(rows)} most uncertain of {len(measurement.images)} images, by mean predictive entropy"
    if len(rows) == len(measurement.images):
        caption = "Images by mean predictive entropy, the most uncertain first"
    how = (
        f"{reading.ENTROPY} {reading.MEMBERS_APART} {reading.CURVES}"
        if several
        else f"{reading.ENTROPY} {reading.CURVES}"
    )
    parts = [element("p", said), *_picture(figures, "risk_coverage"), table(headings, rows, caption=caption)]
    return section("uncertainty", "Uncertainty", *parts, how=how)


def diversity(measurement: Measurement, figures: Figures) -> Html | None:
    """How members differ and what that gains; None for an ensemble of one."""
    found = measurement.diversity
    if found is None:
        return None
    share = found.ambiguity / found.member_error if found.member_error > 0 else math.nan
    said = (
        f"The Brier score of the members' weighted mean is {number(found.ensemble_error)}: the members' average of "
        f"{number(found.member_error)} minus their ambiguity of {number(found.ambiguity)}, so that their differences "
        f"take away {percent(share)} of the error. This is before the ensemble's temperature, and before any combiner "
        "other than the mean."
    )
    return section("diversity", "Diversity", element("p", said), *_picture(figures, "diversity"), how=reading.DIVERSITY)


def examples(figures: Figures) -> Html | None:
    """Single images; None without any."""
    if "examples" not in figures:
        return None
    return section("examples", "Examples", *_picture(figures, "examples"), how=reading.EXAMPLES)


def _models_table(measurement: Measurement) -> Html:
    shown = shown_metrics(measurement.models)
    values = {name: [model.score.metrics.get(name, math.nan) for model in measurement.models] for name in shown}
    best = {name: _best(values[name], COLUMNS[name][1]) for name in shown}
    rows: list[Sequence[Cell | str]] = []
    for index, model in enumerate(measurement.models):
        name = model.name if index == len(measurement.members) else f"{index + 1}. {model.name}"
        cells = [Cell(number(values[metric][index]), values[metric][index] == best[metric]) for metric in shown]
        rows.append([name, *cells])
    headings = ["Model", *(COLUMNS[name][0] + _ARROWS[COLUMNS[name][1]] for name in shown)]
    caption = "All metrics. ↑: more is better, ↓: less is better."
    if measurement.members:
        caption += " Shaded and bold: the best of its column."
    return table(headings, rows, caption=caption, strong=len(rows) - 1 if measurement.members else None)


def shown_metrics(models: Sequence[ModelMeasurement]) -> list[str]:
    """The metrics that any of the models has; the share of decided pixels only where one rejects some."""
    shown = [name for name in COLUMNS if any(name in model.score.metrics for model in models)]
    rejects = any(model.score.metrics.get("coverage", 1.0) < 1 for model in models)
    return shown if rejects else [name for name in shown if name != "coverage"]


def _best(values: Sequence[float], direction: int) -> float | None:
    """The best of several models; None where there is nothing to compare."""
    found = [value for value in values if not math.isnan(value)]
    if direction == 0 or len(values) < 2 or not found:
        return None
    return max(found) if direction > 0 else min(found)


def _members_of(findings: Findings, ious: Sequence[float]) -> list[str]:
    if not ious:
        return []
    known = [iou for iou in ious if not math.isnan(iou)]
    best = math.nan if findings.best is None else ious[findings.best]
    return [_range(min(known), max(known)) if known else "–", number(best)]


def _range(low: float, high: float, *, signed: bool = False) -> str:
    if math.isnan(low) or math.isnan(high):
        return "–"
    return f"{number(low, 3, signed=signed)} to {number(high, 3, signed=signed)}"


def _picture(figures: Figures, name: str) -> list[Html]:
    return [picture(figures[name], f"{name}.png")] if name in figures else []
