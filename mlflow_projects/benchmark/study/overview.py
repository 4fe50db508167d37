"""All studies side by side: tables and a figure, from the rows alone, put into a page that people wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from study.figures import draw_overview
from study.lines import CHOSEN, CHOSEN_SINGLE, CHOSEN_WIDE, LEAST_GAIN, LEAST_SHARE, SINGLE, lines_of
from study.plan import SEEDS, cells_of, read_rows, read_study
from study.statistics import collect, difference, pooled, table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from study.lines import Line
    from study.plan import Study
    from study.statistics import Estimate, Key, Table

BEGIN, END = "<!-- tables: written by accuracy.py -->", "<!-- end of the tables -->"
COLUMNS = (
    ("single, batch norm chosen on val", "single", ("best",)),
    ("swa", "swa", ("last",)),
    ("swa, batch norm chosen on val", "swa", ("best of crops",)),
    ("ema", "ema", ("last",)),
    ("fge", "fge", ("all", "last")),
    ("fge, batch norm chosen on val", "fge", ("all best", "best")),
    ("fge, average of the weights", "fge", ("soup",)),
    ("snapshot", "snapshot", ("all",)),
    ("snapshot, batch norm chosen on val", "snapshot", ("all best",)),
    ("snapshot, average of the weights", "snapshot", ("soup",)),
    ("three seeds", SEEDS, ("all",)),
    ("chosen on val", "", ("",)),
)
"""Heading, trainer, and the names of the system to take, the first that is there."""


KINDS = ("blur", "brightness")
STATISTICS = {
    "refreshed": ("last", "images, not running averages"),
    "all refreshed": ("all", "images, not running averages"),
    "all best": ("all", "chosen on val, not running averages"),
    "crops": ("last", "crops, not images"),
    "best": ("last", "chosen on val, not running averages"),
    "best of crops": ("last", "chosen on val, not images"),
    "soup crops": ("soup", "crops, not images"),
    "soup best": ("soup", "chosen on val, not images"),
}
"""Systems that differ from another one in their batch-norm statistics alone, and how."""


@dataclass(frozen=True)
class Row:
    """One study at one budget.

    Attributes:
        study: What was run.
        epochs: Budget.
        finished: Cells of the study, at all budgets, that have a row.
        seeds: Of `single`.
        steps: Optimizer steps of a training, mean over folds.
        device: Where it ran.
        single: Test IoU of `single`.
        lines: All systems of the study.
    """

    study: Study
    epochs: int
    finished: tuple[int, int]
    seeds: int
    steps: int
    device: str
    single: float
    lines: Mapping[Key, Line]

    @property
    def picked(self) -> dict[str, Line]:
        """The system of each heading that the study has."""
        found = {}
        for heading, trainer, systems in COLUMNS:
            named = [one.name for one in self.study.methods if one.trainer == trainer and not one.recipe_of]
            named = named or [trainer]
            keys = [(method, system) for method in named for system in systems] if trainer else [CHOSEN]
            there = [self.lines[key] for key in keys if key in self.lines]
            if there:
                found[heading] = there[0]
        return found

    @property
    def label(self) -> str:
        """The study, and its budget where it has several."""
        return self.study.name if len(self.study.epochs) == 1 else f"{self.study.name}, {self.epochs} epochs"


def read_overview(studies: Path, results: Path) -> list[Row]:
    """All studies that have rows, in the order of their names."""
    found = []
    for path in sorted(results.glob("*.jsonl"), key=lambda path: path.stem):
        study, rows = read_study(studies / f"{path.stem}.yaml"), read_rows(path)
        for epochs in study.epochs:
            lines = {line.key: line for line in lines_of(study, collect(rows.values(), epochs))}
            if not lines:
                continue
            base = lines[SINGLE].table
            steps = {row["steps"] for row in rows.values() if row["epochs"] == epochs and "steps" in row}
            found.append(
                Row(
                    study, epochs, (len(rows), len(cells_of(study))), len(base.seeds), round(sum(steps) / len(steps)),
                    next(iter(rows.values()))["device"], pooled(base), lines,
                )
            )  # fmt: skip
    return found


def write_overview(rows: Sequence[Row], page: Path) -> None:
    """Replaces what stands between the two marks of the page, and the figure beside the studies' own pages.

    Raises:
        ValueError: The page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page}: expected the lines '{BEGIN}' and '{END}', between which the tables are written")
    figure = page.parent / "results" / "images" / "overview.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    panels = [(heading, [row.picked.get(heading) for row in rows]) for heading, *_ in COLUMNS]
    draw_overview([row.label for row in rows], panels, figure)
    parts = [
        BEGIN,
        "",
        _studies(rows),
        "The target: what is chosen on validation data beats `single` at the same budget by a point of test IoU, with",
        "an interval above 0, and has less calibrated log-loss; one network, chosen in the same way, keeps 70 %. For",
        "each fold its own validation data choose, five groups of images; beside it, those of other folds choose too.",
        "",
        _targets(rows),
        "Difference in test IoU to `single` at the same budget, in points, with 95 % intervals (bold: 0 is outside):",
        "",
        _differences(rows, lambda line: line.iou, 100.0, 2),
        "The same in calibrated log-loss, in thousandths (lower is better):",
        "",
        _differences(rows, lambda line: line.nll, 1000.0, 1),
        "What batch norm is measured on, for the same weights: differences in IoU (points) and calibrated log-loss",
        "(thousandths) on test data, and in IoU on corrupted test images.",
        "",
        _batch_norm(rows),
        "What greedy selection adds to the mean of all, in points of IoU: on the validation images that it looked at,",
        "on validation images that had no say (cross-fitted, where rows have it), and on test images.",
        "",
        _selection(rows),
        "![differences to single in all studies](results/images/overview.png)",
        "",
        END,
    ]
    before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    page.write_text(before + "\n".join(parts) + after, encoding="utf-8", newline="\n")


