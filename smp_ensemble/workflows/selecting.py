"""Which candidates become members: by their scores alone, or by what they predict on validation data."""

from __future__ import annotations

import json
import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from smp_ensemble.ensembling.cross_fitting import PARTS, cross_fit
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.pool import check_metric
from smp_ensemble.ensembling.selection import make_selector, needs_predictions
from smp_ensemble.ensembling.views import check_views
from smp_ensemble.evaluation.cache import CachedPredictions, PredictionCache, cache_from_environment, prediction_key
from smp_ensemble.evaluation.drawing import png_bytes
from smp_ensemble.evaluation.pooling import make_pool
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.evaluation.selection_figures import SelectionNumbers, draw_selection
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference.engine import Engine
from smp_ensemble.precision import choose_device, resolve_precision
from smp_ensemble.workflows.loading import inspect_snapshots, load_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.data.forms import DataSplits
    from smp_ensemble.ensembling.selection import PredictionSelector, Selector
    from smp_ensemble.tracking.runs import TrackedRun
    from smp_ensemble.typing import Snapshot
    from smp_ensemble.workflows.options import EnsembleOptions

MAX_CANDIDATES = 50

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selecting:
    """How members are chosen.

    Attributes:
        selector: Name in the entry-point group `smp_ensemble.selectors`.
        max_members: At most so many.
        max_candidates: So many of the candidates, the best, are looked at by a selector that needs predictions.
        metric: Ranks the candidates, and is what such a selector makes best.
        cross_fit: Into how many parts validation data are divided, each of which is scored by what the selector chooses
            on the others; 0: that is not looked at.

    Raises:
        ConfigError: An unknown selector, a metric that it cannot use, or one part alone.
    """

    selector: str = "top-k"
    max_members: int = 5
    max_candidates: int = MAX_CANDIDATES
    metric: str = "val_iou"
    cross_fit: int = PARTS

    def __post_init__(self) -> None:
        if self.cross_fit < 0 or self.cross_fit == 1:
            raise ConfigError(f"cross_fit: expected 0 (off), or 2 parts or more, got {self.cross_fit}")
        if needs_predictions(make_selector(self.selector)):
            check_metric(self.metric)


def selecting_of(options: EnsembleOptions) -> Selecting:
    """What the options ask for.

    Raises:
        ConfigError: As for `Selecting`.
    """
    return Selecting(options.selector, options.max_members, options.max_candidates, options.metric, options.cross_fit)


@dataclass(frozen=True)
class Chosen:
    """Members, and what the selector says of them.

    Attributes:
        members: In its order.
        weights: What each counts in a mean; None: the selector does not say.
        numbers: What it saw; None: nothing was predicted.
    """

    members: list[Snapshot]
    weights: list[float] | None = None
    numbers: SelectionNumbers | None = None


def choose_members(
    snapshots: Sequence[Snapshot],
    splits: DataSplits,
    selecting: Selecting,
    *,
    views: str | Sequence[str] = "none",
    batch_size: int = 8,
    precision: str = "auto",
    accelerator: str = "auto",
) -> Chosen:
    """Selects members; on validation data alone where predictions are needed.

    Each candidate predicts once, with one network in memory at a time, and what it predicts is kept for later commands.

    Args:
        snapshots: Candidates, best first.
        splits: `val` is predicted; no candidate may have been trained on it, or on `test`.
        selecting: How.
        views: Test-time views.
        batch_size: Images at once.
        precision: Lightning's words, or `auto`.
        accelerator: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        LeakError: A candidate was trained on validation or test images.
        NetworkError: Two candidates do not predict the same thing, or they do not fit the data.
    """
    selector = make_selector(selecting.selector)
    if not needs_predictions(selector):
        return Chosen(cast("Selector", selector)(snapshots, selecting.max_members))
    unique = list({snapshot.uri: snapshot for snapshot in snapshots}.values())
    candidates = unique[: selecting.max_candidates]
    if len(unique) > len(candidates):
        logger.info(
            "%s looks at the best %d of %d candidates by %s: max-candidates raises that",
            selecting.selector, len(candidates), len(unique), selecting.metric,
        )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        cache = cache_from_environment() or PredictionCache(folder)
        predicted = predict_candidates(
            candidates, splits, cache,
            views=views, batch_size=batch_size, precision=precision, accelerator=accelerator,
        )  # fmt: skip
        parts = selecting.cross_fit if len(candidates) > 1 else 0
        pool = make_pool(predicted, candidates, splits.val, selecting.metric, folder, parts)
        fitted = cast("PredictionSelector", selector)
        selection = fitted(pool, selecting.max_members)
        crossed = cross_fit(pool, fitted, selecting.max_members)
        numbers = SelectionNumbers.of(selecting.selector, pool, selection, crossed)
    logger.info("%s", numbers.sentence())
    if crossed is not None and not crossed.pays:
        logger.warning("%s", numbers.advice())
    return Chosen(selection.members, selection.weights, numbers)


def predict_candidates(
    candidates: Sequence[Snapshot],
    splits: DataSplits,
    cache: PredictionCache,
    *,
    views: str | Sequence[str] = "none",
    batch_size: int = 8,
    precision: str = "auto",
    accelerator: str = "auto",
) -> list[CachedPredictions]:
    """What each candidate predicts on validation data: from the cache, or predicted and put there.

    Raises:
        LeakError: As for `choose_members`; nothing is predicted before all candidates are looked at.
        NetworkError: The same.
    """
    stored = inspect_snapshots(candidates, splits)
    device = choose_device(accelerator)
    found, read = [], 0
    for number, one in enumerate(stored, 1):
        key = prediction_key(
            {name: digest for name, digest in one.entry.sha256.items() if name in {"config.json", "model.safetensors"}},
            one.entry.normalization,
            splits.val,
            views=check_views(views),
            precision=resolve_precision(precision, device),
            device=device.type,
        )
        kept = cache.read(key, splits.val)
        read += kept is not None
        if kept is None:

            def images(uri: str = one.source, number: int = number) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
                member = load_snapshot(uri, splits.task)
                alone = Ensemble([member], mode=splits.task.mode, views=views, class_names=splits.task.class_names)
                engine = Engine(alone, device, precision)
                return _predict(engine, splits.val, batch_size, f"candidate {number}/{len(stored)}")

            kept = cache.write(key, splits.val, images)
        found.append(kept)
    logger.info(
        "%d candidates on %d validation images: %d read from %s, %d predicted",
        len(found), len(splits.val), read, cache.folder, len(found) - read,
    )  # fmt: skip
    return found


def log_selection(run: TrackedRun, numbers: SelectionNumbers | None) -> None:
    """Keeps `selection.png`, `selection.json` and what selection is worth in the run, where predictions were seen."""
    if numbers is None:
        return
    run.log_metrics(numbers.metrics())
    with tempfile.TemporaryDirectory() as name:
        picture, values = Path(name) / "selection.png", Path(name) / "selection.json"
        picture.write_bytes(png_bytes(draw_selection(numbers)))
        values.write_text(json.dumps(numbers.to_dict(), indent=2) + "\n", encoding="utf-8", newline="\n")
        for path in (picture, values):
            run.log_file(path)


def _predict(
    engine: Engine, data: SegmentationDataset, batch_size: int, label: str
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    predictions = Predictions(engine, data, batch_size=batch_size, label=label)
    for batch in predictions:
        (found,) = predictions.of_members(batch)
        yield from zip(batch.indices, found.numpy(), strict=True)
