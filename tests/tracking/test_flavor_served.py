"""The model behind `mlflow models serve`: good requests answered exactly, all others refused, the server alive."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from malformed import FORMATS, JSON, all_requests, bomb, frame, picture
from PIL import Image
from servers import answers, free_port, running
from tiny import OPTIONS

from smp_ensemble.architectures import create_network
from smp_ensemble.data import rle
from smp_ensemble.data.images import decode_image
from smp_ensemble.data.limits import SERVED
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.inference.engine import Engine
from smp_ensemble.inference.masks import make_mask
from smp_ensemble.tracking.flavor import save_model

pytestmark = pytest.mark.slow


class Server(NamedTuple):
    """A served model."""

    port: int
    ensemble: Ensemble

    def post(self, body: bytes, content_type: str | None = JSON) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/invocations", body, {"Content-Type": content_type} if content_type else {})
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found

    def rows(self, *cells: bytes, **params) -> list[dict[str, str]]:
        status, text = self.post(frame(*cells, **params))
        assert status == 200, text
        return json.loads(text)["predictions"]

    def mask(self, content: bytes, views: str = "none") -> np.ndarray:
        """What the engine itself says of an image."""
        image = decode_image(content, "image")
        (probabilities,) = Engine(self.ensemble, views=views).predict([image])
        return make_mask(self.ensemble, image, probabilities)


def unpack(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import torch

    members = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = create_network("unet", num_outputs=1, model_options={**OPTIONS, "dropout": 0.5})
        members.append(Member(network, imagenet()))
    ensemble = Ensemble(members, mode="binary", class_names=("background", "roof"))
    folder = tmp_path_factory.mktemp("served")
    save_model(ensemble, folder / "model")
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"),
        *("--model-uri", str(folder / "model"), "--port", str(port)),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow calls uvicorn by its name
    with running(
        command,
        folder / "server.log",
        lambda: answers(f"http://127.0.0.1:{port}/ping"),
        environment={"PATH": path, "OMP_NUM_THREADS": "1"},
    ):
        yield Server(port, ensemble)


def test_every_format_is_answered_with_the_engines_mask(server):
    contents = [picture(number, form, (40 + number, 64)) for number, form in enumerate(FORMATS)]
    for row, content in zip(server.rows(*contents), contents, strict=True):
        assert np.array_equal(unpack(row["mask"]), server.mask(content))
    (row,) = server.rows(contents[0], kind="rle", views="d4")
    assert np.array_equal(rle.decode(row["rle"], 40, 64), server.mask(contents[0], "d4"))
    assert 0.01 < server.mask(contents[0]).mean() < 0.99


def test_malformed_requests_are_400_each_and_the_next_good_one_is_answered(server):
    content = picture(7)
    expected = server.mask(content)
    refused = 0
    for request in all_requests(seed=0, rounds=8):
        status, text = server.post(request.body, request.content_type)
        assert status == 400, (request.what, text[:500])
        assert json.loads(text)["error_code"] in {"BAD_REQUEST", "INVALID_PARAMETER_VALUE"}, request.what
        assert "unexpected error" not in text or "columns that pandas cannot print" in request.what, text[-2000:]
        refused += 1
        if refused % 40 == 0:
            (row,) = server.rows(content)
            assert np.array_equal(unpack(row["mask"]), expected)
    assert refused >= 200
    (row,) = server.rows(content)
    assert np.array_equal(unpack(row["mask"]), expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (frame(picture(), picture()[:50]), "cannot read image row 1: "),
        (frame(picture(), None), "expected image bytes or base64 in row 1, got nothing"),
        (frame("no!"), "expected base64 of image bytes in row 0, got other text"),
        (frame(bomb("PNG", 9000)), f"row 0: 9000 x 9000 pixels are more than the {SERVED.image_pixels} allowed"),
        (frame(*[picture()] * 1025), "expected at most 1024 images in one request, got 1025"),
        (frame(picture(), passes=101), "expected at most 100 passes, got 101"),
        (frame(picture(), views="d5"), "unknown views 'd5'"),
        (frame(picture(), kind="masks"), "unknown kind 'masks': did you mean 'mask'?"),
        (frame(bomb("PNG", 2000), views="scales:8"), "16000 x 16000 pixels are more than"),
        (frame(*[bomb("PNG", 2000)] * 17), "expected at most 67108864 pixels in one request"),
        (b'{"inputs": [[[[NaN, 1, 2]]]]}', "expected image 0 to hold finite values"),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_line_of_the_answer(server, body, reason):
    status, text = server.post(body)
    assert status == 400
    answer = json.loads(text)
    assert answer["error_code"] == "INVALID_PARAMETER_VALUE"
    assert reason in answer["message"].splitlines()[-1]
    assert answer["message"].splitlines()[-1].startswith("Error: ")


def test_what_mlflow_itself_refuses_does_not_end_the_server(server):
    """These never reach the model; MLflow 3.17 answers 415 and, for the last two, 500."""
    content = picture(3)
    deep = b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert server.post(content, "image/png")[0] == 415
    assert server.post(frame(content), "application/json; charset=latin-1")[0] == 415
    for body, content_type in ((frame(content), None), (deep, JSON)):
        assert server.post(body, content_type)[0] in {400, 413, 415, 500}
    assert np.array_equal(unpack(server.rows(content)[0]["mask"]), server.mask(content))


def test_requests_at_once_get_each_their_own_answer(server):
    contents = [picture(number, size=(48, 40 + 8 * (number % 3))) for number in range(24)]
    wanted = [("none", "d4", "flips")[number % 3] for number in range(24)]

    def ask(number: int) -> bool:
        (row,) = server.rows(contents[number], views=wanted[number])
        return np.array_equal(unpack(row["mask"]), server.mask(contents[number], wanted[number]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_a_broken_row_does_not_cost_the_others_where_errors_are_reported(server):
    good = picture(5)
    rows = server.rows(good, good[:80], good, on_error="report")
    assert [row["error"] == "" for row in rows] == [True, False, True]
    assert rows[1]["mask"] == ""
    assert rows[1]["error"].startswith("cannot read image row 1: ")
    assert np.array_equal(unpack(rows[2]["mask"]), server.mask(good))