def _studies(rows: Sequence[Row]) -> str:
    found = [
        "| study | what is particular | network | steps | seeds x folds | cells finished | where | `single` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        study = row.study
        cells = [
            f"[{row.label}](results/{study.name}.md)",
            study.about,
            f"{study.arch}, {study.encoder_name}",
            str(row.steps),
            f"{row.seeds} x {study.folds}",
            f"{row.finished[0]} of {row.finished[1]}",
            row.device,
            f"{100 * row.single:.2f}",
        ]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _targets(rows: Sequence[Row]) -> str:
    found = [
        "| study | steps | seeds | chosen on val: IoU | log-loss | networks | one network: IoU | target | "
        "chosen on val of other folds too: IoU | log-loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        chosen, one, wide = (row.lines[key] for key in (CHOSEN, CHOSEN_SINGLE, CHOSEN_WIDE))
        cells = [
            row.label,
            str(row.steps),
            str(row.seeds),
            chosen.iou.text(),
            chosen.nll.text(1000.0, 1),
            f"{chosen.table.mean('cost'):.1f}",
            one.iou.text(),
            verdict(chosen.iou, chosen.nll, one.iou),
            wide.iou.text(),
            wide.nll.text(1000.0, 1),
        ]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def verdict(iou: Estimate, loss: Estimate, one: Estimate) -> str:
    """Whether the target is kept, and what is missing.

    Args:
        iou: What is chosen gains, as a share.
        loss: The same in log-loss.
        one: What one network gains in IoU.
    """
    missing = []
    if iou.value < LEAST_GAIN:
        missing.append(f"IoU by {100 * (LEAST_GAIN - iou.value):.1f} points")
    if iou.low <= 0:
        missing.append("certainty")
    if loss.value >= 0:
        missing.append("log-loss")
    share = one.value / iou.value if iou.value > 0 else 0.0
    if share < LEAST_SHARE:
        missing.append(f"one network ({100 * max(share, 0):.0f} %)")
    return f"missed: {', '.join(missing)}" if missing else f"kept (one network {100 * share:.0f} %)"


def _differences(rows: Sequence[Row], of: Callable[[Line], Estimate], factor: float, digits: int) -> str:
    headings = [one[0] for one in COLUMNS if any(one[0] in row.picked for row in rows)]
    found = [f"| study | {' | '.join(headings)} |", f"|---|{'---|' * len(headings)}"]
    for row in rows:
        cells = [of(row.picked[heading]).text(factor, digits) if heading in row.picked else "" for heading in headings]
        found.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _batch_norm(rows: Sequence[Row]) -> str:
    kinds = [kind for kind in KINDS if any(kind in row.study.corruptions for row in rows)]
    found = [
        f"| study | weights | statistics of | IoU | log-loss | {' | '.join(kinds)} |",
        f"|---|---|---|---|---|{'---|' * len(kinds)}",
    ]
    for row in rows:
        for (method, system), line in row.lines.items():
            if system not in STATISTICS:
                continue
            other = row.lines[method, STATISTICS[system][0]]
            one, against = line.table, other.table
            cells = [
                row.label,
                other.label,
                STATISTICS[system][1],
                difference(one, against).text(),
                difference(one, against, "nll").text(1000.0, 1),
                *(_on_corrupted(row.study, one, against, kind) for kind in kinds),
            ]
            found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _selection(rows: Sequence[Row]) -> str:
    found = ["| study | candidates | looked at | no say | test | test log-loss |", "|---|---|---|---|---|---|"]
    for row in rows:
        for (method, system), line in row.lines.items():
            if system not in {"greedy", "greedy refreshed"}:
                continue
            greedy, every = line.table, row.lines[method, system.replace("greedy", "all")]
            own = greedy.mean("val_iou") - every.table.mean("val_iou")
            crossed = all("cross_iou" in one for one in greedy.systems.values())
            unseen = f"{100 * (greedy.mean('cross_iou') - every.table.mean('val_iou')):+.2f}" if crossed else ""
            cells = [
                row.label,
                every.label.replace(", mean of all", ""),
                f"{100 * own:+.2f}",
                unseen,
                difference(greedy, every.table).text(),
                difference(greedy, every.table, "nll").text(1000.0, 1),
            ]
            found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _on_corrupted(study: Study, one: Table, against: Table, kind: str) -> str:
    if kind not in study.corruptions:
        return ""
    a, b = (table_of(table.systems, study.folds, kind) for table in (one, against))
    assert a is not None
    assert b is not None
    return difference(a, b).text()
