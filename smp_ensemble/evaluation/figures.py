"""Figures of scores: IoU with intervals, paired differences, reliability, and errors by how much is decided."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_rgba

from smp_ensemble.evaluation.drawing import (
    ACCENT,
    ACCENT_TEXT,
    GREY,
    INK,
    MUTED,
    NORMAL,
    SMALL,
    beside,
    draw_interval,
    dress,
    finite_range,
    interval_text,
    new_figure,
    number,
    percent,
    percent_ticks,
    plain,
    rows_axis,
    set_title,
)
from smp_ensemble.evaluation.findings import ece

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from smp_ensemble.evaluation.findings import Findings
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.metrics.bootstrap import Interval
    from smp_ensemble.metrics.calibration import Reliability

FEW = 8
"""Up to so many members each has an interval in every class and a curve with a name; more are dots and a family."""

_LINES = ("-", "--", "-.", ":")


def draw_scores(measurement: Measurement, findings: Findings) -> Figure:
    """Draws IoU with bootstrap intervals: of each model, and in each class the ensemble against every member."""
    names = [measurement.ensemble.name, *(member.name for member in measurement.members)]
    order = [len(names) - 1, *range(len(names) - 1)]  # the ensemble on top
    classes = list(measurement.task.output_names)
    by_model, by_class = len(names) > 1 or len(classes) == 1, len(classes) > 1
    rows = classes if by_model else ["mean over classes", *classes]
    lane = max(0.3, 0.1 * (min(len(names), FEW + 1) + 1))
    heights = [0.29 * len(names) + 0.5] * by_model + [lane * len(rows) + 0.5] * by_class
    figure = new_figure(sum(heights) + 1.0)
    panels = list(figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0])
    if by_model:
        for row, index in enumerate(order):
            _draw_row(panels[0], findings.means[index], row, strong=row == 0)
        _finish_iou(panels[0], names, f"IoU, {'mean over classes' if by_class else plain(classes[0], 40)}")
    if by_class:
        if not by_model:
            _draw_row(panels[-1], findings.means[-1], 0, strong=True)
        for index in range(len(classes)):
            _draw_class(panels[-1], findings, order, index, index + len(rows) - len(classes))
        _finish_iou(panels[-1], rows, "IoU by class")
    title = f"IoU {number(findings.means[-1].estimate, 3)} on {_count(len(measurement.images), 'image')}"
    subtitle = _intervals(findings)
    if len(names) > 1:
        reach = _span([mean.estimate for mean in findings.means[:-1]])
        title = f"The ensemble has IoU {number(findings.means[-1].estimate, 3)}, its {len(names) - 1} members {reach}"
        subtitle += " Orange: the ensemble. Blue: members, in the same order"
        subtitle += " in every class." if len(names) <= FEW + 1 else "; in classes as dots, without intervals."
    set_title(figure, title, subtitle)
    return figure


def draw_differences(measurement: Measurement, findings: Findings) -> Figure:
    """Draws IoU of the ensemble minus that of each member, on the same images, with intervals.

    Colours: orange where the ensemble is better, blue where it is worse, grey where the interval holds 0.
    """
    names = [member.name for member in measurement.members]
    figure = new_figure(0.29 * len(names) + 1.75)
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, lw=1)
    for row, found in enumerate(findings.differences):
        color = ACCENT if found.low > 0 else MUTED if found.high < 0 else GREY
        draw_interval(axes, found, row, color=color, size=7)
        beside(axes, row, interval_text(found, signed=True), color=ACCENT_TEXT if color == ACCENT else color)
    dress(axes, xlabel="IoU of the ensemble minus IoU of the member", grid="x")
    rows_axis(axes, [f"{name} ★" if row == findings.best else name for row, name in enumerate(names)], longest=32)
    axes.set_xlim(
        *finite_range(
            0, *(value for found in findings.differences for value in (found.low, found.estimate, found.high))
        )
    )
    wins, losses = findings.wins(), findings.losses()
    title = f"The ensemble is better than {wins} of {_count(len(names), 'member')}, worse than {losses}"
    title += f", undecided for {len(names) - wins - losses}" if wins + losses < len(names) else ""
    if findings.units < 2:
        title = "Too few images to tell the ensemble from its members"
    subtitle = f"{_intervals(findings)} Orange: better, blue: worse, grey: the interval holds 0. ★ best on this data."
    set_title(figure, title, subtitle)
    return figure


def draw_reliability(measurement: Measurement) -> Figure:
    """Draws accuracy by confidence, before and after the temperature where there is one, and the pixels of each bin."""
    now, before = measurement.ensemble.reliability, measurement.uncalibrated
    figure = new_figure(5.6)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3.4, 1])
    upper.plot([0, 1], [0, 1], color=GREY, lw=1, ls=":", label="as right as it says")
    if before is not None:
        _draw_reliability(upper, lower, before, MUTED, "s--", f"before temperature, ECE {number(ece(before))}")
    label = "after temperature" if before is not None else plain(measurement.ensemble.name)
    _draw_reliability(upper, lower, now, ACCENT, "o-", f"{label}, ECE {number(ece(now))}")
    bins = len(now.pixels)
    used = np.flatnonzero(now.pixels + (0 if before is None else before.pixels))
    low = used[0] / bins if len(used) else 0.0
    upper.set(xlim=(low - 0.01, 1.01), ylim=(-0.02, 1.03))
    dress(upper, ylabel="accuracy: share of right pixels")
    dress(lower, xlabel="confidence: probability of the decision", ylabel="pixels", grid="y")
    lower.set_yscale("log")
    lower.set_ylim(1e-4, 1.5)
    lower.yaxis.set_major_formatter(percent_ticks())
    lower.minorticks_off()
    lower.set_yticks([1e-4, 1e-2, 1])
    upper.legend(frameon=False, fontsize=NORMAL, loc="upper left", labelcolor=INK)
    pixels = now.pixels / max(int(now.pixels.sum()), 1)
    sure, right = (float(np.nansum(pixels * part)) for part in (now.confidence, now.accuracy))
    word = "Over-confident" if sure > right else "Under-confident"
    title = f"{word}: mean confidence {percent(sure)}, right {percent(right)} of the time"
    if abs(sure - right) < 0.005:
        title = f"Mean confidence {percent(sure)} and accuracy {percent(right)} agree"
    if before is not None:
        verb = "lowers" if ece(now) < ece(before) else "raises"
        title = f"The temperature {verb} the calibration error from {number(ece(before))} to {number(ece(now))}"
    below = (
        f"{bins} bins of equal width. Above the diagonal: more often right than it says. Below, on a log scale: the "
    )
    set_title(
        figure,
        title if len(used) else "No pixels",
        f"{below}share of pixels in each bin; bins with less than 0.1 % are faint.",
    )
    return figure


def draw_risk_coverage(measurement: Measurement) -> Figure:
    """Draws the error rate that is left when only the most certain pixels are decided."""
    figure = new_figure(4.6)
    axes = figure.add_subplot()
    curve, members = measurement.ensemble.risk_coverage, measurement.members
    few = len(members) <= FEW
    label = f"{plain(measurement.ensemble.name)}, AURC {number(curve.aurc)}"
    axes.plot(curve.coverage, curve.risk, color=ACCENT, lw=2.4, zorder=4, label=label)
    for index, member in enumerate(members):
        found = member.risk_coverage
        name = f"{plain(member.name)}, AURC {number(found.aurc)}" if few else None
        style = _LINES[index % len(_LINES)] if few else "-"
        alpha = 0.8 if index < len(_LINES) and few else 0.45
        axes.plot(found.coverage, found.risk, color=MUTED, lw=1.1, ls=style, alpha=alpha, label=name)
    if not few:
        reach = _span([member.risk_coverage.aurc for member in members], 4)
        axes.plot([], [], color=MUTED, lw=1, label=f"{len(members)} members, AURC {reach}")
    title = "No pixels"
    if len(curve.risk):
        everything = float(curve.risk[-1])
        left = float(np.interp(0.8, curve.coverage, curve.risk))
        axes.axhline(everything, color=GREY, lw=1, ls=(0, (1, 3)), label="if confidence said nothing")
        perfect = np.maximum(0, (curve.coverage - 1 + everything) / curve.coverage)
        axes.plot(curve.coverage, perfect, color=GREY, lw=1, ls=(0, (4, 3)), label="if it found every error")
        title = f"Without the least certain 20 % of pixels, errors go from {percent(everything)} to {percent(left)}"
    dress(
        axes, xlabel="coverage: share of pixels decided, the most certain first", ylabel="risk: share of wrong pixels"
    )
    axes.set_xlim(0, 1.005)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(percent_ticks())
    axes.yaxis.set_major_formatter(percent_ticks())
    axes.legend(fontsize=SMALL, loc="upper left", facecolor="white", framealpha=0.92, edgecolor="none", labelcolor=INK)
    set_title(figure, title, "AURC: area under the curve, the mean risk over all coverages; lower is better.")
    return figure


def _draw_row(axes: Axes, interval: Interval, row: int, *, strong: bool) -> None:
    draw_interval(axes, interval, row, color=ACCENT if strong else MUTED, size=8 if strong else 6, strong=strong)
    beside(axes, row, interval_text(interval), color=ACCENT_TEXT if strong else GREY)


def _draw_class(axes: Axes, findings: Findings, order: list[int], index: int, row: int) -> None:
    ensemble, members = findings.classes[order[0]][index], order[1:]
    if math.isnan(ensemble.estimate):
        axes.annotate("not in this data", (0, row), xycoords=axes.get_yaxis_transform(), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=SMALL, color=GREY, style="italic")  # fmt: skip
    few = len(members) <= FEW
    places = np.linspace(-0.36, 0.36, len(members) + few) if members else [0.0]
    for place, member in zip(places[few:], members, strict=True):
        interval = findings.classes[member][index]
        if not few:
            interval = replace(interval, low=math.nan, high=math.nan)
        draw_interval(axes, interval, row + place, color=MUTED, size=3.5)
    draw_interval(axes, ensemble, row + (places[0] if few else 0), color=ACCENT, size=7, strong=True)
    beside(axes, row, interval_text(ensemble), color=ACCENT_TEXT)


def _finish_iou(axes: Axes, rows: list[str], label: str) -> None:
    dress(axes, xlabel=label, grid="x")
    rows_axis(axes, rows)
    axes.autoscale(axis="x")
    low, high = finite_range(*axes.dataLim.intervalx, least=0.04)
    axes.set_xlim(max(low, -0.02), min(high, 1.02))


def _draw_reliability(upper: Axes, lower: Axes, found: Reliability, color: str, style: str, label: str) -> None:
    share = found.pixels / max(int(found.pixels.sum()), 1)
    there = found.pixels > 0
    upper.plot(found.confidence[there], found.accuracy[there], style[1:], color=color, lw=1.2, alpha=0.6)
    shades = [to_rgba(color, 0.35 if part < 1e-3 else 1.0) for part in share[there]]
    upper.scatter(found.confidence[there], found.accuracy[there], s=34, marker=style[0], c=shades, zorder=3, lw=0)
    upper.plot([], [], style, color=color, lw=1.2, ms=5.5, label=label)
    edges = np.linspace(0, 1, len(share) + 1)
    lower.stairs(np.maximum(share, 1e-9), edges, color=color, lw=1.6, fill=False, baseline=1e-9,
                 ls="--" if "--" in style else "-")  # fmt: skip


def _span(values: list[float], digits: int = 3) -> str:
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return "–"
    low, high = number(min(found), digits), number(max(found), digits)
    return low if low == high else f"{low} to {high}"


def _count(how_many: int, what: str) -> str:
    return f"{how_many} {what}{'' if how_many == 1 else 's'}"


def _intervals(findings: Findings) -> str:
    if findings.units < 2:
        return "No intervals: they need two images or groups at least."
    return f"Lines: 95 % bootstrap intervals, {findings.resamples} resamples of {findings.units} {findings.what}."
