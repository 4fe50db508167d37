"""Figures are drawn, with what they should show."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from smp_ensemble.tracking.report import (
    draw_curves,
    draw_learning_rate,
    draw_overlay_sheet,
    truth_for_overlay,
)
from smp_ensemble.training.schedules import CosineRestarts
from smp_ensemble.typing import Task


def test_the_learning_rate_is_drawn_with_and_without_scores(tmp_path):
    schedule = CosineRestarts(8, 5, 2)
    draw_learning_rate(schedule, 0.1, 5, tmp_path / "plain.png", title="snapshot")
    draw_learning_rate(schedule, 0.1, 5, tmp_path / "scored.png", title="snapshot", scores={20: 0.4, 40: 0.6})
    plain, scored = (np.array(Image.open(tmp_path / name).convert("RGB")) for name in ("plain.png", "scored.png"))
    assert plain.std() > 5
    assert plain.shape == scored.shape
    assert (plain != scored).any()


def test_curves_are_drawn_from_history(tmp_path):
    history = [(5, {"train_loss": 1.0, "val_loss": 1.2, "val_iou": 0.2}), (10, {"train_loss": 0.5, "val_iou": 0.4})]
    draw_curves(history, [10], tmp_path / "curves.png")
    draw_curves([], [], tmp_path / "empty.png")
    assert (tmp_path / "curves.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


@pytest.mark.parametrize("mode", ["binary", "multiclass", "multilabel"])
def test_overlay_sheets_of_every_mode_show_the_mask(tmp_path, mode):
    task = Task(mode, ("background", "roof") if mode == "binary" else ("a", "b", "c"))
    image = np.full((16, 16, 3), 90, np.uint8)
    stored = np.zeros((16, 16, 3) if mode == "multilabel" else (16, 16), np.uint8)
    blank = truth_for_overlay(stored.copy(), task)
    stored[4:12, 4:12, ...] = 1
    stored[0, 0, ...] = 255
    mask = truth_for_overlay(stored, task)
    draw_overlay_sheet([image], {"truth": [mask]}, task, tmp_path / "sheet.png", title="sheet")
    draw_overlay_sheet([image], {"truth": [blank]}, task, tmp_path / "blank.png", title="sheet")
    sheet, without = (np.array(Image.open(tmp_path / name).convert("RGB")) for name in ("sheet.png", "blank.png"))
    assert (sheet != without).any()
