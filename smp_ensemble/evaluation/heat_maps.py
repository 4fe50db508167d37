"""How members differ, as three matrices side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smp_ensemble.evaluation.drawing import (
    GREY,
    INK,
    NORMAL,
    SMALL,
    new_figure,
    number,
    percent,
    percent_ticks,
    plain,
    set_title,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from smp_ensemble.evaluation.measurement import Measurement

NUMBERED = 10
"""Up to so many members the cells hold their numbers."""


def draw_diversity(measurement: Measurement) -> Figure:
    """Draws disagreement, error correlation and double fault of each pair of members.

    Raises:
        ValueError: The measurement is of an ensemble of one, which has no diversity.
    """
    diversity = measurement.diversity
    if diversity is None:
        raise ValueError("expected an ensemble of several members, came one: it has no diversity to draw")
    members = len(diversity.errors)
    names = [plain(member.name, 24) for member in measurement.members]
    figure = new_figure(4.15 - 0.02 * max(len(name) for name in names))  # names take from the width of the maps
    panels = figure.subplots(1, 3)
    correlation = _off_diagonal(diversity.error_correlation)
    disagreement = _off_diagonal(diversity.disagreement)
    _draw_matrix(figure, panels[0], disagreement, "disagreement", "% of pixels", percentages=True)
    _draw_matrix(
        figure, panels[1], correlation, "error correlation", "1: they err on the same pixels", percentages=False
    )
    _draw_matrix(
        figure, panels[2], diversity.double_fault, "double fault", "% of pixels that both get wrong", percentages=True
    )
    ticks = list(range(members))
    fifth = ticks if members <= NUMBERED else sorted({0, *range(4, members, 5)})
    size = SMALL if members <= NUMBERED else max(3.0, SMALL - 0.1 * members)
    for axes in panels:
        axes.set_xticks(fifth, [str(tick + 1) for tick in fifth])
        axes.set_yticks(fifth, [str(tick + 1) for tick in fifth])
    panels[0].set_yticks(ticks, [f"{name}  {tick + 1}" for tick, name in enumerate(names)], fontsize=size)
    pairs = f"Two members disagree on {percent(_mean(disagreement))} of pixels"
    together = "" if np.isnan(correlation).all() else f"; their errors correlate with {number(_mean(correlation), 2)}"
    title = f"{pairs}{together}"
    set_title(figure, title, "Means over pairs in the title. Diagonal of the double fault: the member's own errors.")
    return figure


def _off_diagonal(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The matrix without its diagonal, which says nothing about pairs."""
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _mean(matrix: npt.NDArray[np.float64]) -> float:
    found = matrix[~np.isnan(matrix)]
    return float(found.mean()) if len(found) else float("nan")


def _draw_matrix(
    figure: Figure, axes: Axes, matrix: npt.NDArray[np.float64], title: str, unit: str, *, percentages: bool
) -> None:
    known = matrix[~np.isnan(matrix)]
    least, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    span = max(high - least, 0.1 * abs(high), 1e-6)
    low, high = max(least - 0.5 * span, min(0.0, least)), max(high, least + 0.5 * span)
    shown = axes.imshow(matrix, cmap="Blues", vmin=low, vmax=high)
    axes.set_facecolor("#eceff2")
    axes.set_title(f"{title}\n", fontsize=NORMAL, fontweight="bold", color=INK, loc="left")
    axes.annotate(
        unit, (0, 1), xycoords="axes fraction", xytext=(0, 5), textcoords="offset points", fontsize=SMALL, color=GREY
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.9, aspect=24, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL - 1, length=2, color=GREY, labelcolor=INK)
    bar.ax.locator_params(nbins=4)
    if percentages:
        bar.ax.xaxis.set_major_formatter(percent_ticks())
    if len(matrix) > NUMBERED:
        return
    digits = 1 if high >= 0.01 else 3
    for (row, column), value in np.ndenumerate(matrix):
        if row == column and np.isnan(value):
            continue
        text = number(100 * float(value), digits) if percentages else number(float(value), 2)
        light = not np.isnan(value) and (value - low) / (high - low) > 0.6
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL if len(matrix) <= 6 else 5.5,
                  color="white" if light else INK)  # fmt: skip
