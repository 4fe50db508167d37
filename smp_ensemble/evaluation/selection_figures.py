"""What a selector saw, in numbers and in one figure: the candidates, and the mean that grew from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from smp_ensemble.evaluation.drawing import (
    ACCENT,
    ACCENT_TEXT,
    GREY,
    INK,
    MUTED,
    SMALL,
    dress,
    finite_range,
    new_figure,
    number,
    percent_ticks,
    plain,
    set_title,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from smp_ensemble.ensembling.cross_fitting import CrossFit
    from smp_ensemble.ensembling.pool import CandidatePool
    from smp_ensemble.ensembling.selection import Selection

_WORDS = {"iou": "IoU", "dice": "Dice", "nll": "log-loss"}


@dataclass(frozen=True)
class SelectionNumbers:
    """What a selector saw on validation data, and what it chose.

    Attributes:
        selector: Its name.
        metric: What it made best.
        lower_is_better: Of the metric.
        candidates: Addresses, best first as they were ranked.
        scores: Each alone, as the selector measured it.
        disagreement: Of each with the others, on average: a share of pixels; NaN for a single candidate.
        weights: Of each candidate; 0: not chosen.
        path: The additions, as places among the candidates.
        path_scores: Of the mean after each.
        kept: How many of the additions were kept.
        crossed: What selection is worth on images that had no say; None: that was not looked at.
    """

    selector: str
    metric: str
    lower_is_better: bool
    candidates: list[str]
    scores: list[float]
    disagreement: list[float]
    weights: list[float]
    path: list[int]
    path_scores: list[float]
    kept: int
    crossed: CrossFit | None = None

    @classmethod
    def of(
        cls, selector: str, pool: CandidatePool, selection: Selection, crossed: CrossFit | None = None
    ) -> SelectionNumbers:
        """Reads them off a pool."""
        place = {candidate.uri: index for index, candidate in enumerate(pool.candidates)}
        weights = [0.0] * len(place)
        for member, weight in zip(selection.members, selection.weights, strict=True):
            weights[place[member.uri]] = float(weight)
        others = len(place) - 1
        apart = pool.disagreement.sum(axis=1) / others if others else np.full(1, np.nan)
        return cls(
            selector,
            pool.metric,
            pool.sign < 0,
            list(place),
            pool.singles.tolist(),
            apart.tolist(),
            weights,
            [place[step.candidate.uri] for step in selection.path],
            [step.score for step in selection.path],
            selection.kept,
            crossed,
        )

    @property
    def best(self) -> int:
        """The candidate that is best alone."""
        return int(np.argmin(self.scores) if self.lower_is_better else np.argmax(self.scores))

    @property
    def chosen(self) -> list[int]:
        """Places of the members among the candidates."""
        return [index for index, weight in enumerate(self.weights) if weight > 0]

    @property
    def word(self) -> str:
        """The metric as people call it."""
        name = self.metric.removeprefix("val_")
        return _WORDS.get(name, name)

    def sentence(self) -> str:
        """What came out, in one line."""
        text = f"{self.selector} chose {len(self.chosen)} of {_count(len(self.candidates), 'candidate')}"
        if not self.path:
            return text
        found, best = number(self.path_scores[self.kept - 1]), number(self.scores[self.best])
        text += f": their mean has {self.word} {found} on validation data, the best candidate alone {best}"
        return f"{text}. {self._crossed_sentence()}" if self.crossed else text

    def _crossed_sentence(self) -> str:
        assert self.crossed is not None
        others = [f"the best candidate alone {number(self.crossed.best)}"]
        if self.crossed.everyone is not None:
            others.append(f"the mean of all candidates {number(self.crossed.everyone)}")
        return f"On images that had no say in the choice: {number(self.crossed.selected)}, {', '.join(others)}"

    def advice(self) -> str:
        """What to do where selection does not pay."""
        assert self.crossed is not None
        simple = "selector=all" if self.crossed.mean_beats_best else "selector=top-k with max-members=1"
        return (
            f"what {self.selector} gains on these images is luck: on images that had no say in the choice, {simple} is "
            "as good or better (docs/selection.md)"
        )

    def metrics(self) -> dict[str, float]:
        """For MLflow: scores on images that had no say; empty where that was not looked at."""
        if self.crossed is None:
            return {}
        found = {"selected": self.crossed.selected, "best": self.crossed.best, "all": self.crossed.everyone}
        return {f"crossfit_{name}_{self.metric}": value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where a number is not defined."""
        return {
            "selector": self.selector,
            "metric": self.metric,
            "candidates": [
                {
                    "model": uri,
                    self.metric: self.scores[index],
                    "disagreement": None if np.isnan(self.disagreement[index]) else self.disagreement[index],
                    "weight": self.weights[index],
                }
                for index, uri in enumerate(self.candidates)
            ],
            "path": [
                {"model": self.candidates[place], self.metric: score}
                for place, score in zip(self.path, self.path_scores, strict=True)
            ],
            "kept": self.kept,
            "cross_fit": self.crossed.to_dict() if self.crossed is not None else None,
        }


