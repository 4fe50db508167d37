"""What an ensemble learns from validation data: combiner, temperatures, thresholds, and post-processing, in this order.

Each step sees what the steps before it decided, and reads the members' predictions again: see `predictions`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smp_ensemble.ensembling.combiners import Vote
from smp_ensemble.ensembling.temperature import TemperatureFit, apply_temperature
from smp_ensemble.evaluation.postprocess_search import Tuned, tune
from smp_ensemble.metrics.threshold import ThresholdCurve
from smp_ensemble.typing import IGNORE_INDEX, CombinerContext, PixelSample

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.evaluation.predictions import Predictions

SAMPLE_PIXELS = 400_000
SAMPLE_VALUES = 30_000_000
"""Most pixels, and most probabilities, that weights and stackers are fitted on: drawn evenly from all valid pixels."""

VOTE_STEPS = 32
VOTES_AT_ONCE = 8
"""Thresholds that voters are tried with, and how many of them share a pass."""

logger = logging.getLogger(__name__)


def sample_pixels(predictions: Predictions) -> PixelSample:
    """All members' probabilities at valid pixels; at a part of them, drawn by a fixed seed, where there are many."""
    ensemble, data = predictions.ensemble, predictions.data
    members, outputs, mode = len(ensemble.members), data.task.num_outputs, data.task.mode
    limit = min(SAMPLE_PIXELS, SAMPLE_VALUES // (members * outputs))
    share = min(1.0, limit / max(1, sum(scan.pixels for scan in data.scans)))
    found, truths = [], []
    for batch in predictions:
        valid = batch.known_pixels()
        if share < 1:
            generator = torch.Generator().manual_seed(batch.number)
            valid &= torch.rand(valid.shape, generator=generator) < share
        found.append(torch.stack([_at(one, valid) for one in predictions.of_members(batch)], dim=1))
        truths.append(_at(batch.truth, valid) if mode == "multilabel" else batch.truth[valid])
    return PixelSample(torch.cat(found), torch.cat(truths), mode)


def _at(values: Tensor, where: Tensor) -> Tensor:
    """Values `(N, K, H, W)` at pixels `(N, H, W)`: `(P, K)`."""
    return values.permute(0, 2, 3, 1)[where].clone()


def fit_temperatures(predictions: Predictions) -> list[float]:
    """Of each member alone and, last, of the ensemble; 1 for one that combines votes. All share their passes."""
    ensemble, mode = predictions.ensemble, predictions.ensemble.mode
    fits = [TemperatureFit(mode) for _ in range(len(ensemble.members) + 1)]
    if ensemble.votes:
        fits[-1].done = True
    while not all(fit.done for fit in fits):
        for batch in predictions:
            stream = _fitted(predictions.of_members(batch), fits, batch.truth)
            if fits[-1].done:
                for _ in stream:
                    pass
            else:
                fits[-1].update(ensemble.pool(stream), batch.truth)
        for fit in fits:
            if not fit.done:
                fit.step()
    return [fit.temperature for fit in fits]


def _fitted(probabilities: Iterator[Tensor], fits: list[TemperatureFit], truth: Tensor) -> Iterator[Tensor]:
    for fit, one in zip(fits, probabilities, strict=False):
        if not fit.done:
            fit.update(one, truth)
        yield one


def tune_thresholds(predictions: Predictions, temperatures: list[float]) -> list[float]:
    """The thresholds with the best IoU, of each member alone and, last, of the ensemble; binary mode only.

    Args:
        predictions: Of validation data.
        temperatures: As `fit_temperatures` gives them: what is cut is what is calibrated.

    Returns:
        0.5 where the data holds no foreground.
    """
    ensemble, mode = predictions.ensemble, predictions.ensemble.mode
    curves = [ThresholdCurve() for _ in temperatures]
    for batch in predictions:
        stream = _curved(predictions.of_members(batch), curves, temperatures, batch.truth)
        pooled = apply_temperature(ensemble.pool(stream), temperatures[-1], mode)
        curves[-1].update(pooled, batch.truth)
    if not float(curves[0].iou()[0]) > 0:  # threshold 0 finds whatever there is to find
        logger.warning("the data holds no foreground to tune a threshold on: 0.5 stands")
        return [0.5] * len(curves)
    thresholds = [curve.best()[0] for curve in curves]
    if ensemble.votes:
        thresholds[-1] = _tune_voters(predictions)
    return thresholds


def _curved(
    probabilities: Iterator[Tensor], curves: list[ThresholdCurve], temperatures: list[float], truth: Tensor
) -> Iterator[Tensor]:
    for curve, temperature, one in zip(curves, temperatures, probabilities, strict=False):
        curve.update(apply_temperature(one, temperature, "binary"), truth)
        yield one


def _tune_voters(predictions: Predictions) -> float:
    """The threshold for all members with which their vote has the best IoU; the one nearest to 0.5 among equals."""
    ensemble = predictions.ensemble
    steps = sorted(range(1, VOTE_STEPS), key=lambda step: (abs(2 * step - VOTE_STEPS), step))
    scores: dict[int, float] = {}
    for at in range(0, len(steps), VOTES_AT_ONCE):
        chunk = steps[at : at + VOTES_AT_ONCE]
        counts = {step: np.zeros(2) for step in chunk}
        for batch in predictions:
            votes = {step: Vote(CombinerContext("binary", step / VOTE_STEPS)) for step in chunk}
            for weight, one in zip(ensemble.weights, predictions.of_members(batch), strict=True):
                for vote in votes.values():
                    vote.update(one, weight / max(ensemble.weights))
            true, valid = batch.truth == 1, batch.truth != IGNORE_INDEX
            for step, vote in votes.items():
                found = vote.compute()[:, 0] >= 0.5
                counts[step] += [int((found & true).sum()), int(((found | true) & valid).sum())]
        scores |= {step: hits / max(union, 1) for step, (hits, union) in counts.items()}
    return max(steps, key=lambda step: scores[step]) / VOTE_STEPS


def tune_postprocessing(predictions: Predictions, candidates: dict[str, Any] | None = None) -> Tuned:
    """Post-processing that raises the IoU on validation data: see `evaluation.postprocess_search.tune`.

    The ensemble's temperature and threshold are set before.
    """
    ensemble, task = predictions.ensemble, predictions.data.task

    def samples() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[Any]]]:
        for batch in predictions:
            combined = ensemble.combine(predictions.of_members(batch)).numpy()
            yield from zip(batch.images, combined, batch.truth.numpy(), strict=True)

    def decide(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        mask: npt.NDArray[np.uint8] = ensemble.decide(torch.from_numpy(probabilities)[None])[0].numpy()
        return mask

    return tune(samples, mode=task.mode, num_classes=task.num_outputs, decide=decide, candidates=candidates)
