"""Fixtures that many tests share: an MLflow store of their own; networks and data small enough to train in a blink."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read at import: tests make no network call
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, for the reason below

import mlflow
import pytest
import sqlalchemy
import torch
from hypothesis import settings
from tiny import DATA, OPTIONS

from smp_ensemble.architectures import create_network
from smp_ensemble.cli import main
from smp_ensemble.data.forms import DataSplits, load_data

REPOSITORY = Path(__file__).parents[1]
AERIAL = REPOSITORY.parent / "shared" / "data" / "aerial"

settings.register_profile("smp_ensemble", deadline=None, max_examples=50)  # machines may be busy
settings.load_profile("smp_ensemble")
torch.set_num_threads(1)  # networks are tiny: on a busy machine threads mostly wait for each other
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def _let_writes_wait(connection: object, _: object) -> None:
    """Stores of tests need not outlive a power cut: MLflow commits often, and each commit would wait for the disk."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A sqlite store as MLflow makes it, which takes seconds: made once and copied."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path.as_posix()}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path, monkeypatch, empty_store):
    """A fresh sqlite store in `tmp_path`, which is the working folder too."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", [(tmp_path / "mlruns" / "0").as_uri()])
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 30.0)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def tiny_splits() -> DataSplits:
    """24 synthetic binary scenes of 64x64; each split holds buildings."""
    return load_data(DATA[1])


# One grey pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


@pytest.fixture(autouse=True)
def pictures_in_a_blink(request, monkeypatch):
    """Every ensemble that is built draws six figures: outside the tests of figures they are made, but not rendered."""
    monkeypatch.setattr("smp_ensemble.tracking.report.DPI", 40)
    if "evaluation" not in request.path.parts and not request.node.get_closest_marker("figures"):
        monkeypatch.setattr("smp_ensemble.evaluation.page.png_bytes", lambda figure: PIXEL)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Nothing is written to the home of whoever runs the tests; those of the cache name a folder."""
    monkeypatch.setenv("SMP_ENSEMBLE_CACHE", "off")


@pytest.fixture
def make_tiny_network():
    """Makes small Unets, stride 8, from a seed."""

    def make(seed: int = 0, num_outputs: int = 1, **options):
        torch.manual_seed(seed)
        return create_network("unet", num_outputs=num_outputs, model_options={**OPTIONS, **options})

    return make


@pytest.fixture
def command(tracking, capsys):
    """Runs a command in-process: exit code, values of `--json`, and the lines on stderr."""

    def run(*arguments: str, values: bool = True):
        capsys.readouterr()
        code = main([*arguments, *(["--json"] if values else [])])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return code, (json.loads(out) if values and code == 0 else out), errors

    return run
