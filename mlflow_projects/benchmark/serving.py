"""What serving costs beyond the model: one image of 512x512 over HTTP against the engine alone, in turns.

Both run with as many threads as `threads` says. The parts that are ours or MLflow's are timed by themselves, in this
process; what is left of the request is HTTP and the server's own work.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from typing import TYPE_CHECKING

import mlflow  # noqa: TID251 (a project, not the package)
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from mlflow.pyfunc.scoring_server import infer_and_parse_data, predictions_to_json  # noqa: TID251
from PIL import Image

from smp_ensemble import Engine, Ensemble, Member, save_model
from smp_ensemble.data.images import decode_image
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.inference.payload import encode, predict_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, and tracks it as a run with `serving.json`."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with mlflow.start_run(run_name="serving"), tempfile.TemporaryDirectory() as name:
        mlflow.log_params(vars(options))
        ensemble = make_ensemble(options.members, options.encoder)
        save_model(ensemble, Path(name) / "model")
        content = encoded(scene(options.size), options.format)
        with serving(Path(name), options.threads) as port:
            rows = measure(Engine(ensemble), content, port, options.repeats)
        mlflow.log_metrics(
            {f"{key.replace(' ', '_')}_ms": value for key, value in rows.items()} | {"outside": outside(rows)}
        )
        mlflow.log_dict({"milliseconds": rows, "outside": outside(rows)}, "serving.json")
    print("| part | ms | share of the request |\n|---|---|---|")
    for key, value in rows.items():
        print(f"| {key} | {value:.1f} | {100 * value / rows['request']:.1f} % |")
    print(f"share outside the model: {100 * outside(rows):.1f} %")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--format", default="JPEG", choices=["JPEG", "PNG"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args(arguments)


def make_ensemble(count: int, encoder: str) -> Ensemble:
    """Unets with random weights: time does not depend on them."""
    members = []
    for seed in range(count):
        torch.manual_seed(seed)
        members.append(Member(smp.Unet(encoder, encoder_weights=None, classes=1), imagenet()))
    return Ensemble(members, mode="binary", class_names=("background", "building"))


def scene(size: int) -> np.ndarray:
    """A picture that compresses about as a photograph does: smooth shapes and a little noise."""
    draw = np.random.default_rng(0)
    coarse = Image.fromarray(draw.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(smooth + draw.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


@contextmanager
def serving(folder: Path, threads: int) -> Iterator[int]:
    """`mlflow models serve` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"),
        *("--model-uri", str(folder / "model"), "--port", str(port)),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it calls uvicorn by name
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(threads)}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 (the command is ours)
            command, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    try:
        give_up = time.monotonic() + 300
        while not ready(port):
            if process.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"the server did not start: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def ready(port: int) -> bool:
    try:
        return request(port, "GET", "/ping") is not None
    except OSError:
        return False


def request(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {text[-500:].decode()}")
    return text


def measure(engine: Engine, content: bytes, port: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the request, of the engine alone, and of each part, all in turns."""
    cell = base64.b64encode(content).decode()
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": [[cell]]}}).encode()
    image = decode_image(content, "image")
    (mask,) = predict_as(engine, [image], "mask")
    text = encode(mask, "mask", engine.ensemble)
    answer = json.loads(request(port, "POST", "/invocations", body))["predictions"][0]["mask"]
    with Image.open(io.BytesIO(base64.b64decode(answer))) as picture:
        if not np.array_equal(np.asarray(picture), mask):
            raise SystemExit("the server's mask is not the engine's")
    parts: dict[str, Callable[[], object]] = {
        "request": lambda: request(port, "POST", "/invocations", body),
        "engine": lambda: engine.predict([image]),
        "JSON and DataFrame in": lambda: infer_and_parse_data(json.loads(body)),
        "base64 in": lambda: base64.b64decode(cell, validate=True),
        "image decoded": lambda: decode_image(content, "image"),
        "mask to PNG and base64": lambda: encode(mask, "mask", engine.ensemble),
        "JSON out": lambda: predictions_to_json(pd.DataFrame({"mask": [text]}), io.StringIO()),
        "HTTP alone": lambda: request(port, "GET", "/ping"),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 2):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            if turn >= 2:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def outside(rows: dict[str, float]) -> float:
    """The share of the request that is not the engine's."""
    return 1 - rows["engine"] / rows["request"]


if __name__ == "__main__":
    main()
