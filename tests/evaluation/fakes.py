"""Measurements of ensembles that never were: simulated masks and probabilities, every number counted with NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.stats import rankdata

from smp_ensemble.data.scenes import draw_scene
from smp_ensemble.evaluation.measurement import Example, Measurement, ModelMeasurement, Score
from smp_ensemble.metrics.calibration import Reliability
from smp_ensemble.metrics.diversity import Diversity
from smp_ensemble.metrics.selective import RiskCoverage
from smp_ensemble.typing import DatasetReference, Task

CLASSES = ("land", "building", "road", "vegetation", "water")
BINS, POINTS = 15, 101


@dataclass(frozen=True)
class Simulation:
    """Images, their truth, and what each model says of every pixel.

    Attributes:
        task: Multiclass or binary.
        images: `(n, H, W, 3)`.
        truth: Class ids `(n, H, W)`, 255 where ignored.
        members: Probabilities `(M, n, C, H, W)`; in binary mode C is 2, background first.
        raw: The mean before its temperature, `(n, C, H, W)`.
        ensemble: After it.
        threshold: For foreground in binary mode.
    """

    task: Task
    images: np.ndarray
    truth: np.ndarray
    members: np.ndarray
    raw: np.ndarray
    ensemble: np.ndarray
    threshold: float


def task_of(classes: int, names: tuple[str, ...] | None = None) -> Task:
    """K = 1 is binary; five classes are those of the synthetic scenes."""
    if classes == 1:
        return Task("binary", ("background", *(names or ("building",))))
    chosen = names or (CLASSES if classes == 5 else tuple(f"class {index}" for index in range(classes)))
    return Task("multiclass", chosen)


def simulate(
    *,
    members: int = 5,
    classes: int = 5,
    images: int = 12,
    size: int = 48,
    seed: int = 0,
    skill: float = 5.0,
    alone: float = 0.35,
    temperature: float = 2.0,
    names: tuple[str, ...] | None = None,
) -> Simulation:
    """Scenes, and members that blur them, err together and err alone; `members=1` is an ensemble of one."""
    rng = np.random.default_rng(seed)
    task, channels = task_of(classes, names), max(classes, 2)
    scenes = [draw_scene(seed, index, size) for index in range(images)]
    pixels = np.stack([scene.image for scene in scenes])
    if classes == 1:
        truth = np.stack([scene.building for scene in scenes]).astype(np.uint8)
    elif classes == 5:
        truth = np.stack([scene.cover for scene in scenes]).astype(np.uint8)
    else:
        fields = rng.normal(size=(images, classes, size, size)) + np.linspace(0.4, 0, classes)[:, None, None]
        truth = gaussian_filter(fields, (0, 0, size / 12, size / 12)).argmax(1).astype(np.uint8)
    known = (truth[:, None] == np.arange(channels)[:, None, None]).astype(float)

    def noise(scale: float) -> np.ndarray:
        drawn = gaussian_filter(rng.normal(size=known.shape), (0, 0, scale, scale))
        return drawn / drawn.std()

    hard = rng.uniform(0.6, 1.4, (images, 1, 1, 1))  # some images are harder than others
    shared = noise(1.2)
    logits = []
    for _ in range(members):
        seen = gaussian_filter(known, (0, 0, *[rng.uniform(0.6, 1.4)] * 2))
        strength = skill * rng.uniform(0.85, 1.05)
        logits.append(8.0 * (strength * seen + hard * (1.4 * shared + alone * noise(1.5))))
    each = _softmax(np.stack(logits), axis=2)
    raw = each.mean(0)
    cooled = raw if temperature == 1 else _softmax(np.log(raw + 1e-9) / temperature, axis=1)
    truth[:, :2, :5] = 255
    return Simulation(task, pixels, truth, each, raw, cooled, 0.45 if classes == 1 else 0.5)


def measure(
    simulation: Simulation, *, groups: tuple[str, ...] | None = None, member_names: tuple[str, ...] | None = None
) -> Measurement:
    """All that a measurement holds, from every pixel at once."""
    count, images = len(simulation.members), len(simulation.truth)
    names = member_names or tuple(
        f"m-{index * 2654435761 % 2**40:010x} (step {200 * index + 200})" for index in range(count)
    )
    ensemble = _model("ensemble" if count > 1 else names[0], simulation, simulation.ensemble)
    members = [_model(name, simulation, p) for name, p in zip(names, simulation.members, strict=True)]
    calibrated = not np.array_equal(simulation.raw, simulation.ensemble)
    return Measurement(
        task=simulation.task,
        data=DatasetReference("synthetic scenes", "5f2c9e01ab34", "synthetic", images),
        split="test",
        images=[f"scene_{index:04}.png" for index in range(images)],
        groups=groups,
        members=members if count > 1 else [],
        ensemble=ensemble,
        uncalibrated=_reliability(simulation, simulation.raw) if calibrated else None,
        diversity=_diversity(simulation) if count > 1 else None,
        uncertainty=_uncertainty(simulation),
    )


@cache
def fake_measurement(*, groups: tuple[str, ...] | None = None, **options) -> Measurement:
    """`measure(simulate(...))` of small images, made once."""
    return measure(simulate(**{"size": 32, "images": 6, **options}), groups=groups)


def fake_examples(simulation: Simulation, best: int = 2, worst: int = 2) -> list[Example]:
    """The images with the highest and the lowest IoU, best first."""
    decided = _decide(simulation, simulation.ensemble)
    ious = [np.nanmean(_iou(_counts(simulation, decided)[index])) for index in range(len(decided))]
    order = [int(index) for index in np.argsort(ious)[::-1]]
    chosen = order if best + worst >= len(order) else [*order[:best], *order[len(order) - worst :]]
    entropy = _entropy(simulation.ensemble, axis=1).astype(np.float32)
    return [
        Example(
            f"scene_{index:04}.png", simulation.images[index], simulation.truth[index],
            decided[index].astype(np.uint8), entropy[index], float(ious[index]),
        )
        for index in chosen
    ]  # fmt: skip


def without_class(measurement: Measurement, index: int) -> Measurement:
    """The same where a class is neither predicted nor true anywhere: it has no score."""
    name = measurement.task.output_names[index]

    def emptied(model: ModelMeasurement) -> ModelMeasurement:
        counts = model.counts.copy()
        counts[:, index] = 0
        metrics = {key: value for key, value in model.score.metrics.items() if key.partition("/")[2] != name}
        metrics["iou"] = float(np.nanmean(_iou(counts.sum(0)))) if counts.any() else float("nan")
        return replace(model, counts=counts, score=Score(model.score.threshold, metrics))

    members = [emptied(model) for model in measurement.members]
    return replace(measurement, members=members, ensemble=emptied(measurement.ensemble))


def _softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _decide(simulation: Simulation, p: np.ndarray) -> np.ndarray:
    return (p[:, 1] >= simulation.threshold).astype(int) if simulation.task.mode == "binary" else p.argmax(1)


def _counts(simulation: Simulation, decided: np.ndarray) -> np.ndarray:
    valid = simulation.truth != 255
    ids = [1] if simulation.task.mode == "binary" else range(simulation.task.num_outputs)
    counts = []
    for index in ids:
        true, said = valid & (simulation.truth == index), valid & (decided == index)
        counts.append([(part).sum((1, 2)) for part in (true & said, ~true & said, true & ~said)])
    return np.array(counts).transpose(2, 0, 1).astype(np.int64)


def _iou(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(-1)
    return np.where(total > 0, counts[..., 0] / np.maximum(total, 1), np.nan)


def _entropy(p: np.ndarray, axis: int) -> np.ndarray:
    return -(p * np.log(p + 1e-12)).sum(axis)


def _flat(simulation: Simulation, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `(pixels, C)` and class ids `(pixels,)` where the truth is known."""
    valid = simulation.truth != 255
    return np.moveaxis(p, 1, -1)[valid], simulation.truth[valid].astype(int)


