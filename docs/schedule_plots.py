"""A picture of each trainer's schedule, drawn from the schedule itself: `docs/images/schedules/NAME.png`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from smp_ensemble.tracking.report import ACCENT, MUTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.typing import Schedule

FOLDER = Path(__file__).resolve().parent / "images" / "schedules"
AVERAGED = "#009e73"
FINGERPRINT = "Description"
"""The PNG's own field that says what was drawn."""


def fingerprint(schedule: Schedule, averaged: Sequence[float]) -> str:
    """A digest of all that a picture shows, and of how it is drawn."""
    shown = {
        "factors": [round(schedule.factor(step), 6) for step in range(schedule.total_steps)],
        "snapshots": list(schedule.snapshot_steps),
        "averaged": list(averaged),
        "drawn by": Path(__file__).read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def drawn(path: Path) -> str | None:
    """The fingerprint in a picture; None where there is no picture."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(FINGERPRINT)


def draw(schedule: Schedule, steps_per_epoch: int, averaged: Sequence[float], path: Path) -> None:
    """Draws the factor of every step, the snapshots, and which weights are averaged; the file's name is the title.

    Args:
        schedule: Any schedule.
        steps_per_epoch: For the axis in epochs.
        averaged: Completed epochs after which the weights go into an average.
        path: The PNG to write, 800x300.
    """
    steps = np.arange(schedule.total_steps)
    factors = np.array([schedule.factor(int(step)) for step in steps])
    epochs = schedule.total_steps // steps_per_epoch
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    for number in schedule.snapshot_steps:
        axes.axvline(number / steps_per_epoch, color=ACCENT, lw=0.8, ls=":", zorder=1)
    axes.plot((steps + 1) / steps_per_epoch, factors, color=MUTED, lw=1.8, zorder=2)
    shown = [Line2D([], [], color=MUTED, lw=1.8, label="rate")]
    if len(averaged) == schedule.total_steps:
        axes.axvspan(0, epochs, ymax=0.035, color=AVERAGED, alpha=0.45, lw=0)
        shown.append(Line2D([], [], color=AVERAGED, alpha=0.45, lw=6, label="averaged after every step"))
    elif averaged:
        ends = [factors[round(epoch * steps_per_epoch) - 1] for epoch in averaged]
        style = {"marker": "o", "ls": "", "mfc": "white", "mec": AVERAGED, "mew": 1.6, "ms": 10}
        axes.plot(averaged, ends, **style, clip_on=False, zorder=3)
        shown.append(Line2D([], [], **style, label="averaged"))
    taken = [number / steps_per_epoch for number in schedule.snapshot_steps]
    ends = [factors[number - 1] for number in schedule.snapshot_steps]
    axes.plot(taken, ends, "o", color=ACCENT, ms=5.5, clip_on=False, zorder=4)
    shown.append(Line2D([], [], color=ACCENT, marker="o", ls="", ms=5.5, label="snapshot"))
    axes.set(xlabel="completed epochs", ylabel="factor of lr", yticks=[0, 0.5, 1])
    axes.set_xlim(0, epochs)
    axes.set_ylim(0, 1.05)
    axes.set_xticks(range(0, epochs + 1, max(1, epochs // 12)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(path.stem, loc="left")
    axes.legend(handles=shown, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(shown), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={FINGERPRINT: fingerprint(schedule, averaged), "Software": None})
