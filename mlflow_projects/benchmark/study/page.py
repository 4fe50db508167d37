"""The page of results: tables and figures from the rows alone, so that one command writes it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from study.figures import draw_curves, draw_differences, runs_of
from study.lines import (
    CHOSEN,
    CHOSEN_SINGLE,
    LEAST_GAIN,
    LEAST_SHARE,
    SINGLE,
    WORDS,
    Line,
    candidates_of,
    is_crossed,
    lines_of,
)
from study.plan import BASELINE, SEEDS, TUNE, Study, cells_of
from study.statistics import choose, collect, difference, pooled, table_of
from study.systems import REPORTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from study.statistics import Key


def write_page(study: Study, rows: Mapping[str, dict[str, Any]], path: Path, figures: Path | None = None) -> None:
    """Writes Markdown, and its figures beside it.

    Args:
        study: What was run.
        rows: By cell.
        path: Of the page.
        figures: Folder of the figures; None: `images` beside the page.
    """
    folder = figures or path.parent / "images"
    parts = [_head(study, rows)]
    for epochs in study.epochs:
        systems = collect(rows.values(), epochs)
        lines = lines_of(study, systems)
        if not lines:
            parts.append(f"## {epochs} epochs\n\nNo seed of `{BASELINE}` has all folds yet.\n")
            continue
        name = f"{study.name}-{epochs}"
        folder.mkdir(parents=True, exist_ok=True)
        draw_differences(lines[1:], folder / f"{name}.png", f"{study.name}, {epochs} epochs: test IoU against `single`")
        draw_curves(rows, study, epochs, folder / f"{name}-curves.png")
        where = folder.relative_to(path.parent).as_posix() if folder.is_relative_to(path.parent) else folder.as_posix()
        parts += [
            f"## {epochs} epochs\n",
            _table(lines),
            _choices(study, systems),
            f"![differences to single]({where}/{name}.png)\n",
            _verdict(lines),
            _students(study, lines),
            "### Corrupted test images\n",
            _corrupted(study, systems, lines),
            "### Why\n",
            _why(study, rows, systems, epochs),
            f"![validation IoU along training]({where}/{name}-curves.png)\n",
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8", newline="\n")


def _head(study: Study, rows: Mapping[str, dict[str, Any]]) -> str:
    cells = cells_of(study)
    runs = [row for row in rows.values() if row["stage"] != TUNE]
    trained = [row for row in rows.values() if "seconds" in row]
    hours = sum(row["seconds"] for row in trained) / 3600
    devices = sorted({row["device"] for row in rows.values()})
    versions = sorted({f"torch {row['torch']}, smp {row['smp']}, {row['precision']}" for row in rows.values()})
    turn0 = [method.name for method in study.methods if method.turn == 0]
    return "\n".join(
        [
            f"# Results: {study.name}",
            "",
            *([f"In a few words: {study.about}.", ""] if study.about else []),
            "Written from the rows in",
            f"[results/{study.name}.jsonl](../../mlflow_projects/benchmark/results/{study.name}.jsonl) by",
            "",
            f"    python mlflow_projects/benchmark/accuracy.py --study {study.name} --stages none --track false \\",
            f"        --page docs/results/{study.name}.md",
            "",
            "Without `--stages none`, cells that have no row yet are run first. What all studies say together:",
            "[results.md](../results.md).",
            "",
            f"- {len(rows)} of {len(cells)} cells are finished: {len(runs)} of those that are reported, and",
            f"  {len(rows) - len(runs)} that tried recipes. First come {', '.join(turn0)}, seed by seed; then others.",
            f"  Training took {hours:.1f} hours so far, summed over processes side by side, on {', '.join(devices)}",
            f"  ({'; '.join(versions)}).",
            f"- {study.arch} with {study.encoder_name} from scratch, {_words(study.fixed)}.",
            *([f"  {100 * study.train_share:g} % of the training images."] if study.train_share < 1 else []),
            *_recipes(study),
            f"- {study.folds} folds by group: each group is test data once; the next fold is validation data, on which",
            "  temperature, threshold, greedy selection and recipe are fitted, for every system alike.",
            "- Differences are to `single` at the same budget, with 95 % intervals from a bootstrap over seeds and",
            "  groups. Where one seed is there, they are over groups alone and say nothing of other seeds.",
            "",
        ]
    )


def _recipes(study: Study) -> list[str]:
    if len(study.grid) == 1:
        return [f"  Every method trains equally many steps, with one recipe for all: {_words(study.grid[0])}."]
    return [
        "  Every method trains equally many steps, with the recipe (optimizer and rate) that is best for it on",
        f"  validation data, of {len(study.grid)}: {'; '.join(_words(recipe) for recipe in study.grid)}.",
    ]


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(lines: Sequence[Line]) -> str:
    found = [
        "IoU, Dice and boundary IoU in points; bold: the interval leaves 0 out; cost: networks that run for one image.",
        "",
        "| system | seeds | cost | val IoU | test IoU | difference in IoU | Dice | boundary IoU | ECE | NLL "
        "| difference in NLL x 1000 | AURC | training s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        table = line.table
        seconds = [system["seconds"] for system in table.systems.values() if system["seconds"] is not None]
        own = line.key == SINGLE
        cells = [
            line.label,
            str(len(table.seeds)),
            f"{table.mean('cost'):.3g}",
            f"{100 * table.mean('val_iou'):.2f}",
            f"{100 * pooled(table):.2f}",
            "" if own else line.iou.text(),
            f"{100 * pooled(table, 'dice'):.2f}",
            f"{100 * table.mean('boundary_iou'):.2f}",
            f"{table.mean('ece'):.4f}",
            f"{pooled(table, 'nll'):.4f}",
            "" if own else line.nll.text(1000.0, 1),
            f"{table.mean('aurc'):.4f}",
            f"{np.mean(seconds):.0f}" if seconds else "several",
        ]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _choices(study: Study, systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]]) -> str:
    found = []
    for words, wide in (("its own validation data", False), ("that of other folds too, without its test data", True)):
        _, names = choose(systems, candidates_of(study, systems), study.folds, wide=wide)
        listed = [f"fold {fold}: {method}, {WORDS[system]}" for fold, (method, system) in sorted(names.items())]
        found.append(f"Chosen for each fold on {words}: {'; '.join(listed)}.")
    found.append("Flips, and methods with fewer seeds, take no part.")
    if is_crossed(systems, candidates_of(study, systems)):
        found += [
            "A greedy selection is judged by its cross-fitted score: each group of validation images by what is",
            'selected on the others. "val IoU" in the table is that on the images it was selected on.',
        ]
    return "\n".join([*found, ""])


def _verdict(lines: Sequence[Line]) -> str:
    """The target in the study's own numbers: kept or missed, and by how much."""
    by_key = {line.key: line for line in lines}
    chosen, one = by_key.get(CHOSEN), by_key.get(CHOSEN_SINGLE)
    if chosen is None or one is None:
        return ""
    gain, low = 100 * chosen.iou.value, 100 * chosen.iou.low
    first = "kept" if chosen.iou.value >= LEAST_GAIN and low > 0 else "missed"
    second = "kept" if chosen.nll.value < 0 else "missed"
    if second == "kept" and not chosen.nll.certain:
        second = "kept, not for certain"
    third = "there is no certain gain to keep"
    if low > 0:
        share = one.iou.value / chosen.iou.value
        third = f"**{'kept' if share >= LEAST_SHARE else 'missed'}** ({100 * share:.0f} %)"
    return "\n".join(
        [
            "Against the target:",
            "",
            f"- at least 1.0 point with an interval above 0: **{first}** ({gain:+.2f}, lower end {low:+.2f});",
            f"- its calibrated log-loss lower than `single`: **{second}** ({chosen.nll.text(1000.0, 1)} thousandths);",
            f"- one network keeps at least 70 % of the gain: {third}.",
            "",
        ]
    )