def _reliability(simulation: Simulation, p: np.ndarray) -> Reliability:
    flat, truth = _flat(simulation, p)
    return _bins(flat.max(1), flat.argmax(1) == truth)


def _bins(confidence: np.ndarray, right: np.ndarray) -> Reliability:
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    pixels = np.bincount(place, minlength=BINS)
    share = [np.bincount(place, weights=w, minlength=BINS) for w in (confidence, right.astype(float))]
    share = [np.where(pixels > 0, part / np.maximum(pixels, 1), np.nan) for part in share]
    return Reliability(pixels.astype(np.int64), *share)


def ece_of(reliability: Reliability) -> float:
    """By hand: the mean gap, weighted by pixels."""
    gaps = np.nan_to_num(np.abs(reliability.accuracy - reliability.confidence))
    return float((gaps * reliability.pixels).sum() / reliability.pixels.sum())


def _model(name: str, simulation: Simulation, p: np.ndarray) -> ModelMeasurement:
    decided = _decide(simulation, p)
    counts = _counts(simulation, decided)
    flat, truth = _flat(simulation, p)
    right = flat.argmax(1) == truth
    chosen = flat[np.arange(len(truth)), truth]
    onehot = np.eye(flat.shape[1])[truth]
    reliability = _bins(flat.max(1), right)
    risk = _risk_coverage(flat.max(1), right)
    pooled = counts.sum(0)
    iou, dice = _iou(pooled), 2 * pooled[:, 0] / (2 * pooled[:, 0] + pooled[:, 1] + pooled[:, 2])
    metrics = {"iou": float(np.nanmean(iou)), "dice": float(np.nanmean(dice))}
    for index, label in enumerate(simulation.task.output_names):
        metrics |= {f"iou/{label}": float(iou[index]), f"dice/{label}": float(dice[index])}
    columns = range(1, 2) if simulation.task.mode == "binary" else range(flat.shape[1])
    metrics |= {
        "boundary_iou": _boundary_iou(simulation, decided),
        "ece": ece_of(reliability),
        "classwise_ece": float(np.mean([ece_of(_bins(flat[:, c], truth == c)) for c in columns])),
        "nll": float(-np.log(chosen + 1e-12).mean()),
        "brier": float(((flat - onehot) ** 2).sum(1).mean()),
        "aurc": risk.aurc,
        "error_auroc": risk.error_auroc,
    }
    if simulation.task.mode == "binary":
        metrics["iou_at_half"] = float(np.nanmean(_iou(_counts(simulation, p.argmax(1)).sum(0))))
    return ModelMeasurement(name, Score(simulation.threshold, metrics), counts, reliability, risk)


