"""What a scored model leaves in its run beside numbers: a sheet of overlays."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.inference.masks import make_mask
from smp_ensemble.tracking.report import draw_overlay_sheet, truth_for_overlay
from smp_ensemble.training.previews import preview_indices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.tracking.runs import TrackedRun


def log_overlays(run: TrackedRun, data: SegmentationDataset, predictors: Mapping[str, Engine]) -> None:
    """Keeps one sheet: a few images, their ground truth, and what each of the predictors makes of them."""
    pairs = [data.read(index) for index in preview_indices(data)]
    images = [image for image, _ in pairs]
    columns = {"ground truth": [truth_for_overlay(mask, data.task) for _, mask in pairs]}
    for heading, engine in predictors.items():
        columns[heading] = [
            make_mask(engine.ensemble, image, probabilities)
            for image, probabilities in zip(images, engine.predict(images), strict=True)
        ]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "overlays.png"
        draw_overlay_sheet(images, columns, data.task, path)
        run.log_file(path)
