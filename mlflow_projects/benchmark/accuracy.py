"""Accuracy at equal budget: runs a declared study, each cell at most once, and says what its rows show."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from study.networks import Setting
from study.plan import REFERENCE, read_rows, read_study
from study.runner import described, run_study

FOLDER = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    """Runs what has no row yet, then writes the page."""
    options = parse(arguments)
    if options.overview:
        from study.overview import read_overview, write_overview

        write_overview(read_overview(FOLDER / "studies", FOLDER / "results"), Path(options.overview))
        print(f"overview: {options.overview}")
        return
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    path = Path(options.study)
    if not path.suffix:
        path = FOLDER / "studies" / f"{options.study}.yaml"
    study = read_study(path)
    rows_path = Path(options.rows) if options.rows else FOLDER / "results" / f"{study.name}.jsonl"
    setting = Setting(options.accelerator, options.precision, Path(options.scratch) / study.name)
    stages = set(options.stages.split(",")) if options.stages else None
    with tracked(study, options) as finished:
        progress = run_study(
            study, rows_path, setting, jobs=options.jobs, seconds=options.seconds, finished=finished,
            select=lambda cell: stages is None or cell.stage in stages,
        )  # fmt: skip
    print(f"{progress.finished} of {progress.total} cells have a row in {rows_path}")
    for cell, reason in progress.failed.items():
        print(f"failed: {cell}: {reason}")
    if options.page:
        from study.page import write_page

        write_page(study, read_rows(rows_path), Path(options.page))
        print(f"page: {options.page}")


def _ignored(row: dict[str, Any]) -> None:
    """Where nothing is tracked, nobody is told."""
    del row


class tracked:  # noqa: N801 (used like a function)
    """A run of MLflow for the study and one for each cell, where MLflow is there and wanted."""

    def __init__(self, study: Any, options: argparse.Namespace) -> None:
        self._study, self._options = study, options
        self._mlflow: Any = None

    def __enter__(self) -> Any:
        if self._options.track == "false":
            return _ignored
        import mlflow  # noqa: TID251 (a project on the public API: it opens its run as any user does)

        self._mlflow = mlflow
        mlflow.start_run(run_name=None if mlflow.active_run() else f"accuracy {self._study.name}")
        mlflow.log_params(described(self._study))
        mlflow.set_tag("smp_ensemble.kind", "study")
        return self._log

    def _log(self, row: dict[str, Any]) -> None:
        with self._mlflow.start_run(run_name=row["id"], nested=True):
            known = ("method", "stage", "epochs", "fold", "seed", "device", "precision", "torch")
            recipe = row["recipe"] if row["stage"] != REFERENCE else {}
            self._mlflow.log_params({name: row[name] for name in known if name in row} | recipe)
            for name, system in row["systems"].items():
                key = name.replace(" ", "_")
                self._mlflow.log_metrics({f"{key}/val_iou": system["val_iou"], f"{key}/val_nll": system["val_nll"]})
            self._mlflow.log_metric("seconds", row.get("seconds", 0.0))
            self._mlflow.log_dict(row, "row.json")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._mlflow is not None:
            self._mlflow.end_run("FAILED" if kind else "FINISHED")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What to run, where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--study", default="tiny", help="name of a file in studies/, or a path to one")
    parser.add_argument("--rows", default="", help="file of finished rows; empty: results/STUDY.jsonl")
    parser.add_argument("--page", default="", help="where to write the page of results, as Markdown; empty: nowhere")
    parser.add_argument(
        "--overview", default="", help="nothing is run: tables of all studies are written anew into this page"
    )
    parser.add_argument("--scratch", default="study-weights", help="folder for weights that references need, by study")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--seconds", type=float, default=None, help="after so many no cell is started")
    parser.add_argument("--stages", default="", help="tune, run, reference, student, separated by commas; empty: all")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", default="auto", help="Lightning's words, or auto")
    parser.add_argument("--track", default="true", help="whether cells become runs in MLflow; false where it is not")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
