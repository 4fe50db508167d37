"""Figures of a study: differences to the baseline with their intervals, and scores along training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from study.plan import RUN, Study

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from study.lines import Line

WIDTH, DPI = 8.4, 150
CERTAIN, OPEN, LINE = "#d55e00", "#0072b2", "#d5dae1"


def runs_of(rows: Mapping[str, dict[str, Any]], method: str, epochs: int) -> list[dict[str, Any]]:
    """Reported rows of a method."""
    return [row for row in rows.values() if (row["method"], row["stage"], row["epochs"]) == (method, RUN, epochs)]


def draw_differences(lines: Sequence[Line], path: Path, title: str) -> None:
    """A row for each system: difference in test IoU, in points, with its interval."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(lines)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for place, line in enumerate(reversed(lines)):
        value, low, high = (100 * one for one in (line.iou.value, line.iou.low, line.iou.high))
        colour = CERTAIN if line.iou.certain else OPEN
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([value], [place], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(lines)), [line.label for line in reversed(lines)], fontsize=8)
    axes.set_xlabel("difference in test IoU to single, points; 95 % interval (orange: leaves 0 out)", fontsize=8)
    axes.set_title(title.replace("`", ""), fontsize=10, loc="left")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)


def draw_curves(rows: Mapping[str, dict[str, Any]], study: Study, epochs: int, path: Path) -> None:
    """Validation IoU at 0.5 after each epoch, mean over folds and seeds: where each method spends its budget."""
    figure = Figure(figsize=(WIDTH, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    colours = ["#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"]
    for method, colour in zip(study.methods, colours * 3, strict=False):
        cells = runs_of(rows, method.name, epochs)
        curves = [[point["val_iou"] for point in row["history"] if "val_iou" in point] for row in cells]
        length = min((len(curve) for curve in curves), default=0)
        if length:
            mean = np.mean([curve[:length] for curve in curves], axis=0)
            axes.plot(np.arange(1, length + 1), 100 * mean, color=colour, linewidth=1.4, label=method.name)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel("validation IoU at 0.5, points", fontsize=8)
    title = f"{study.name}: the training network along training (mean of folds and seeds)"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(color=LINE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_overview(
    studies: Sequence[str], panels: Sequence[tuple[str, Sequence[Line | None]]], path: Path, columns: int = 3
) -> None:
    """A panel for each system, a row in it for each study: difference in test IoU, in points, with its interval."""
    panels = [(heading, lines) for heading, lines in panels if any(line is not None for line in lines)]
    rows = -(-len(panels) // columns)
    size = (1.4 * WIDTH, rows * (1.0 + 0.22 * len(studies)))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (heading, lines) in zip(grid.flat, panels, strict=False):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, line in enumerate(lines):
            if line is None:
                continue
            value, low, high = (100 * one for one in (line.iou.value, line.iou.low, line.iou.high))
            colour = CERTAIN if line.iou.certain else OPEN
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
            axes.plot([value], [place], "o", color=colour, markersize=4)
        axes.set_title(heading, fontsize=8, loc="left")
        axes.set_yticks(range(len(studies)), studies, fontsize=7)
        axes.tick_params(axis="x", labelsize=7, labelbottom=True)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
    grid[0, 0].set_ylim(len(studies) - 0.4, -0.6)
    figure.supxlabel("difference in test IoU to single, points; 95 % interval (orange: 0 is outside)", fontsize=8)
    figure.savefig(path)
