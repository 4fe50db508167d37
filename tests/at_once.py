"""Several trainings at the same time on one tracking store, each a process: `python tests/at_once.py 10 URI FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
from tiny import DATA, TINY

from smp_ensemble.tracking import names


def trainings_at_once(count: int, uri: str, folder: Path, *more: str) -> list[tuple[int, str]]:
    """Starts them together and waits: exit codes, and what each said."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("MLFLOW_RUN")}
    processes = []
    for seed in range(count):
        command = [sys.executable, "-m", "smp_ensemble.cli", "train", *DATA, *TINY, "--epochs", "2", "--cycles", "2"]
        processes.append(
            subprocess.Popen(
                [*command, "--seed", str(seed), *more],
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate()[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def kept(uri: str) -> dict[str, Counter[str]]:
    """Runs by kind and status, and steps of snapshots, each with how often it is there."""
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs(["0"], max_results=1000)
    statuses = Counter(f"{run.data.tags[names.KIND]} {run.info.status}" for run in runs)
    models = mlflow.MlflowClient(uri).search_logged_models(["0"], max_results=1000)
    snapshots = Counter(f"seed {model.params['seed']}, epoch {model.params['epoch']}" for model in models)
    return {"runs": statuses, "snapshots": snapshots, "models": Counter(str(model.status) for model in models)}


if __name__ == "__main__":
    began = time.perf_counter()
    results = trainings_at_once(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    print([code for code, _ in results], f"{time.perf_counter() - began:.0f} s")
    print(kept(sys.argv[2]))
    print([line for _, text in results for line in text.splitlines() if "WARNING" in line or "error" in line])