def _boundary_iou(simulation: Simulation, decided: np.ndarray) -> float:
    ids = [1] if simulation.task.mode == "binary" else range(simulation.task.num_outputs)
    valid, scores = simulation.truth != 255, []
    for index in ids:
        rims = [
            np.stack([mask & ~binary_erosion(mask, iterations=2) for mask in masks]) & valid
            for masks in (simulation.truth == index, decided == index)
        ]
        both = (rims[0] | rims[1]).sum()
        scores.append((rims[0] & rims[1]).sum() / both if both else np.nan)
    return float(np.nanmean(scores))


def _risk_coverage(confidence: np.ndarray, right: np.ndarray) -> RiskCoverage:
    wrong = ~right[np.argsort(-confidence, kind="stable")]
    risk = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    at = np.maximum(np.round(np.linspace(1 / POINTS, 1, POINTS) * len(wrong)).astype(int), 1) - 1
    ranks, errors = rankdata(-confidence), int((~right).sum())
    auroc = float("nan")
    if 0 < errors < len(right):
        auroc = float((ranks[~right].sum() - errors * (errors + 1) / 2) / errors / (len(right) - errors))
    return RiskCoverage((at + 1) / len(wrong), risk[at], float(risk.mean()), auroc)


def _diversity(simulation: Simulation) -> Diversity:
    flats = [_flat(simulation, p) for p in simulation.members]
    truth = flats[0][1]
    said = np.stack([flat.argmax(1) for flat, _ in flats])
    wrong = (said != truth).astype(float)
    onehot = np.eye(flats[0][0].shape[1])[truth]
    mean = np.mean([flat for flat, _ in flats], axis=0)
    briers = [((flat - onehot) ** 2).sum(1).mean() for flat, _ in flats]
    return Diversity(
        disagreement=(said[:, None] != said[None]).mean(-1),
        error_correlation=np.corrcoef(wrong),
        double_fault=(wrong[:, None] * wrong[None]).mean(-1),
        errors=wrong.mean(1),
        member_error=float(np.mean(briers)),
        ensemble_error=float(((mean - onehot) ** 2).sum(1).mean()),
        ambiguity=float(np.mean([((flat - mean) ** 2).sum(1).mean() for flat, _ in flats])),
    )


def _uncertainty(simulation: Simulation) -> np.ndarray:
    predictive = _entropy(simulation.ensemble, axis=1).mean((1, 2))
    within = _entropy(simulation.members, axis=2).mean((0, 2, 3))
    mutual = np.maximum(_entropy(simulation.raw, axis=1).mean((1, 2)) - within, 0)
    votes = simulation.members.argmax(2)
    counted = np.stack([(votes == index).sum(0) for index in range(simulation.members.shape[2])])
    variation = (1 - counted.max(0) / len(votes)).mean((1, 2))
    return np.stack([predictive, mutual, variation], axis=1)