def _students(study: Study, lines: Sequence[Line]) -> str:
    """What a network keeps of the gain of the reference that taught it."""
    by_key = {line.key: line for line in lines}
    teacher = by_key.get((SEEDS, "all"))
    taught = [by_key[name, "last"] for name in study.students if (name, "last") in by_key]
    if teacher is None or not taught:
        return ""
    found = [
        "### One student of an ensemble",
        "",
        f"The teacher is the mean of {study.reference_seeds} trainings: {teacher.iou.text()} points to `single`.",
        "Each student trains as `single` does, from scratch, with a share `alpha` of the masks in its loss. The gain",
        "kept is the student's difference to `single` as a share of the teacher's.",
        "",
        "| student | cost | difference to single | difference to the teacher | gain kept | NLL x 1000 to single |",
        "|---|---|---|---|---|---|",
    ]
    for line in taught:
        kept = f"{100 * line.iou.value / teacher.iou.value:.0f} %" if teacher.iou.value > 0 else "no gain to keep"
        behind = difference(line.table, teacher.table).text()
        name = f"{line.label} ({_words(study.students[line.key[0]])})"
        found.append(f"| {name} | 1 | {line.iou.text()} | {behind} | {kept} | {line.nll.text(1000.0, 1)} |")
    return "\n".join([*found, ""])


