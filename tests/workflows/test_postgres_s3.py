"""The whole way on a server as teams run it: PostgreSQL for runs, an S3 store for artifacts."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from servers import free_port, mlflow_server, running
from tiny import DATA, SHORT, TINY

from smp_ensemble import load_data, load_model
from smp_ensemble.inference.engine import Engine
from smp_ensemble.tracking import names

BUCKET = "snapshots"
FAST_SHUTDOWN = signal.SIGINT  # PostgreSQL's word for: drop connections, then end in order
KEYS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `postgres`: Debian keeps it off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found := shutil.which("initdb"):
        folders = [Path(found).resolve().parent, *folders]
    return next((folder for folder in folders[::-1] if (folder / "initdb").exists()), None)


PROGRAMS = postgres_programs()
NOBODY_ELSE = os.geteuid() == 0 and "postgres" not in {account.pw_name for account in pwd.getpwall()}

pytestmark = [
    pytest.mark.services,
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAMS is None, reason="no PostgreSQL on this machine: install the package postgresql"),
    pytest.mark.skipif(NOBODY_ELSE, reason="PostgreSQL refuses root, and there is no user postgres to run it"),
]


def accepts(address: str) -> bool:
    """Whether a database takes connections."""
    import psycopg2

    try:
        psycopg2.connect(address).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.fixture
def postgres():
    """The address of an empty database; its server runs as a user that is not root, as it insists on."""
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short, and the user's own
    try:
        if user:
            account = pwd.getpwnam(user)
            os.chown(folder, account.pw_uid, account.pw_gid)
        port = free_port()
        address = f"postgresql://tests@127.0.0.1:{port}/postgres"
        subprocess.run(
            [PROGRAMS / "initdb", "-D", folder / "data", "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            user=user,
            group=user,
            extra_groups=[] if user else None,
        )
        command = [str(PROGRAMS / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-p", str(port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with running(
            command,
            folder / "postgres.log",
            lambda: accepts(address),
            user=user,
            stop=FAST_SHUTDOWN,
        ):
            yield address.replace("postgresql:", "postgresql+psycopg2:")  # SQLAlchemy 2.1 takes psycopg 3 unless told
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def store(monkeypatch):
    """A client of an S3 server, in this process, with an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        yield client
        client.close()
    finally:
        server.stop()


@pytest.fixture
def server(tracking, postgres, store, tmp_path, monkeypatch):
    """A tracking server on both; its clients know neither."""
    environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": store.meta.endpoint_url}
    with mlflow_server(tmp_path, store=postgres, artifacts=f"s3://{BUCKET}", environment=environment) as address:
        for key in KEYS:
            monkeypatch.delenv(key)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        mlflow.set_tracking_uri(address)
        yield address


def stored(store) -> dict[str, int]:
    """What the bucket holds: keys and sizes."""
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", ())}


def test_the_whole_way(command, server, store, tmp_path):
    code, trained, _ = command("train", *DATA, *TINY, "--epochs", "3", "--cycles", "3")
    assert code == 0
    assert len(trained["snapshots"]) == 3

    client = mlflow.MlflowClient(server)
    snapshots = [row["snapshot"] for row in trained["snapshots"]]
    runs = client.search_runs(["0"], f"tags.`{names.KIND}` = '{names.SNAPSHOT}'")
    run_of = {run.data.tags[names.MODEL_ID]: run.info.run_id for run in runs}
    assert set(run_of) == set(snapshots)
    picked = [snapshots[0], snapshots[2]]
    for model_id in picked:
        client.set_tag(run_of[model_id], names.PICK, "pair")

    code, built, _ = command(
        "ensemble", *DATA, *SHORT, "--pick", "pair", "--register-as", "roofs", "--alias", "champion"
    )
    assert code == 0
    assert sorted(built["members"]) == sorted(f"models:/{model_id}" for model_id in picked)
    assert client.get_model_version_by_alias("roofs", "champion").version in (1, "1")

    found = stored(store)
    model_id = built["uri"].removeprefix("models:/")
    weights = [key for key in found if key.endswith(".safetensors") and model_id in key]
    assert len(weights) == 2
    assert all(any(model_id in key for key in found) for model_id in snapshots)
    assert any(key.endswith("report/report.html") for key in found)
    assert not (tmp_path / "mlruns").exists()

    images = np.stack([load_data(DATA[1]).test.read(index)[0] for index in range(2)])
    masks = mlflow.pyfunc.load_model("models:/roofs@champion").predict(images)
    raw = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    probabilities = Engine(load_model("models:/roofs@champion"))(raw).cpu().numpy()
    assert masks.dtype == np.uint8
    assert np.array_equal(masks, probabilities[:, 0] >= built["thresholds"][-1])
