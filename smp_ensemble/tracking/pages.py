"""The evaluation page in a run: `report/report.html`, its figures and its numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.evaluation.measuring import choose_examples
from smp_ensemble.evaluation.page import write_page

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smp_ensemble.data.datasets import SegmentationDataset
    from smp_ensemble.evaluation.measurement import Measurement
    from smp_ensemble.inference.engine import Engine
    from smp_ensemble.tracking.runs import TrackedRun

REPORT_FOLDER = "report"


def log_report(
    run: TrackedRun,
    measurement: Measurement,
    data: SegmentationDataset,
    engine: Engine,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> list[str]:
    """Keeps `report/report.html` with its figures as PNG and its numbers as JSON; returns the names of the files."""
    examples = choose_examples(measurement, data, engine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_page(measurement, examples, folder, title=title, notes=notes)
        paths = sorted(folder.iterdir())
        for path in paths:
            run.log_file(path, REPORT_FOLDER)
    return [path.name for path in paths]
