"""Step times of trainings whose tracking server is away for their middle third, against undisturbed ones, in turns.

Starts an `mlflow server` of its own. It hangs (is stopped, and goes on) or is gone (is killed, and started anew on
the same port). A step is the time from one forward pass of the training to the next, on the training's thread: by the
clock, and in processor time of that thread, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow  # noqa: TID251 (a project of its own: it looks at what arrived as any user does)
import torch

from smp_ensemble import FitOptions, MlflowStore, fit, load_data
from smp_ensemble.architectures import create_network
from smp_ensemble.workflows.results import format_table

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTING_SECONDS = 180.0


def main(arguments: list[str] | None = None) -> None:
    """Trains undisturbed and disturbed in turns, and prints the ratios of their median step times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="synthetic:count=96,size=64")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--trainer", default="single")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--how", choices=("hang", "gone"), default="hang")
    options = parser.parse_args(arguments)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, Server(Path(name)) as server:
        outside = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(server.address)
        os.chdir(name)
        train(options, server, disturbed=False)  # what happens only once, such as imports, is behind us
        for repeat in range(options.repeats):
            order = (False, True) if repeat % 2 == 0 else (True, False)
            found = {disturbed: train(options, server, disturbed=disturbed) for disturbed in order}
            rows.append(compare(repeat + 1, found[False], found[True]))
            print("\n".join(format_table(rows[-1:])), flush=True)
        mlflow.set_tracking_uri(outside)
        os.chdir("/")
    table = "\n".join(format_table(rows))
    summary = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("ratio")}
    print(table)
    print(", ".join(f"median {name}: {value:.4f}" for name, value in summary.items()))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, server: {options.how}")
    with mlflow.start_run(run_name="outage"):
        mlflow.log_params(vars(options))
        mlflow.log_metrics({name.replace(",", ""): value for name, value in summary.items()})
        mlflow.log_text(table, "outage.txt")


class Server:
    """`mlflow server` on a port of its own, which can hang or be gone.

    Args:
        folder: For its store and its artifacts.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._folder = folder

    def __enter__(self) -> Server:
        self.start()
        give_up = time.monotonic() + STARTING_SECONDS
        while not self._answers():
            if time.monotonic() > give_up:
                raise RuntimeError(f"mlflow server did not start: {(self._folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Begins to start it."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own words)
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                 "--workers", "1", "--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}",
                 "--artifacts-destination", (self._folder / "artifacts").as_uri()],
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip

    def kill(self) -> None:
        """Ends it at once, with the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def leave(self, how: str) -> None:
        """Is away from now on."""
        if how == "hang":
            os.killpg(self._process.pid, signal.SIGSTOP)
        else:
            self.kill()

    def come_back(self, how: str) -> None:
        """Is there again, soon."""
        if how == "hang":
            os.killpg(self._process.pid, signal.SIGCONT)
        else:
            self.start()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:  # noqa: S310 (our own server)
                return bool(answer.status == 200)
        except OSError:
            return False


def train(options: argparse.Namespace, server: Server, *, disturbed: bool) -> dict[str, Any]:
    """One training: step times by the clock and of the processor, and what arrived on the server."""
    splits = load_data(options.data)
    torch.manual_seed(0)
    network = create_network("unet", encoder_name=options.encoder, num_outputs=1)
    steps = options.epochs * (len(splits.train) // options.batch_size)
    moments: list[tuple[float, float]] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if module.training:
            moments.append((time.perf_counter(), time.thread_time()))
            if disturbed and len(moments) == steps // 3:
                server.leave(options.how)
            if disturbed and len(moments) == 2 * steps // 3:
                server.come_back(options.how)

    network.register_forward_pre_hook(note)
    fit_options = FitOptions(
        batch_size=options.batch_size, crop_size=options.crop_size, precision="32", accelerator="cpu"
    )
    with MlflowStore() as store:
        data = (splits.train, splits.val)
        fit(network, *data, trainer=options.trainer, epochs=options.epochs, store=store, options=fit_options)
    return {"moments": moments, **arrived(store.run_id)}


def arrived(run_id: str) -> dict[str, Any]:
    """What is on the server, once all is delivered."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    points = [len(client.get_metric_history(run_id, key)) for key in sorted(run.data.metrics)]
    models = client.search_logged_models([run.info.experiment_id])
    mine = [model for model in models if model.source_run_id in {child.info.run_id for child in children}]
    return {
        "arrived": (points, len(children), len(mine), {child.info.status for child in children} | {run.info.status})
    }


def step_times(moments: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """From one forward pass to the next, in ms: by the clock, and of the processor."""
    for (clock, processor), (next_clock, next_processor) in itertools.pairwise(moments):
        yield 1000 * (next_clock - clock), 1000 * (next_processor - processor)


def compare(number: int, undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> dict[str, Any]:
    """A row: medians of both, and their ratios; of all steps, and of those of the middle third alone."""
    plain, other = (list(step_times(found["moments"])) for found in (undisturbed, disturbed))
    third = slice(len(plain) // 3, 2 * len(plain) // 3)
    clock = [statistics.median(one[0] for one in times) for times in (plain, other)]
    processor = [statistics.median(one[1] for one in times) for times in (plain, other)]
    away = [statistics.median(one[1] for one in times[third]) for times in (plain, other)]
    return {
        "pair": number,
        "steps": len(plain) + 1,
        "ms": clock[0],
        "ms, outage": clock[1],
        "ratio": clock[1] / clock[0],
        "CPU ms": processor[0],
        "CPU ms, outage": processor[1],
        "ratio, CPU": processor[1] / processor[0],
        "ratio, CPU, middle third": away[1] / away[0],
        "all there, once": undisturbed["arrived"] == disturbed["arrived"],
    }


if __name__ == "__main__":
    main()
