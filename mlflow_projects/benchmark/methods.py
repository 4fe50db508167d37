"""Every training method on one data set at equal epochs: one table, tracked as a run.

Each row is a `smp-ensemble train` and a `smp-ensemble ensemble` of all its snapshots, as a user would type them. Scores
are at each model's own threshold, tuned on validation data; "best single" is chosen on validation data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import mlflow  # noqa: TID251 (a project on the public API: it opens its run as any user does)
import torch

import smp_ensemble

REPEATS = 5
IMAGES = 8


def methods(options: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """Name of each row: how many trainings it costs, and what `train` is told."""
    cycles = ["--cycles", str(options.cycles)]
    every = json.dumps({"every_epochs": options.epochs // options.cycles})
    plan = str(options.repeats)
    return {
        "single": (1, ["--trainer", "single"]),
        "snapshot": (1, ["--trainer", "snapshot", *cycles]),
        "checkpoints": (1, ["--trainer", "checkpoints", "--trainer-options", every]),
        "fge": (1, ["--trainer", "fge"]),
        "swa": (1, ["--trainer", "swa"]),
        "ema": (1, ["--trainer", "ema"]),
        "boost": (1, ["--trainer", "boost", *cycles]),
        "single, lookahead_sgd": (1, ["--trainer", "single", "--optimizer", "lookahead_sgd"]),
        f"single, seeds={plan}": (options.repeats, ["--trainer", "single", "--seeds", plan]),
        f"single, folds={plan}": (options.repeats, ["--trainer", "single", "--folds", plan]),
    }


def main(arguments: list[str] | None = None) -> None:
    """Trains and scores the methods one after the other; what is done already is read from `--output`."""
    options = parse(arguments)
    output = Path(options.output)
    rows = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    with mlflow.start_run():
        wanted = methods(options)
        for name in [one.strip() for one in options.methods.split(";")] if options.methods else list(wanted):
            if name not in wanted:
                raise SystemExit(f"unknown method '{name}': expected one of {'; '.join(wanted)}")
            if name not in rows:
                cost, arguments = wanted[name]
                rows[name] = {"trainings": cost, **measure(arguments, options)}
                output.write_text(json.dumps(rows, indent=2), encoding="utf-8", newline="\n")
            text = table(rows)
            mlflow.log_text(text, "methods.md")
            mlflow.log_dict(rows, "methods.json")
            print(text, flush=True)


def measure(arguments: list[str], options: argparse.Namespace) -> dict[str, float]:
    """One row: trains, builds an ensemble of all snapshots, and measures what it costs."""
    data = ["--data", options.data, "--accelerator", options.accelerator]
    how = ["--epochs", str(options.epochs), "--lr", str(options.lr), "--seed", str(options.seed)]
    before = cpu_seconds()
    trained = command("train", *data, *how, *arguments)
    cpu = cpu_seconds() - before
    run = mlflow.MlflowClient().get_run(trained["run_id"])
    snapshots = model_ids(trained)
    built = command("ensemble", *data, "--pick", ",".join(snapshots), "--selector", "all", "--max-members", "99")
    best = built["members"].index(built["best_member"])
    row = {
        "members": len(snapshots),
        "seconds": (run.info.end_time - run.info.start_time) / 1000,
        "cpu_seconds": cpu,
        "prediction": prediction_cost(built["uri"], built["best_member"], options),
    }
    for split in ("val", "test"):
        if built[split] is not None:
            ious = [score_of(one, "iou") for one in built[split]]
            row[f"single_{split}"] = ious[best]
            row[f"combined_{split}"] = ious[-1]
            row[f"combined_{split}_ece"] = score_of(built[split][-1], "ece")
            row[f"mean_{split}"] = statistics.fmean(ious[:-1])
    return row


def score_of(scores: dict[str, float | None], name: str) -> float:
    """A score; one that is not a number comes as null."""
    value = scores[name]
    return math.nan if value is None else value


def cpu_seconds() -> float:
    """Processor time of the commands so far: on a shared machine it varies less than the clock's."""
    times = os.times()
    return times.children_user + times.children_system


def model_ids(trained: dict) -> list[str]:
    """Ids of all snapshots that a training, or a plan of several, left."""
    client = mlflow.MlflowClient()
    experiment = client.get_run(trained["run_id"]).info.experiment_id
    parents = {trained["run_id"]}
    found = client.search_runs([experiment], "tags.`mlflow.parentRunId` != ''", max_results=1000)
    parents |= {run.info.run_id for run in found if run.data.tags["mlflow.parentRunId"] in parents}
    snapshots = [
        run.data.tags["smp_ensemble.model_id"]
        for run in found
        if run.data.tags["mlflow.parentRunId"] in parents and run.data.tags.get("smp_ensemble.kind") == "snapshot"
    ]
    return snapshots[::-1]


def prediction_cost(combined: str, single: str, options: argparse.Namespace) -> float:
    """Seconds of the ensemble over seconds of one member, on the same images: interleaved, median of the ratios."""
    data = smp_ensemble.load_data(options.data)
    dataset = data.val.subset(range(min(IMAGES, len(data.val))))
    images = torch.stack([torch.from_numpy(dataset.read(index)[0]).permute(2, 0, 1) for index in range(len(dataset))])
    engines = [smp_ensemble.Engine(smp_ensemble.load_model(uri)) for uri in (combined, single)]
    ratios = []
    for _ in range(REPEATS + 1):
        seconds = []
        for engine in engines:
            begin = time.perf_counter()
            engine(images).cpu()
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


def command(*arguments: str) -> dict:
    """Runs a command as a user would; its result."""
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
    environment["MLFLOW_TRACKING_URI"] = mlflow.get_tracking_uri()
    done = subprocess.run(  # noqa: S603 (our own command, with our own words)
        [sys.executable, "-m", "smp_ensemble.cli", *arguments, "--json"],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"smp-ensemble {arguments[0]} ended with exit code {done.returncode}: see above")
    return json.loads(done.stdout)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| method | trainings | members | best single val / test IoU | mean member val / test "
        "| combined val / test IoU | combined test ECE | training s | training CPU s | prediction |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        pairs = [
            f"{row[f'{what}_val']:.4f} / {row.get(f'{what}_test', math.nan):.4f}"
            for what in ("single", "mean", "combined")
        ]
        costs = [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['prediction']:.2f}x"]
        cells = [
            name,
            row["trainings"],
            row["members"],
            *pairs,
            f"{row.get('combined_test_ece', math.nan):.4f}",
            *costs,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What to compare, on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="as for smp-ensemble train")
    parser.add_argument("--epochs", type=int, default=24, help="of each training")
    parser.add_argument("--cycles", type=int, default=4, help="of snapshot and boost")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of the plans")
    parser.add_argument("--lr", type=float, default=0.05, help="maximum learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--methods", default="", help="rows, separated by semicolons; empty: all")
    parser.add_argument("--accelerator", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--output", default="methods.json", help="results so far; rows in it are not measured again")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