def _corrupted(
    study: Study, systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]], lines: Sequence[Line]
) -> str:
    found = [
        "Test IoU in points, and the difference to `single` on the same images.",
        "",
        f"| system | {' | '.join(study.corruptions)} |",
        f"|---|{'---|' * len(study.corruptions)}",
    ]
    for line in lines:
        cells = []
        for kind in study.corruptions:
            table = table_of(line.table.systems, study.folds, kind)
            base = table_of(systems[SINGLE], study.folds, kind)
            assert table is not None
            assert base is not None
            against = "" if line.key == SINGLE else f" ({100 * (pooled(table) - pooled(base)):+.2f})"
            cells.append(f"{100 * pooled(table):.2f}{against}")
        found.append(f"| {line.label} | {' | '.join(cells)} |")
    return "\n".join([*found, ""])


def _why(
    study: Study,
    rows: Mapping[str, dict[str, Any]],
    systems: Mapping[Key, Mapping[tuple[int, int], dict[str, Any]]],
    epochs: int,
) -> str:
    found = [
        "Disagreement: share of validation pixels on which two members differ, mean over pairs. Members: test IoU of",
        "each alone, mean and best (seen with hindsight). Gap: IoU of the last snapshot on training images (at 0.5)",
        "minus that on validation images (at its tuned threshold).",
        "",
        "| method | recipes | members | disagreement | mean member | best member | mean of all | gap train - val |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in study.methods:
        cells = runs_of(rows, method.name, epochs)
        if not cells:
            continue
        recipes = sorted({_words(row["recipe"]) for row in cells})
        members = [
            pooled(table)
            for name in sorted({name for row in cells for name in row["systems"]})
            if (name.startswith("member") or (name == "last" and method.trainer not in REPORTED))
            and (table := table_of(systems[method.name, name], study.folds)) is not None
        ]
        whole = table_of(systems.get((method.name, "all"), {}), study.folds)
        differ = [row["disagreement"] for row in cells if "disagreement" in row]
        gaps = [row["train_iou"] - row["systems"]["last"]["val_iou"] for row in cells]
        values = [
            method.name,
            "; ".join(recipes),
            f"{len(members) or 1}",
            f"{np.mean(differ):.4f}" if differ else "",
            f"{100 * np.mean(members):.2f}" if members else "",
            f"{100 * max(members):.2f}" if members else "",
            f"{100 * pooled(whole):.2f}" if whole is not None else "",
            f"{100 * np.mean(gaps):+.1f}",
        ]
        found.append(f"| {' | '.join(values)} |")
    return "\n".join([*found, ""])
