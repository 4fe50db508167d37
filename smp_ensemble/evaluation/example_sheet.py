"""Single images to look at: what was there, what was said, where that is wrong, and where the model was unsure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.evaluation.drawing import (
    ACCENT,
    GREY,
    INK,
    MUTED,
    NORMAL,
    SMALL,
    WIDTH,
    new_figure,
    number,
    plain,
    set_title,
)
from smp_ensemble.inference.overlay import PALETTE, colour, draw_overlay, to_rgb
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from smp_ensemble.evaluation.measurement import Example
    from smp_ensemble.typing import Task

COLUMNS = ("image", "truth", "prediction", "errors", "entropy")
LONGEST_SIDE = 480
"""In pixels; larger images are drawn with every second, third, ... pixel."""

_REJECTED, _IGNORED = "#cc79a7", "#5f6b7a"
LEGEND_COLUMNS = 4


def draw_examples(examples: Sequence[Example], task: Task) -> Figure:
    """Draws one row for each example: image, truth, prediction, errors, and entropy on one scale for all.

    In binary mode errors are told apart: said and not there, there and not said. Ignored pixels are no errors.

    Args:
        examples: In the order of the rows.
        task: Mode and class names, for colours and the legend.

    Raises:
        ValueError: There is no example.
    """
    if not examples:
        raise ValueError("expected at least one example, came none")
    shapes = [example.image.shape for example in examples]
    cell = (WIDTH - 0.5) / len(COLUMNS)
    heights = [cell * min(max(shape[0] / shape[1], 0.75), 1.6) for shape in shapes]
    present = sorted(set().union(*(_classes(example, task) for example in examples)))
    bottom = 0.12 + 0.19 * max(3, math.ceil(len(present) / LEGEND_COLUMNS))
    figure = new_figure(sum(heights) + 0.14 * len(examples) + bottom + 0.55, pads=(0.03, 0.05))
    layout = figure.add_gridspec(len(examples) + 1, len(COLUMNS), height_ratios=[*heights, bottom])
    scale = max([float(np.nanmax(example.entropy, initial=0.0)) for example in examples] + [1e-3])
    seen: dict[str, Any] = {}
    for row, example in enumerate(_thinned(example) for example in examples):
        cells = [figure.add_subplot(layout[row, column]) for column in range(len(COLUMNS))]
        overlays = [draw_overlay(example.image, mask, task.mode, 0.55) for mask in (example.truth, example.mask)]
        pictures: list[npt.NDArray[Any]] = [to_rgb(example.image), *overlays, _draw_errors(example, task, seen)]
        for axes, picture in zip(cells, pictures, strict=False):
            axes.imshow(picture, interpolation="antialiased")
        heat = cells[-1].imshow(example.entropy, cmap="cividis", vmin=0, vmax=scale)
        for axes, heading in zip(cells, COLUMNS, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(heading, fontsize=NORMAL, color=INK)
        cells[0].set_ylabel(f"{plain(example.name, 20)}\nIoU {number(example.iou, 3)}", fontsize=SMALL, color=INK)
    classes = {plain(task.output_names[index], 24): colour(index) / 255 for index in present}
    _draw_legend(figure.add_subplot(layout[-1, :3]), classes, LEGEND_COLUMNS)
    _draw_legend(figure.add_subplot(layout[-1, 3]), seen, 1)
    _draw_scale(figure.add_subplot(layout[-1, 4]), heat, bottom)
    set_title(
        figure, _title(examples), "Colours repeat after eight classes." if task.num_outputs > len(PALETTE) else ""
    )
    return figure


def _draw_legend(axes: Axes, entries: Mapping[str, Any], columns: int) -> None:
    axes.set_axis_off()
    handles = [axes.plot([], [], "s", color=color, ms=6)[0] for color in entries.values()]
    if handles:
        axes.legend(handles, list(entries), loc="upper left", ncols=min(len(handles), columns), frameon=False,
                    fontsize=SMALL, labelcolor=INK, borderpad=0, borderaxespad=0, handlelength=1, handletextpad=0.4,
                    columnspacing=1.2)  # fmt: skip


def _draw_scale(axes: Axes, heat: AxesImage, height: float) -> None:
    axes.set_axis_off()
    share = 0.1 / height  # a bar as thick as a line of text
    bar = axes.figure.colorbar(heat, cax=axes.inset_axes((0.03, 1 - share, 0.94, share)), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL - 1, length=2, color=GREY, labelcolor=INK)
    bar.ax.locator_params(nbins=3)
    bar.set_label("predictive entropy (nats)", fontsize=SMALL - 1, color=GREY)


def _title(examples: Sequence[Example]) -> str:
    ious = [example.iou for example in examples if not math.isnan(example.iou)]
    if len(ious) > 1:
        return f"From IoU {number(max(ious), 3)} down to {number(min(ious), 3)} on single images"
    return f"IoU {number(ious[0], 3)} on this image" if ious else "Images without any class to score"


def _classes(example: Example, task: Task) -> set[int]:
    if task.mode == "binary":
        return {0} if (example.truth == 1).any() or (example.mask == 1).any() else set()
    if task.mode == "multilabel":
        return {index for index in range(task.num_outputs) if 1 in example.truth[index] or 1 in example.mask[index]}
    return {int(index) for index in np.union1d(example.truth, example.mask) if index < task.num_outputs}


def _thinned(example: Example) -> Example:
    step = math.ceil(max(example.image.shape[:2]) / LONGEST_SIDE)
    if step == 1:
        return example
    thin = (..., slice(None, None, step), slice(None, None, step))
    return type(example)(
        example.name,
        example.image[::step, ::step],
        example.truth[thin],
        example.mask[thin],
        example.entropy[thin],
        example.iou,
    )


def _draw_errors(example: Example, task: Task, seen: dict[str, Any]) -> npt.NDArray[np.float64]:
    """The image in pale grey with errors in colour; what it shows is added to `seen` for the legend."""
    truth, mask = example.truth, example.mask
    grey = to_rgb(example.image).mean(axis=-1, keepdims=True) / 255
    picture = np.repeat(0.45 + 0.5 * grey, 3, axis=-1)
    ignored, rejected = truth == IGNORE_INDEX, (mask == IGNORE_INDEX) & (truth != IGNORE_INDEX)
    wrong = (truth != mask) & ~ignored & ~rejected
    if task.mode == "binary":
        marks = {
            "said, not there": (wrong & (mask == 1), ACCENT),
            "there, not said": (wrong & (truth == 1), MUTED),
        }
    else:
        marks = {"wrong": (wrong, ACCENT)}
    marks |= {"rejected": (rejected, _REJECTED), "ignored": (ignored, _IGNORED)}
    for name, (where, color) in marks.items():
        pixels = where.any(axis=0) if where.ndim == 3 else where
        if pixels.any():
            picture[pixels] = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
            seen[name] = color
    return picture