def draw_selection(numbers: SelectionNumbers) -> Figure:
    """Draws each candidate's score by how much it disagrees with the others, and the score along the additions."""
    figure = new_figure(4.3)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_candidates(left, numbers)
    _draw_path(right, numbers)
    better = "lower" if numbers.lower_is_better else "higher"
    found = numbers.path_scores[numbers.kept - 1] if numbers.path else float("nan")
    best = numbers.scores[numbers.best]
    title = f"{len(numbers.chosen)} of {_count(len(numbers.candidates), 'candidate')} selected"
    if numbers.path:
        title += f": {numbers.word} {number(found, 3)}, the best one alone {number(best, 3)}"
    set_title(
        figure,
        title,
        f"On validation data, which the selection looked at: {better} is better, and test data say what it is worth. "
        "Orange: selected, larger with more weight; numbers are ranks. Star: best alone. Right: the mean after each "
        "addition; what follows the last orange point was tried and left out.",
    )
    return figure


def _draw_candidates(axes: Axes, numbers: SelectionNumbers) -> None:
    apart = np.nan_to_num(np.array(numbers.disagreement))
    scores, weights = np.array(numbers.scores), np.array(numbers.weights)
    picked = weights > 0
    axes.scatter(apart[~picked], scores[~picked], s=26, color=MUTED, alpha=0.55, lw=0, zorder=3, label="not selected")
    axes.scatter(
        apart[picked], scores[picked], s=40 + 160 * weights[picked], color=ACCENT, edgecolor="white", lw=0.8, zorder=4,
        label="selected",
    )  # fmt: skip
    best = numbers.best
    axes.plot(apart[best], scores[best], "*", color=INK, ms=9, mec="white", mew=0.6, zorder=6, label="best alone")
    for group in _near(numbers.chosen, apart, scores):
        names = ", ".join(str(index + 1) for index in group)
        axes.annotate(
            names, (apart[group[0]], scores[group[0]]), xytext=(7, 5), textcoords="offset points", fontsize=SMALL,
            color=ACCENT_TEXT, zorder=7,
        )  # fmt: skip
    low, high = finite_range(*apart, margin=0.12, least=0.01)
    axes.set_xlim(max(low, 0) if apart.min() > 0 else low, high)
    axes.set_ylim(*finite_range(*scores, margin=0.12, least=0.01))
    axes.xaxis.set_major_formatter(percent_ticks())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    dress(axes, xlabel="mean disagreement with the other candidates (pixels)", ylabel=f"{numbers.word} alone")
    axes.legend(frameon=False, fontsize=SMALL, loc="best", labelcolor=INK)


def _near(indices: list[int], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[list[int]]:
    """Points that share a label, because two labels would overlap."""
    groups: list[list[int]] = []
    for index in indices:
        for group in groups:
            first = group[0]
            if abs(x[index] - x[first]) <= 0.05 * np.ptp(x) and abs(y[index] - y[first]) <= 0.05 * np.ptp(y):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _draw_path(axes: Axes, numbers: SelectionNumbers) -> None:
    scores, kept = numbers.path_scores, numbers.kept
    steps = np.arange(1, len(scores) + 1)
    best = numbers.scores[numbers.best]
    axes.axhline(best, color=GREY, lw=1, ls=":", label=f"best alone, {number(best)}")
    if scores:
        axes.plot(steps[kept - 1 :], scores[kept - 1 :], "o-", color=MUTED, lw=1.1, ms=4, alpha=0.7)
        axes.plot(steps[:kept], scores[:kept], "o-", color=ACCENT, lw=2, ms=5.5, mec="white", mew=0.6, zorder=4)
        final = f"{plain(numbers.selector)}: {_count(kept, 'addition')}, {number(scores[kept - 1])}"
        axes.plot(kept, scores[kept - 1], "o", color=ACCENT, ms=10, mec=INK, mew=1.2, zorder=5, label=final)
    unseen = []
    if numbers.crossed is not None:
        unseen = [numbers.crossed.selected]
        axes.axhline(unseen[0], color=ACCENT, lw=1.2, ls="--", label=f"on images without a say, {number(unseen[0])}")
    axes.set_ylim(*finite_range(best, *scores, *unseen, margin=0.12, least=0.005))
    axes.set_xlim(0.4, len(scores) + 0.6 if scores else 1.6)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    dress(axes, xlabel="additions to the mean", ylabel=f"{numbers.word} of the mean")
    axes.legend(fontsize=SMALL, loc="best", labelcolor=INK, facecolor="white", framealpha=0.92, edgecolor="none")


def _count(how_many: int, what: str) -> str:
    return f"{how_many} {what}{'' if how_many == 1 else 's'}"
