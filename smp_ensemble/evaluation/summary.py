"""What a measurement comes to: sentences for people, plain values for machines."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.evaluation.drawing import interval_text, number, percent
from smp_ensemble.evaluation.findings import LEVEL, ece, find, image_ious

if TYPE_CHECKING:
    from smp_ensemble.evaluation.findings import Findings
    from smp_ensemble.evaluation.measurement import Measurement, ModelMeasurement
    from smp_ensemble.metrics.bootstrap import Interval

MOST_UNCERTAIN = 10
"""How many images are named."""

_LEVEL = f"{100 * LEVEL:.0f} %"


def headline(measurement: Measurement, findings: Findings) -> list[str]:
    """What is to be said first: the score with its interval; how the ensemble compares with its best member."""
    ensemble = findings.means[-1]
    if math.isnan(ensemble.estimate):
        return ["IoU is not defined here: no class is present, in the truth or in a prediction."]
    who = "The ensemble" if measurement.members else "The model"
    interval = f"{_LEVEL} interval {number(ensemble.low, 3)} to {number(ensemble.high, 3)}"
    if math.isnan(ensemble.low):
        interval = f"no interval: one {findings.what.removesuffix('s')} has nothing to be resampled"
    sentences = [f"{who} reaches IoU {number(ensemble.estimate, 3)} ({interval})."]
    return sentences if findings.best is None else [*sentences, *_against_best(measurement, findings, findings.best)]


def _against_best(measurement: Measurement, findings: Findings, best: int) -> list[str]:
    found, name = findings.differences[best], measurement.members[best].name
    by = number(abs(found.estimate), 3)
    if found.low > 0:
        verdict = f"It is better than its best member, {name}, by {by}"
    elif found.high < 0:
        verdict = f"It is worse than its best member, {name}, by {by}"
    else:
        side = "ahead of" if found.estimate > 0 else "behind" if found.estimate < 0 else "level with"
        verdict = f"It cannot be told from its best member, {name}: it is {side} it by {by}"
    if math.isnan(found.p_value):
        verdict = (
            f"Its best member, {name}, differs by {number(found.estimate, 3, signed=True)} (ensemble minus member)"
        )
        sentences = [f"{verdict}; with so few {findings.what} this says nothing about other images."]
    else:
        sentences = [f"{verdict} (paired difference {interval_text(found, signed=True)}, {p_text(found.p_value)})."]
    sentences.append(
        "That member was chosen as best on this very data, which flatters it: before the data were seen, nobody knew "
        "which one it would be."
    )
    if not math.isnan(found.p_value):
        wins, losses, total = findings.wins(), findings.losses(), len(measurement.members)
        sentences.append(f"Of {total} members the ensemble is better than {wins} and worse than {losses}.")
    return sentences


def p_text(p_value: float) -> str:
    """A p-value for people.

    Example:
        >>> p_text(0.0321), p_text(0.0002), p_text(float("nan"))
        ('p = 0.032', 'p < 0.001', 'no p-value')
    """
    if math.isnan(p_value):
        return "no p-value"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def calibration_sentence(measurement: Measurement) -> str:
    """Whether the ensemble says more than it keeps, and what the temperature did."""
    found, before = measurement.ensemble.reliability, measurement.uncalibrated
    total = int(found.pixels.sum())
    if total == 0:
        return "There is no pixel to be right or wrong about."
    sure, right = (float(np.nansum(found.pixels * part)) / total for part in (found.confidence, found.accuracy))
    word = "over-confident" if sure > right else "under-confident"
    said = f"On average it is {percent(sure)} sure and {percent(right)} right: {word}."
    if abs(sure - right) < 0.005:
        said = f"On average it is {percent(sure)} sure and {percent(right)} right, which agrees."
    if before is None:
        return f"{said} Its calibration error (ECE) is {number(ece(found))}; it has no temperature."
    verb = "lowers" if ece(found) < ece(before) else "raises"
    return (
        f"{said} The temperature {verb} the calibration error (ECE) from {number(ece(before))} to {number(ece(found))}."
    )


def most_uncertain(measurement: Measurement) -> list[int]:
    """The images with the highest mean predictive entropy, highest first."""
    entropy = np.nan_to_num(measurement.uncertainty[:, 0], nan=-1.0)
    return [int(index) for index in np.argsort(-entropy, kind="stable")[:MOST_UNCERTAIN]]


def versions() -> dict[str, str]:
    """What computed all this."""
    return {"python": platform.python_version(), "torch": _version("torch"), "smp_ensemble": _version("smp-ensemble")}


def summary_json(measurement: Measurement, findings: Findings | None = None) -> dict[str, Any]:
    """All numbers of the page but the curves, as plain values; null where there is no number.

    Args:
        measurement: What was measured.
        findings: What follows from it; worked out if not given.
    """
    findings = find(measurement) if findings is None else findings
    task, data, diversity = measurement.task, measurement.data, measurement.diversity
    names = [member.name for member in measurement.members]
    ious = image_ious(measurement.ensemble.counts)
    values = {
        "data": {"name": data.name, "digest": data.digest, "split": measurement.split},
        "images": len(measurement.images),
        "groups": findings.units if findings.grouped else None,
        "task": {"mode": task.mode, "class_names": list(task.class_names)},
        "headline": headline(measurement, findings),
        "ensemble": _model(measurement, findings, len(names)),
        "members": [_model(measurement, findings, index) for index in range(len(names))],
        "best_member": None if findings.best is None else names[findings.best],
        "differences": [
            {"member": name, **vars(found)} for name, found in zip(names, findings.differences, strict=True)
        ],
        "uncalibrated_ece": None if measurement.uncalibrated is None else ece(measurement.uncalibrated),
        "diversity": None if diversity is None else dict(vars(diversity)),
        "adaptive": None if measurement.adaptive is None else measurement.adaptive.to_dict(),
        "most_uncertain": [
            {
                "image": measurement.images[index],
                **dict(
                    zip(
                        ("entropy", "mutual_information", "variation_ratio"),
                        measurement.uncertainty[index],
                        strict=True,
                    )
                ),
                "iou": ious[index],
            }
            for index in most_uncertain(measurement)
        ],
        "bootstrap": {"level": LEVEL, "resamples": findings.resamples, "units": findings.units, "unit": findings.what},
        "versions": versions(),
    }
    plain: dict[str, Any] = _plain(values)
    return plain


def _model(measurement: Measurement, findings: Findings, index: int) -> dict[str, Any]:
    model: ModelMeasurement = measurement.models[index]
    classes: dict[str, Interval] = dict(zip(measurement.task.output_names, findings.classes[index], strict=True))
    return {
        "name": model.name,
        "threshold": model.score.threshold,
        "metrics": dict(model.score.metrics),
        "iou": dict(vars(findings.means[index])),
        "classes": {name: dict(vars(interval)) for name, interval in classes.items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
