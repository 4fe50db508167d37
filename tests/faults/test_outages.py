"""A training whose tracking server is away, slow, hangs or is cut off leaves there what an undisturbed one leaves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import requests
from faults.proxy import Fault, Proxy, drawn
from servers import mlflow_server
from tiny import DATA, TINY

from smp_ensemble.cli import UNDELIVERED, main
from smp_ensemble.exceptions import TrackingError
from smp_ensemble.tracking import names, outages
from smp_ensemble.tracking.flavor import load_model
from smp_ensemble.tracking.store import MlflowStore
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.module import SegmentationModule
from smp_ensemble.training.trainers import SSE

SECONDS = float(os.environ.get("SMP_ENSEMBLE_FAULT_SECONDS", "60"))
EPOCHS, STEPS = 3, 12
COURIER = "smp-ensemble-courier"

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@dataclass(frozen=True)
class Server:
    """A tracking server, asked without the proxy."""

    address: str
    artifacts: Path

    @property
    def client(self):
        return mlflow.MlflowClient(self.address)

    def folder_of(self, model_id):
        (folder,) = self.artifacts.glob(f"**/{model_id}/artifacts")
        return folder

    def digests(self, model_id):
        """SHA-256 of a logged model's files, and of what an upload left; without those that tell ids (`MLmodel`)."""
        folder = self.folder_of(model_id)
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and path.name not in {"MLmodel", "files.sha256"}
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store):
    """One server for all of these, on a store of its own: its address, and where its artifacts are."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    with mlflow_server(folder, store=f"sqlite:///{folder / 'mlflow.db'}") as address:
        yield Server(address, folder / "artifacts")


@pytest.fixture
def proxied(server, tracking, monkeypatch):
    """A proxy before it, which MLflow speaks to; pauses and timeouts are those of an impatient person."""
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(outages, "LONGEST_PAUSE", 0.3)
    monkeypatch.setattr(outages, "FIRST_TIMEOUT", 2)
    monkeypatch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 240.0)
    monkeypatch.setattr(outages, "START_SECONDS", 60.0)
    before = mlflow.get_tracking_uri()
    with Proxy(int(server.address.rpartition(":")[2])) as proxy:
        mlflow.set_tracking_uri(proxy.address)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.address)
        yield proxy
    mlflow.set_tracking_uri(before)


class Left:
    """What a training left on the server, asked without the proxy: all that must not depend on the network."""

    def __init__(self, server: Server, experiment: str) -> None:
        client = server.client
        self.experiment_id = client.get_experiment_by_name(experiment).experiment_id
        runs = client.search_runs([self.experiment_id])
        (self.training,) = [run for run in runs if run.data.tags[names.KIND] == "training"]
        children = [run for run in runs if run.data.tags[names.KIND] == "snapshot"]
        self.points = {}
        for run in runs:
            for key in run.data.metrics:
                history = client.get_metric_history(run.info.run_id, key)
                self.points[run.data.tags.get(names.STEP), key] = [(point.step, point.value) for point in history]
        self.open = [run.info.run_id for run in runs if run.info.status == "RUNNING"]
        models = client.search_logged_models([self.experiment_id])
        self.open += [model.model_id for model in models if model.status.name != "READY"]
        self.models = {model.model_id for model in models}
        assert {run.data.tags[names.MODEL_ID] for run in children} == self.models
        self.snapshots = {}
        for run in children:
            step, model_id = run.data.tags[names.STEP], run.data.tags[names.MODEL_ID]
            assert step not in self.snapshots, "twice"
            self.snapshots[step] = server.digests(model_id), dict(run.data.metrics)
        self.files = sorted(one.path for one in client.list_artifacts(self.training.info.run_id))
        self.datasets = sorted(one.dataset.digest for one in self.training.inputs.dataset_inputs)

    def comparable(self):
        return self.points, self.snapshots, self.files, self.datasets, self.training.info.status, self.open


def train(experiment, network, splits):
    """The same tiny training each time."""
    options = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", seed=3)
    with MlflowStore(experiment=experiment, run_name="roofs") as store:
        store.log_params({"lr": 0.05})
        store.log_dataset(splits.train.reference(), "training")
        method = SSE(cycles=2)
        return fit(network, splits.train, splits.val, trainer=method, epochs=EPOCHS, store=store, options=options)


@pytest.fixture(scope="module")
def known():
    """What was found out once for all tests."""
    return {}


@pytest.fixture
def undisturbed(server, proxied, known, make_tiny_network, tiny_splits):
    """What a training leaves with which nothing goes wrong."""
    if not known:
        train("undisturbed", make_tiny_network(), tiny_splits)
        known["left"] = Left(server, "undisturbed").comparable()
    return known["left"]


def test_random_faults_change_nothing(server, proxied, undisturbed, make_tiny_network, tiny_splits, monkeypatch):
    """Refused, hanging, delayed, cut connections and 503: as many trainings as there is time for, at least one."""
    monkeypatch.setattr("smp_ensemble.tracking.outages.LONGEST_TIMEOUT", 10)  # half of all connections may hang
    seed = int(os.environ.get("SMP_ENSEMBLE_FAULT_SEED", time.time_ns() % 2**32))
    draw = random.Random(seed)
    until, trainings = time.monotonic() + SECONDS / 2, 0
    while trainings == 0 or time.monotonic() < until:
        proxied.next_fault = lambda: drawn(draw, 0.5)
        proxied.cut_all()  # connections that are open from before
        experiment = f"faults-{seed}-{trainings}"
        server.client.create_experiment(experiment)
        train(experiment, make_tiny_network(), tiny_splits)
        proxied.next_fault = Fault
        found = Left(server, experiment)
        assert found.comparable() == undisturbed, f"seed {seed}, training {trainings}"
        assert sum(count for kind, count in proxied.seen.items() if kind != "none") > trainings
        trainings += 1
    print(f"seed {seed}: {trainings} trainings, connections: {proxied.seen}")


def test_a_server_gone_for_the_middle_third(server, proxied, undisturbed, make_tiny_network, tiny_splits, monkeypatch):
    """Training makes no network call; in the end everything is there, once."""
    callers, steps = set(), []
    connect, send, step = socket.socket.connect, requests.Session.send, SegmentationModule.training_step

    def connecting(self, address):
        if callers is not None and threading.current_thread().name != "proxy":
            callers.add(threading.current_thread().name)
        return connect(self, address)

    def sending(self, *arguments, **more):
        callers.add(threading.current_thread().name)
        return send(self, *arguments, **more)

    def stepping(self, *arguments):
        steps.append(threading.current_thread().name)
        if len(steps) == STEPS // 3:
            proxied.vanish()
        if len(steps) == 2 * STEPS // 3:
            proxied.gone = False
        time.sleep(0.02)  # the courier gets its turn
        return step(self, *arguments)

    fitting = fit

    def watched(*arguments, **more):
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "connect", connecting)
            patch.setattr(requests.Session, "send", sending)
            patch.setattr(SegmentationModule, "training_step", stepping)
            return fitting(*arguments, **more)

    monkeypatch.setattr(sys.modules[__name__], "fit", watched)
    experiment = f"middle-{time.time_ns()}"
    train(experiment, make_tiny_network(), tiny_splits)
    assert Left(server, experiment).comparable() == undisturbed
    assert len(steps) == STEPS
    assert proxied.seen["refuse"] > 0
    assert set(steps) == {"MainThread"}
    assert callers == {COURIER}


COMMAND = ("train", *DATA, *TINY, "--epochs", "2", "--cycles", "1")


def test_a_server_that_stays_away_gets_everything_later(server, proxied, monkeypatch, capsys, tmp_path):
    """The training ends with its own exit code; `sync` delivers from the disk alone, twice without harm."""
    whole, step = f"whole-{time.time_ns()}", SegmentationModule.training_step
    assert main([*COMMAND, "--experiment", whole]) == 0

    def vanishing(self, *arguments):
        proxied.vanish()
        return step(self, *arguments)

    later = f"later-{time.time_ns()}"
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationModule, "training_step", vanishing)
        patch.setattr("smp_ensemble.tracking.store.DELIVERY_SECONDS", 1.0)
        assert main([*COMMAND, "--experiment", later]) == UNDELIVERED
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "`smp-ensemble sync` delivers it" in error
    assert main(["sync", "--dry-run", "true"]) == 0
    assert " waits " in capsys.readouterr().out
    assert main(["sync", "--wait", "0"]) == UNDELIVERED
    proxied.gone = False
    assert main(["sync"]) == 0
    assert " delivered " in capsys.readouterr().out
    assert not (tmp_path / ".smp_ensemble").exists()
    assert Left(server, later).comparable() == Left(server, whole).comparable()
    assert main(["sync"]) == 0
    assert "nothing waits" in capsys.readouterr().out


def test_a_server_that_is_away_at_the_start_is_said_in_one_line(proxied, monkeypatch):
    proxied.vanish()
    monkeypatch.setattr(outages, "START_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"the tracking server http://127\.0\.0\.1:\d+ does not answer"):
        MlflowStore()
    assert time.monotonic() - began < 30


LOOP = """
import os, sys, time, torch
from smp_ensemble import MlflowStore, log_snapshot
from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet

