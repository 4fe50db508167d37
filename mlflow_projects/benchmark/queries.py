"""How long finding and picking snapshots takes as a store grows: one table, by stores that it fills itself.

One snapshot is tracked through MLflow's client; all others are copies of its rows in the sqlite file, whatever tables
and columns this version of MLflow has, with ids, scores and a param of their own. There are no artifacts: queries never
read any.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import random
import sqlite3
import tempfile
import time
import tracemalloc
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow  # noqa: TID251 (a project of its own: it opens its run as any user does)
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag  # noqa: TID251

from smp_ensemble.tracking import names
from smp_ensemble.tracking.candidates import find_candidates
from smp_ensemble.tracking.search import search_snapshots
from smp_ensemble.workflows.results import format_table

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST = "0123abcd"
PICK, PICKED = "mine", 5
METHODS = ("snapshot", "fge", "swa", "ema", "single")


def main(arguments: list[str] | None = None) -> None:
    """Fills a store of each size, asks it, and prints and keeps the table."""
    options = parse(arguments)
    rows = []
    uri = mlflow.get_tracking_uri()
    for size in (int(part) for part in options.sizes.split(",")):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "mlflow.db"
            seconds = fill(path, size, seed=options.seed)
            print(f"{size} snapshots written in {seconds:.1f} s", flush=True)
            mlflow.set_tracking_uri(f"sqlite:///{path.as_posix()}")
            try:
                rows.append({"snapshots": size} | measure(queries(), options.repeats))
            finally:
                mlflow.set_tracking_uri(uri)
        print("\n".join(format_table(rows[-1:])), flush=True)
    table = "\n".join(format_table(rows))
    print(table)
    python = f"Python {platform.python_version()}"
    print(f"processor seconds, {platform.machine()}, {python}, mlflow {mlflow.__version__}, sqlite")
    with mlflow.start_run(run_name="queries"):
        mlflow.log_text(table, "queries.txt")
        mlflow.log_dict({"rows": rows}, "queries.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="100,1000,10000", help="snapshots in the store, comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--seed", type=int, default=0, help="of the scores")
    return parser.parse_args(arguments)


def queries() -> dict[str, Callable[[], Any]]:
    """What is asked, by the column that says how long it took."""
    asked = {"metric": "val_iou", "dataset_digest": DIGEST}
    return {
        "top 20 (s)": lambda: search_snapshots(limit=20, **asked),
        "val_iou > 0.5 (s)": lambda: search_snapshots("metrics.val_iou > 0.5", limit=20, **asked),
        "val_iou < 0.1 (s)": lambda: search_snapshots("metrics.val_iou < 0.1", limit=20, **asked),
        "trainer = 'swa' (s)": lambda: search_snapshots("params.trainer = 'swa'", limit=20, **asked),
        "pick by tag (s)": lambda: find_candidates(pick=PICK, **asked),
        "top 20, any data (s)": lambda: search_snapshots(limit=20),
    }


def measure(asked: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Processor seconds of each query, and the most memory that any of them took, in another round: tracing slows down.

    sqlite works within this process, so on an idle machine these are the seconds that pass.
    """
    found: dict[str, float] = {}
    search_snapshots(limit=1)  # connecting is no part of a query
    for name, ask in asked.items():
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            ask()
            seconds.append(time.process_time() - began)
        found[name] = round(min(seconds), 3)
    peak = 0
    for ask in asked.values():
        tracemalloc.start()
        ask()
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return found | {"peak (MB)": round(peak / 2**20, 1)}


def fill(path: Path, size: int, seed: int = 0) -> float:
    """Writes a store with `size` snapshots, scores drawn uniformly, some of them tagged; gives the seconds it took."""
    began = time.perf_counter()
    client = mlflow.MlflowClient(f"sqlite:///{path.as_posix()}")
    run_id, model_id = track_one(client)
    draw = random.Random(seed)  # noqa: S311 (scores, no secrets)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        template = rows_of(database, {run_id, model_id})
        for index in range(1, size):
            copy_rows(database, template, {run_id, model_id}, draw.random(), METHODS[index % len(METHODS)], index)
    for run in client.search_runs(["0"], f"tags.`{names.KIND}` = '{names.SNAPSHOT}'", max_results=min(PICKED, size)):
        client.set_tag(run.info.run_id, names.PICK, PICK)
    return time.perf_counter() - began


def track_one(client: mlflow.MlflowClient) -> tuple[str, str]:
    """One snapshot as a training leaves it, without files: the ids of its run and its model."""
    run_id = client.create_run("0", tags={names.KIND: names.SNAPSHOT}, run_name="snapshot").info.run_id
    params = {f"param_{index:02d}": str(index) for index in range(30)} | {"trainer": METHODS[0], "cycle": "0"}
    tags = {names.KIND: names.SNAPSHOT}
    model_id = client.create_logged_model("0", name="snapshot", source_run_id=run_id, tags=tags, params=params).model_id
    data = Dataset(name="synthetic/val", digest=DIGEST, source_type="local", source="synthetic")
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "validation")])])
    client.log_outputs(run_id, [LoggedModelOutput(model_id, 10)])
    now = int(time.time() * 1000)
    scores = [
        Metric(key, 0.5, now, 10, model_id=model_id, dataset_name=data.name, dataset_digest=DIGEST, run_id=run_id)
        for key in ("val_iou", "val_loss", "val_ece", "val_nll", "val_brier", "val_iou/building")
    ]
    entries = [Param(key, value) for key, value in params.items()]
    client.log_batch(run_id, metrics=scores, params=entries, tags=[RunTag(names.MODEL_ID, model_id)])
    client.finalize_logged_model(model_id, "READY")
    client.set_terminated(run_id)
    return run_id, model_id


def rows_of(database: sqlite3.Connection, ids: set[str]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """By table, columns and the rows that name one of these ids or, like tags of inputs, an id of such a row."""
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    known = set(ids)
    found: dict[str, tuple[list[str], list[list[Any]]]] = {}
    for _ in range(2):
        for table in tables:
            cursor = database.execute(f'SELECT * FROM "{table}"')  # noqa: S608 (names from the schema itself)
            columns = [column[0] for column in cursor.description]
            rows = [list(row) for row in cursor if known & {value for value in row if isinstance(value, str)}]
            if rows:
                found[table] = (columns, rows)
            if "input_uuid" in columns:
                known |= {row[columns.index("input_uuid")] for row in rows}
    return found


def copy_rows(
    database: sqlite3.Connection,
    template: dict[str, tuple[list[str], list[list[Any]]]],
    ids: set[str],
    score: float,
    method: str,
    index: int,
) -> None:
    """One more snapshot: the same rows with other ids, with its own score, loss and method."""
    fresh = {old: ("m-" if old.startswith("m-") else "") + uuid.uuid4().hex for old in ids}
    inputs: dict[str, str] = {}
    changed = {"val_iou": score, "val_loss": 1 - score, "trainer": method, "cycle": str(index)}
    for table, (columns, rows) in template.items():
        places = ", ".join("?" for _ in columns)
        for row in rows:
            new = [fresh.get(value, value) if isinstance(value, str) else value for value in row]
            for place, column in enumerate(columns):
                if column == "input_uuid":
                    new[place] = inputs.setdefault(row[place], uuid.uuid4().hex)
                elif column in ("value", "metric_value", "param_value"):
                    for name in ("key", "metric_name", "param_key"):
                        if name in columns and row[columns.index(name)] in changed:
                            new[place] = changed[row[columns.index(name)]]
            database.execute(f'INSERT INTO "{table}" VALUES ({places})', new)  # noqa: S608


if __name__ == "__main__":
    main()
