"""The page: everything that was measured of an ensemble, in one HTML file that needs nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from smp_ensemble.evaluation import sections
from smp_ensemble.evaluation.drawing import number, png_bytes
from smp_ensemble.evaluation.example_sheet import draw_examples
from smp_ensemble.evaluation.figures import draw_differences, draw_reliability, draw_risk_coverage, draw_scores
from smp_ensemble.evaluation.findings import find
from smp_ensemble.evaluation.heat_maps import draw_diversity
from smp_ensemble.evaluation.markup import Html, Picture, document, element
from smp_ensemble.evaluation.summary import headline, summary_json, versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from smp_ensemble.evaluation.findings import Findings
    from smp_ensemble.evaluation.measurement import Example, Measurement

_TILES = ("iou", "dice", "boundary_iou", "ece", "error_auroc", "coverage")


def write_page(
    measurement: Measurement, examples: Sequence[Example], folder: Path, *, title: str, notes: Sequence[str] = ()
) -> Path:
    """Writes `report.html`, the same figures as PNG, and `report.json` into a folder.

    `scores.png`, `reliability.png` and `risk_coverage.png` are always there; `differences.png` and `diversity.png`
    where there are several members, `examples.png` where there are examples. The page holds its pictures and its
    style, runs no script and makes no request.

    Args:
        measurement: What was measured.
        examples: Images to look at, in the order of their rows.
        folder: Where the files go; made if it is not there.
        title: Of the page.
        notes: Sentences to print below the headline.

    Returns:
        The path of `report.html`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    findings = find(measurement)
    figures = draw_figures(measurement, findings, examples)
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(figure.png)
    values = json.dumps(summary_json(measurement, findings), indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "report.json").write_text(values + "\n", encoding="utf-8")
    path = folder / "report.html"
    path.write_text(build_page(measurement, findings, figures, title=title, notes=notes), encoding="utf-8")
    return path


def draw_figures(measurement: Measurement, findings: Findings, examples: Sequence[Example]) -> dict[str, Picture]:
    """Each figure that applies, by the name of its file without `.png`; its title is what its alt text says."""
    figures = {
        "scores": draw_scores(measurement, findings),
        "reliability": draw_reliability(measurement),
        "risk_coverage": draw_risk_coverage(measurement),
    }
    if measurement.members:
        figures["differences"] = draw_differences(measurement, findings)
    if measurement.diversity is not None:
        figures["diversity"] = draw_diversity(measurement)
    if examples:
        figures["examples"] = draw_examples(examples, measurement.task)
    return {
        name: Picture(png_bytes(figure), " ".join(figure.get_suptitle().split())) for name, figure in figures.items()
    }


def build_page(
    measurement: Measurement,
    findings: Findings,
    figures: Mapping[str, Picture],
    *,
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """The page as text; `figures` are those of `draw_figures`."""
    parts = {
        "Models": sections.models(measurement, findings, figures),
        "Classes": sections.classes(measurement, findings, figures),
        "Calibration": sections.calibration(measurement, figures),
        "Uncertainty": sections.uncertainty(measurement, figures),
        "Diversity": sections.diversity(measurement, figures),
        "Examples": sections.examples(figures),
    }
    shown = {heading: part for heading, part in parts.items() if part}
    links = [element("li", element("a", heading, href=f"#{heading.lower()}")) for heading in shown]
    said = [element("p", sentence) for sentence in headline(measurement, findings)]
    metrics = measurement.ensemble.score.metrics
    tiles = [
        element("li", element("span", sections.COLUMNS[name][0]), element("b", number(metrics[name])))
        for name in sections.shown_metrics([measurement.ensemble])
        if name in _TILES
    ]
    known = ", ".join(f"{name} {number_}" for name, number_ in versions().items())
    return document(
        title,
        element("header", element("p", f"Evaluation on {measurement.split}", class_="eyebrow"), element("h1", title),
                _facts(measurement, findings)),
        element("div", *said, class_="headline"),
        element("ul", *tiles, class_="tiles"),
        *(element("p", note, class_="note") for note in notes),
        element("nav", element("ul", *links), aria_label="Sections"),
        *shown.values(),
        element("footer", f"Computed with {known}. {findings.resamples} bootstrap resamples."),
    )  # fmt: skip


def _facts(measurement: Measurement, findings: Findings) -> Html:
    data, task = measurement.data, measurement.task
    facts = {
        "Data set": data.name,
        "Digest": element("code", data.digest),
        "Split": measurement.split,
        "Images": str(len(measurement.images)),
        "Groups": str(findings.units) if findings.grouped else "none",
        "Mode": task.mode,
        "Members": str(len(measurement.members) or 1),
    }
    if task.mode != "multiclass":
        facts["Threshold"] = number(measurement.ensemble.score.threshold, 3)
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", fact)) for name, fact in facts.items()),
        class_="facts",
    )
