"""Every combiner in every kind of test-time views, from the same snapshots: one table, tracked as a run.

Members predict validation and test images once for each kind of views; everything else is fitted on validation data as
`smp-ensemble ensemble` does it. The best member is chosen on validation data and is calibrated like the ensembles, with
its own threshold and the same views. Seconds are of prediction from raw images to masks, interleaved over all rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow  # noqa: TID251 (a project of its own: it opens its run as any user does)
import torch

from smp_ensemble import Engine, Ensemble, load_data, search_snapshots
from smp_ensemble.evaluation.measuring import measure_all
from smp_ensemble.evaluation.predictions import Predictions
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.precision import choose_device
from smp_ensemble.workflows.assembling import fit_ensemble
from smp_ensemble.workflows.combining import AUTO, Combination
from smp_ensemble.workflows.loading import load_members
from smp_ensemble.workflows.results import format_table

VIEWS = "none;flips;d4;scales:0.75,1,1.25;flips+scales:0.75,1,1.25"
COMBINERS = "mean;weighted;geometric;vote;majority;stacking"
IMAGES = 4
METRICS = ("iou", "boundary_iou", "ece", "nll", "brier", "aurc", "error_auroc", "coverage")


def main(arguments: list[str] | None = None) -> None:
    """Scores all rows and keeps them in `--output`; rows that stand there from an earlier call stay."""
    options = parse(arguments)
    output = Path(options.output)
    rows: dict[str, dict[str, Any]] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    splits = load_data(options.data)
    digest = splits.val.digest
    snapshots = search_snapshots(
        options.where, experiment=options.experiment, limit=options.max_members, dataset_digest=digest
    )
    members = load_members(snapshots, splits)
    device = choose_device(options.accelerator)
    engines: dict[str, Engine] = {}
    for views in options.views.split(";"):
        plain = Ensemble(members, mode=splits.task.mode, views=views, class_names=splits.task.class_names)
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name) / split for split in ("val", "test")]
            for folder in folders:
                folder.mkdir()
            engine = Engine(plain, device, options.precision)
            val, test = (
                Predictions(engine, data, folder=folder, label=folder.name)
                for data, folder in zip((splits.val, splits.test), folders, strict=True)
            )
            for combiner, combination in combinations(options, views).items():
                key = f"{views}|{combiner}"
                labels = [f"{one.model_id} (step {one.step})" for one in snapshots]
                kept, fitted = fit_ensemble(val, combination, labels)
                engines[key] = fitted.engine
                measured = measure_all(fitted, split="val", names=[labels[index] for index in kept])
                tested = measure_all(test.of_some(kept).combined_by(fitted.ensemble), split="test")
                best = measured.best_member
                rows[key] = describe(fitted.ensemble, measured.ensemble, tested.ensemble)
                alone = rows.setdefault(f"{views}|best member", {})
                if combiner == "mean":
                    single = Ensemble(
                        [members[best]],
                        mode=splits.task.mode,
                        views=views,
                        temperature=members[best].temperature,
                        threshold=members[best].threshold,
                        class_names=splits.task.class_names,
                    )
                    alone |= describe(single, measured.members[best], tested.members[best])
                    engines[f"{views}|best member"] = Engine(single, device, options.precision)
                print(key, {name: round(value, 4) for name, value in rows[key]["test"].items()}, flush=True)
                output.write_text(json.dumps(rows, indent=2), encoding="utf-8", newline="\n")
    for key, seconds in seconds_per_image(engines, splits.test, options.repeats).items():
        rows[key]["seconds"] = seconds
    output.write_text(json.dumps(rows, indent=2), encoding="utf-8", newline="\n")
    print("\n".join(format_table(table(rows))))
    threads = f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {threads}, {device}, {engine.precision}, torch {torch.__version__}")
    with mlflow.start_run(run_name="combining"):
        mlflow.log_params({"data": options.data, "members": ",".join(one.model_id for one in snapshots)})
        mlflow.log_dict(rows, "combining.json")
        mlflow.log_text("\n".join(format_table(table(rows))), "combining.txt")


def combinations(options: argparse.Namespace, views: str) -> dict[str, Combination]:
    """What is tried with the same predictions; post-processing with the plain mean only."""
    found = {name: Combination(name, views=views) for name in options.combiners.split(";")}
    if views == "none":
        found["mean, uncalibrated"] = Combination("mean", views=views, calibrate="none")
        found["mean, reject=0.8"] = Combination("mean", views=views, reject=0.8)
        found["vote, reject=0.75"] = Combination("vote", views=views, reject=0.75)
        found["mean, postprocess=auto"] = Combination("mean", views=views, postprocess=AUTO)
    return found


def describe(ensemble: Ensemble, val: Any, test: Any) -> dict[str, Any]:
    """The numbers of one row."""
    return {
        "members": len(ensemble.members),
        "weights": list(ensemble.weights),
        "temperature": ensemble.temperature,
        "threshold": ensemble.threshold,
        "postprocess": ensemble.postprocess.to_dict(),
        "val": {name: val.score.metrics[name] for name in METRICS},
        "test": {name: test.score.metrics[name] for name in METRICS},
    }


def seconds_per_image(engines: dict[str, Engine], data: Any, repeats: int) -> dict[str, float]:
    """Medians over interleaved repeats, after one warm-up, from raw images to masks."""
    images = [data.read(index)[0] for index in range(min(IMAGES, len(data)))]
    taken: dict[str, list[float]] = {key: [] for key in engines}
    for repeat in range(repeats + 1):
        for key, engine in engines.items():
            start = time.perf_counter()
            for image, probabilities in zip(images, engine.predict(images), strict=True):
                make_mask(engine.ensemble, image, probabilities)
            if repeat:
                taken[key].append((time.perf_counter() - start) / len(images))
    return {key: statistics.median(values) for key, values in taken.items()}


def table(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For people."""
    shown = []
    for key, row in sorted(rows.items(), key=lambda item: item[0].split("|")[0]):
        views, combiner = key.split("|")
        shown.append(
            {
                "views": views,
                "combiner": combiner,
                "members": row["members"],
                "T": round(row["temperature"], 3),
                "threshold": round(row["threshold"], 3),
                "val IoU": row["val"]["iou"],
                "test IoU": row["test"]["iou"],
                "val ECE": row["val"]["ece"],
                "test ECE": row["test"]["ece"],
                "test AURC": row["test"]["aurc"],
                "coverage": row["test"]["coverage"],
                "s/image": row.get("seconds"),
            }
        )
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the entry point `combining`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for smp-ensemble, with test images")
    parser.add_argument("--where", default="", help="which snapshots, as for smp-ensemble")
    parser.add_argument("--experiment", default=None)
    parser.add_argument("--max-members", type=int, default=5)
    parser.add_argument("--views", default=VIEWS, help="kinds of views, separated by ;")
    parser.add_argument("--combiners", default=COMBINERS, help="names, separated by ;")
    parser.add_argument("--repeats", type=int, default=3, help="of the measurement of time")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", default="combining.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
