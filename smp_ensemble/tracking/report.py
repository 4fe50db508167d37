"""Pictures for the tracking UI: the learning rate with its snapshots, the curves, and overlay sheets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from smp_ensemble.inference.overlay import colour, draw_overlay, to_rgb
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from smp_ensemble.typing import Schedule, Task

DPI = 130
ACCENT, MUTED = "#d55e00", "#0072b2"


def draw_learning_rate(
    schedule: Schedule,
    lr: float,
    steps_per_epoch: int,
    path: Path,
    *,
    title: str,
    scores: Mapping[int, float] | None = None,
) -> None:
    """Draws the rate of every step, and where snapshots are taken.

    Args:
        schedule: Any schedule.
        lr: The rate that its factors multiply.
        steps_per_epoch: For the axis in epochs.
        path: The PNG to write.
        title: Above the axes.
        scores: Score by snapshot step, drawn on a second axis where given.
    """
    steps = np.arange(schedule.total_steps)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps / steps_per_epoch, [lr * schedule.factor(int(step)) for step in steps], color=MUTED, lw=1.6)
    for number, step in enumerate(schedule.snapshot_steps, 1):
        axes.axvline(step / steps_per_epoch, color=ACCENT, lw=0.8, ls=":")
        axes.plot(
            step / steps_per_epoch, 0, "o", color=ACCENT, clip_on=False, label="snapshot" if number == 1 else None
        )
    axes.set(xlabel="epoch", ylabel="learning rate", title=title)
    axes.set_xlim(0, schedule.total_steps / steps_per_epoch)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if scores:
        right = axes.twinx()
        right.plot([step / steps_per_epoch for step in scores], list(scores.values()), "s-", color=ACCENT, lw=1, ms=4)
        right.set_ylabel("val IoU of the snapshot", color=ACCENT)
        right.spines["top"].set_visible(False)
    figure.savefig(path, dpi=DPI)


def draw_curves(history: Sequence[tuple[int, Mapping[str, float]]], snapshot_steps: Sequence[int], path: Path) -> None:
    """Draws losses and validation IoU along training, with the snapshot points.

    Args:
        history: Completed steps, and the metrics logged after them.
        snapshot_steps: Steps at which snapshots were taken.
        path: The PNG to write.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("train_loss", "val_loss")), (right, ("val_iou",))):
        for name, line in zip(names, (MUTED, ACCENT), strict=False):
            points = [(step, metrics[name]) for step, metrics in history if name in metrics]
            if points:
                axes.plot(*zip(*points, strict=True), color=line, label=name, lw=1.5)
        for step in snapshot_steps:
            axes.axvline(step, color="#999999", lw=0.7, ls=":")
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def draw_overlay_sheet(
    images: Sequence[npt.NDArray[np.generic]],
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8]]],
    task: Task,
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draws one row for each image: the image, then a column of masks laid over it for each entry.

    Args:
        images: Raw, `(H, W, C)`.
        columns: Masks for all images by heading, `(H, W)` or, multilabel, `(K, H, W)`.
        task: Mode and class names, for colours and the legend.
        path: The PNG to write.
        title: Above everything.
    """
    headings = ["image", *columns]
    figure = Figure(figsize=(2.1 * len(headings), 2.1 * len(images) + 0.7), layout="constrained")
    grid = figure.subplots(len(images), len(headings), squeeze=False)
    for row, image in enumerate(images):
        pictures = [to_rgb(image), *(draw_overlay(image, masks[row], task.mode) for masks in columns.values())]
        for column, picture in enumerate(pictures):
            axes = grid[row][column]
            axes.imshow(picture)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(headings[column], fontsize=9)
    handles = [
        axes.plot([], [], "s", color=colour(index) / 255, label=name)[0] for index, name in enumerate(task.output_names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def truth_for_overlay(mask: npt.NDArray[np.uint8], task: Task) -> npt.NDArray[np.uint8]:
    """A stored mask as overlays want it: planes first in multilabel mode, ignored pixels as background."""
    if task.mode == "multilabel":
        planes = mask.transpose(2, 0, 1)
        return np.where(planes == IGNORE_INDEX, 0, planes).astype(np.uint8)
    return mask
