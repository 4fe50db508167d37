"""What all figures share: colours, text that is shown as it is, titles, axes, and PNG bytes."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from smp_ensemble.metrics.bootstrap import Difference, Interval

DPI = 170
"""A page shows figures about 1000 pixels wide; screens with twice the resolution should find sharp text."""

ACCENT, MUTED = "#d55e00", "#0072b2"
"""The ensemble, or what stands out; members, or what it is compared with. Told apart with any colour vision."""

ACCENT_TEXT = "#ad4a00"
"""The accent dark enough for small text on white."""

INK, GREY, LINE, BAND = "#1f2933", "#5f6b7a", "#d5dae1", "#f4f6f8"
SMALL, NORMAL, LARGE = 8.0, 9.0, 11.5
WIDTH = 8.4
"""Of every figure, in inches."""


def new_figure(height: float, *, pads: tuple[float, float] = (0.12, 0.09)) -> Figure:
    """An empty figure of the common width.

    Args:
        height: In inches.
        pads: Around axes, sideways and up and down, in inches.
    """
    layout = ConstrainedLayoutEngine(w_pad=pads[0], h_pad=pads[1])
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout, facecolor="white")


def plain(text: str, longest: int = 28) -> str:
    r"""A name as Matplotlib shows it: in one line, shortened in the middle, no mathematics, no hidden legend entry.

    Example:
        >>> plain("cost in $ per $")
        'cost in \\$ per \\$'
        >>> plain("a very long name of a class, and more of it", 20)
        'a very lon…ore of it'
    """
    text = " ".join(text.split()) or "(no name)"
    if len(text) > longest:
        tail = (longest - 1) // 2
        text = f"{text[: longest - 1 - tail]}…{text[-tail:]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def set_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """Says above a figure what one sees in it, and below that how to read it."""
    lines = textwrap.wrap(title, 78)
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=LARGE, fontweight="bold", color=INK)
    if subtitle:
        figure.supxlabel(textwrap.fill(subtitle, 146), x=0.012, ha="left", fontsize=SMALL, color=GREY, linespacing=1.35)


def dress(axes: Axes, *, xlabel: str = "", ylabel: str = "", grid: Literal["both", "x", "y"] = "both") -> None:
    """Light axes: two spines, a faint grid behind everything, small ticks.

    Args:
        axes: Which.
        xlabel: With its unit.
        ylabel: With its unit.
        grid: `x`, `y` or `both`.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=NORMAL, length=3)
    axes.grid(axis=grid, color=LINE, lw=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, fontsize=NORMAL, color=GREY)
    axes.set_ylabel(ylabel, fontsize=NORMAL, color=GREY)


def rows_axis(axes: Axes, names: list[str], *, longest: int = 28) -> None:
    """Makes y an axis of named rows, the first on top, every other one on a band of its own."""
    axes.set_yticks(range(len(names)), [plain(name, longest) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    for row in range(0, len(names), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, lw=0, zorder=-5)


def draw_interval(
    axes: Axes, interval: Interval | Difference, y: float, *, color: str, size: float = 6, strong: bool = False
) -> None:
    """A dot at the estimate on a line from low to high; nothing without an estimate, no line without an interval."""
    estimate, low, high = interval.estimate, interval.low, interval.high
    if math.isnan(estimate):
        return
    if not math.isnan(low + high):
        axes.plot([low, high], [y, y], color=color, lw=2.2 if strong else 1.3, solid_capstyle="round", zorder=3)
    edge = "white" if strong else color
    axes.plot(estimate, y, "o", color=color, ms=size, mec=edge, mew=0.8 if strong else 0, zorder=4, clip_on=False)


def beside(axes: Axes, y: float, text: str, *, color: str = INK) -> Text:
    """Small text in the right margin, at a row."""
    return axes.annotate(
        text, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(8, 0), textcoords="offset points", va="center",
        fontsize=SMALL, color=color, annotation_clip=False,
    )  # fmt: skip


def interval_text(interval: Interval | Difference, *, signed: bool = False) -> str:
    """`0.742 [0.711, 0.770]`, with signs where it is a difference.

    Example:
        >>> from smp_ensemble.metrics.bootstrap import Interval
        >>> interval_text(Interval(0.74219, 0.711, 0.77)), interval_text(Interval(0.01, -0.004, 0.02), signed=True)
        ('0.742 [0.711, 0.770]', '+0.010 [−0.004, +0.020]')
    """
    estimate, low, high = (
        number(value, 3, signed=signed) for value in (interval.estimate, interval.low, interval.high)
    )
    return estimate if math.isnan(interval.low) else f"{estimate} [{low}, {high}]"


def number(value: float, digits: int = 4, *, signed: bool = False) -> str:
    """A number for people, with a true minus sign; a dash where there is none.

    Example:
        >>> number(0.5), number(float("nan")), number(-0.01234, 3, signed=True), number(-0.00001)
        ('0.5000', '–', '−0.012', '0.0000')
    """
    if math.isnan(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "−" if value < 0 else "+" if signed else ""
    return f"{sign}{text}" if float(text) else text


def percent(share: float) -> str:
    """A share as a percentage with two or three significant digits.

    Example:
        >>> percent(0.0634), percent(0.0004), percent(0.873), percent(0.9971), percent(float("nan"))
        ('6.3 %', '0.04 %', '87 %', '99.7 %', '–')
    """
    if math.isnan(share):
        return "–"
    value = 100 * share
    digits = 1 if 90 < value < 100 else 0 if value >= 9.95 or value == 0 else min(4, 1 - math.floor(math.log10(value)))
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def percent_ticks() -> FuncFormatter:
    """Shares as percentages along an axis."""
    return FuncFormatter(lambda share, _: f"{100 * share:.3g} %")


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG. A name in a script that the font lacks is drawn as boxes, without a warning for each."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def finite_range(*values: float, margin: float = 0.05, least: float = 0.02) -> tuple[float, float]:
    """Axis limits around all values that are numbers; 0..1 where none is.

    Example:
        >>> finite_range(0.5, 0.7, float("nan"), margin=0.5)
        (0.4, 0.8)
    """
    found = np.array([value for value in values if math.isfinite(value)])
    if not len(found):
        return 0.0, 1.0
    low, high = float(found.min()), float(found.max())
    pad = max(margin * (high - low), least / 2)
    return round(low - pad, 9), round(high + pad, 9)