store = MlflowStore(experiment=sys.argv[1])
network = create_network("unet", num_outputs=1, model_options={"encoder_depth": 3, "decoder_channels": [8, 8, 8]})
store._courier.close()  # the server is away: nothing is sent
store.log_metrics({"val_iou": 0.5}, 1)
about = {"mode": "binary", "class_names": ("no", "roof"), "normalization": imagenet()}
log_snapshot(network, {"val_iou": 0.5}, 1, store=store, **about)
print(store.run_id, flush=True)
time.sleep(600)
"""


def test_a_killed_training_is_delivered_and_ended(server, proxied, capsys, tmp_path):
    """While its process lives, nobody else delivers; afterwards it ends as FAILED, for nobody can go on with it."""
    experiment = f"killed-{time.time_ns()}"
    server.client.create_experiment(experiment)
    command = [sys.executable, "-c", LOOP, experiment]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            run_id = process.stdout.readline().strip()
            assert main(["sync"]) == 0
            assert "a process is at it" in capsys.readouterr().out
        finally:
            process.send_signal(signal.SIGKILL)
    assert main(["sync"]) == 0
    assert "delivered, FAILED" in capsys.readouterr().out
    left = Left(server, experiment)
    assert left.training.info.run_id == run_id
    assert (left.training.info.status, left.training.data.tags[names.ERROR]) == ("FAILED", "its process was killed")
    assert left.points[None, "val_iou"] == [(1, 0.5)]
    assert (len(left.snapshots), left.open) == (1, [])
    assert not (tmp_path / ".smp_ensemble").exists()


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A disk of that size, in memory."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting a small disk needs the rights of root: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        os.chdir("/")
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_fails_the_run_and_keeps_what_was_whole(server, proxied, monkeypatch, capsys, tmp_path):
    """Snapshots wait for the server until the disk takes no more; when there is room again, all of them arrive."""
    from smp_ensemble.tracking.delivery import Delivery

    def held_up(self, entry):
        raise ConnectionError("the artifact store is away")

    experiment, folder = f"full-{time.time_ns()}", tmp_path / "disk"
    server.client.create_experiment(experiment)
    monkeypatch.setattr("smp_ensemble.tracking.store.STOP_SECONDS", 3.0)
    with small_disk(folder, "2m"):
        monkeypatch.chdir(folder)
        command = ["train", *DATA, *TINY, "--epochs", "200", "--trainer", "checkpoints", "--experiment", experiment]
        with monkeypatch.context() as patch:
            patch.setattr(Delivery, "_snapshot", held_up)
            code = main([*command, "--encoder-name", "tu-test_resnet"])
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert code == 1
        assert error.startswith("error: no room is left on the disk, in epoch ")
        assert list(folder.rglob(".writing-*")) == []
        assert list(folder.rglob("*.partial")) == []
        (training,) = server.client.search_runs([server.client.get_experiment_by_name(experiment).experiment_id])
        assert training.info.status == "FAILED"
        assert training.data.tags[names.ERROR].startswith("TrainingError: no room is left on the disk")
        kept = len(list(folder.rglob("*-snapshot")))
        assert kept > 1
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        assert main(["sync"]) == 0
        assert "delivered, not finished" in capsys.readouterr().out
        monkeypatch.chdir(tmp_path)
    left = Left(server, experiment)
    assert len(left.snapshots) == kept
    assert left.open == []
    for model_id in left.models:
        assert load_model(str(server.folder_of(model_id))).members
