"""From tracked snapshots to an ensemble in memory: load, verify, guard, combine, and fit on validation data."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smp_ensemble.ensembling.combiners import combiner_class
from smp_ensemble.ensembling.cross_fitting import PARTS
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.fitting import fit_weights
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.postprocessing import PostProcessing
from smp_ensemble.evaluation.adaptive_fitting import fit_adaptive
from smp_ensemble.evaluation.fitting import fit_temperatures, sample_pixels, tune_postprocessing, tune_thresholds
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device
from smp_ensemble.typing import FittedCombiner
from smp_ensemble.workflows.combining import AUTO, Combination
from smp_ensemble.workflows.loading import load_members
from smp_ensemble.workflows.selecting import MAX_CANDIDATES, Selecting, choose_members

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.typing import Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """An ensemble with where its members came from.

    Attributes:
        ensemble: With all that was fitted on validation data.
        members: The tracked snapshots, in the members' order.
        engine: Runs it.
        validation: What it and its members score on validation data.
    """

    ensemble: Ensemble
    members: list[Snapshot]
    engine: Engine
    validation: Measurement


def assemble(
    members: Sequence[Snapshot],
    splits: DataSplits,
    combination: Combination,
    *,
    names: Sequence[str] = (),
    batch_size: int = 8,
    precision: str = "auto",
    accelerator: str = "auto",
) -> Built:
    """Loads and verifies members, guards against leaks, and fits what combines them on validation data.

    In this order: weights or a stacker, temperatures, thresholds, post-processing, the adaptive rule. Members predict
    once; their predictions wait in a temporary folder. A member whose fitted weight is 0 is left out: it would only
    cost time.

    Args:
        members: Tracked snapshots.
        splits: `val` is what is fitted on; `test` must be unseen too.
        combination: How to combine.
        names: Of the members, for people.
        batch_size: Images at once.
        precision: Lightning's words, or `auto`.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        ConfigError: As many weights as members are expected, or post-processing means nothing in this mode.
        LeakError: A member was trained on validation or test images.
        NetworkError: Members do not fit each other or the data.
        IntegrityError: A file of a member is missing or changed.
    """
    combination.check_mode(splits.task.mode)
    if isinstance(combination.weights, list | tuple) and len(combination.weights) != len(members):
        raise ConfigError(
            f"expected one weight for each of {len(members)} members, got {len(combination.weights)}: "
            f"{', '.join(f'{weight:g}' for weight in combination.weights)}"
        )
    loaded = load_members(members, splits)
    task = splits.task
    plain = Ensemble(loaded, mode=task.mode, views=combination.views, class_names=task.class_names)
    engine = Engine(plain, choose_device(accelerator), precision)
    labels = list(names) or [member.model_id for member in members]
    with tempfile.TemporaryDirectory() as folder:
        predictions = Predictions(engine, splits.val, batch_size=batch_size, folder=Path(folder), label="validation")
        kept, predictions = fit_ensemble(predictions, combination, labels)
        validation = measure_all(predictions, split="val", names=[labels[index] for index in kept])
    return Built(predictions.ensemble, [members[index] for index in kept], predictions.engine, validation)


def fit_ensemble(
    predictions: Predictions, combination: Combination, labels: Sequence[str]
) -> tuple[list[int], Predictions]:
    """Fits all that a combination asks for on what members predict, and gives the members their own threshold.

    Args:
        predictions: Of all members, in the combination's views, on validation data.
        combination: What to fit.
        labels: Of the members, for people.

    Returns:
        The indices of the members that stayed, in the ensemble's order, and the same predictions with the fitted
        ensemble.
    """
    members = [member for member in predictions.ensemble.members if isinstance(member, Member)]
    kept, weights = list(range(len(members))), combination.weights
    if combination.wants_fitted_weights:
        fitted = fit_weights(sample_pixels(predictions))
        kept = [index for index in kept if fitted[index] > 0]
        weights = [fitted[index] for index in kept]
        if len(kept) < len(members):
            left_out = ", ".join(label for index, label in enumerate(labels) if index not in kept)
            logger.info("left out, because the fitted weight is 0: %s", left_out)
    if combination.adaptive is not None and isinstance(weights, list | tuple):
        # The heaviest say most about the whole, so they run first; among equals the selection's order stands.
        pairs = sorted(zip(kept, weights, strict=True), key=lambda pair: -pair[1])
        kept, weights = [index for index, _ in pairs], [weight for _, weight in pairs]
    if kept != list(range(len(members))):
        predictions = predictions.of_some(kept)
    combiner = combiner_class(combination.combiner)
    task = predictions.data.task
    ensemble = Ensemble(
        [members[index] for index in kept],
        mode=task.mode,
        combiner=combination.combiner,
        weights=weights if not isinstance(weights, str) else None,
        views=combination.views,
        reject=combination.reject,
        state=combiner.fit(sample_pixels(predictions)) if isinstance(combiner, FittedCombiner) else None,
        class_names=task.class_names,
    )
    predictions = predictions.combined_by(ensemble)
    _calibrate(predictions, [members[index] for index in kept], combination)
    if combination.postprocess == AUTO:
        ensemble.postprocess = tune_postprocessing(predictions).settings
    else:
        ensemble.postprocess = combination.postprocess
    if combination.adaptive is not None:
        ensemble.adaptive = fit_adaptive(predictions, combination.adaptive)
    return kept, predictions


def _calibrate(predictions: Predictions, members: Sequence[Member], combination: Combination) -> None:
    """Temperatures, then thresholds: of each member alone, and of the ensemble."""
    ensemble = predictions.ensemble
    temperatures = [1.0] * (len(members) + 1)
    if combination.calibrate == "temperature":
        temperatures = fit_temperatures(predictions)
    ensemble.temperature = temperatures[-1]
    thresholds = [0.5] * len(temperatures)
    if ensemble.mode == "binary":
        thresholds = tune_thresholds(predictions, temperatures)
    ensemble.threshold = thresholds[-1]
    for member, temperature, threshold in zip(members, temperatures, thresholds, strict=False):
        member.temperature, member.threshold = temperature, threshold


def build_ensemble(
    snapshots: Sequence[Snapshot],
    *,
    data: DataSplits,
    selector: str = "top-k",
    max_members: int = 5,
    max_candidates: int = MAX_CANDIDATES,
    metric: str = "val_iou",
    cross_fit: int = PARTS,
    combiner: str = "mean",
    weights: Sequence[float] | Literal["fit"] | None = None,
    reject: float | None = None,
    views: str | Sequence[str] = "none",
    calibrate: str = "temperature",
    postprocess: PostProcessing | Literal["auto"] | None = None,
    adaptive: float | None = None,
    precision: str = "auto",
) -> Ensemble:
    """Selects among tracked snapshots and combines them; what is fitted is fitted on `data.val`.

    Args:
        snapshots: Candidates, best first, as `search_snapshots` gives them.
        data: Its validation split tunes; no member may have been trained on its validation or test images.
        selector: Name in the entry-point group `smp_ensemble.selectors`.
        max_members: At most so many.
        max_candidates: So many snapshots, the first, are looked at by a selector that needs predictions.
        metric: What such a selector makes best: `val_iou`, `val_dice` or `val_nll`.
        cross_fit: What such a selector chooses is scored, in the log, on images that had no say: validation data in so
            many parts, each judged by what is chosen on the others; 0: not.
        combiner: Name in the entry-point group `smp_ensemble.combiners`.
        weights: One for each member, in the selector's order, or `fit`. None: the selector's own where it has some and
            the combiner is the mean; else equal.
        reject: Pixels whose decision does not get more probability (or share of votes) are 255 in masks.
        views: Test-time views: `none`, `flips`, `d4`, `scales:0.75,1,1.25`, or a product such as `d4+scales:1,1.25`.
        calibrate: `temperature` or `none`.
        postprocess: Settings; `auto`: chosen on validation data.
        adaptive: Share of pixels that may change where images skip members (`Engine(ensemble, adaptive=True)`); None:
            no rule is fitted for that.
        precision: Lightning's words, or `auto`.

    Raises:
        ConfigError: No snapshots, or an unknown name.
        LeakError: A member was trained on validation or test images.
        NetworkError: Members do not fit each other or the data.
    """
    combination = Combination(combiner, weights, reject, views, calibrate, postprocess or PostProcessing(), adaptive)
    if not snapshots:
        raise ConfigError("expected at least one snapshot, got none: search_snapshots() lists what is tracked")
    selecting = Selecting(selector, max_members, max_candidates, metric, cross_fit)
    chosen = choose_members(snapshots, data, selecting, views=views, precision=precision)
    return assemble(chosen.members, data, combination.weighted_by(chosen.weights), precision=precision).ensemble
