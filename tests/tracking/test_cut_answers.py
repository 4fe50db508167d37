"""An answer that is cut anywhere is an error that may pass, and never an empty answer."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import threading
from types import SimpleNamespace

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.tracking.request_auth.registry import fetch_auth

from smp_ensemble.tracking import names, queries
from smp_ensemble.tracking.cut_answers import VARIABLE, WholeAnswers, refuse_if_cut
from smp_ensemble.tracking.outages import brief_calls, is_passing

BODY = json.dumps({"experiment": {"experiment_id": "7", "name": "roofs", "lifecycle_stage": "active"}}).encode()
STATUS = b"HTTP/1.1 200 OK\r\nServer: uvicorn\r\nContent-Type: application/json\r\n"
WITH_LENGTH = STATUS + f"Content-Length: {len(BODY)}\r\nX-Frame-Options: SAMEORIGIN\r\n\r\n".encode() + BODY
IN_CHUNKS = STATUS + f"Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
TO_THE_END = STATUS + b"Connection: close\r\n\r\n" + BODY
NOTHING = STATUS + b"Content-Length: 0\r\n\r\n"


class Answering:
    """A server that sends the same bytes to everybody, then closes.

    Attributes:
        address: Where it listens.
        answer: What it sends.
        heard: What it was asked last.
    """

    def __init__(self) -> None:
        self.answer, self.heard = b"", b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self.heard = self._read(client)
                client.sendall(self.answer)

    @staticmethod
    def _read(client: socket.socket) -> bytes:
        """All of a request: what is left unread when a connection is closed resets it."""
        with client.makefile("rb") as stream:
            head = b"".join(iter(stream.readline, b"\r\n"))
            length = re.search(rb"content-length: (\d+)", head.lower())
            return head + stream.read(int(length[1]) if length else 0)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server(monkeypatch):
    for name in (VARIABLE, "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    answering = Answering()
    yield answering
    answering.close()


def asked(server):
    with brief_calls():
        return mlflow.MlflowClient(server.address).get_experiment_by_name("roofs")


@pytest.mark.parametrize("whole", [WITH_LENGTH, IN_CHUNKS], ids=["with its length", "in chunks"])
def test_an_answer_cut_after_any_byte_may_come_whole_later(server, whole):
    server.answer = whole
    assert asked(server).experiment_id == "7"
    last = len(whole) if whole is WITH_LENGTH else whole.index(BODY) + len(BODY)  # only the end of the chunks misses
    for length in range(last):
        server.answer = whole[:length]
        with pytest.raises((MlflowException, json.JSONDecodeError)) as found:
            asked(server)
        assert is_passing(found.value), whole[:length]


def test_an_answer_that_ends_with_the_connection_is_taken_when_it_has_content(server):
    server.answer = TO_THE_END
    assert asked(server).experiment_id == "7"


def test_mlflow_alone_takes_a_cut_answer_for_an_empty_one(server):
    """Why all this is there: when MLflow finds it itself one day, this fails and the plugin may go."""
    server.answer = STATUS
    found = mlflow.MlflowClient(server.address).get_experiment_by_name("roofs")
    assert found.experiment_id == ""
    assert list(mlflow.MlflowClient(server.address).search_runs(["7"])) == []
    with brief_calls(), pytest.raises(MlflowException, match="was cut within its headers"):
        mlflow.MlflowClient(server.address).search_runs(["7"])


def test_a_page_that_was_cut_is_not_the_end_of_a_list(server, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.answer = STATUS
    client = mlflow.MlflowClient(server.address)
    info, data = SimpleNamespace(run_id="1", experiment_id="7"), SimpleNamespace(tags={names.MODEL_ID: "m-1"})
    for ask in (
        lambda: queries.find_runs(client, ["7"], ""),
        lambda: list(queries.ranked_pages(client, ["7"], "val_iou", None)),
        lambda: queries.models_of(client, [SimpleNamespace(info=info, data=data)]),
    ):
        with pytest.raises(MlflowException, match="was cut within its headers"):
            ask()
    assert VARIABLE not in os.environ


def test_an_answer_that_says_it_is_empty_is_empty(server):
    server.answer = NOTHING
    with brief_calls():
        assert list(mlflow.MlflowClient(server.address).search_runs(["7"])) == []


@pytest.mark.parametrize(
    ("method", "status", "stream"), [("GET", 404, False), ("GET", 204, False), ("HEAD", 200, False), ("GET", 200, True)]
)
def test_only_an_answer_that_should_have_content_is_refused(method, status, stream):
    answer = requests.Response()
    answer.status_code, answer._content = status, b""
    answer.request = requests.Request(method, "http://127.0.0.1/").prepare()
    refuse_if_cut(answer, stream=stream, timeout=10)
    answer.status_code, answer.request.method = 200, "POST"
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        refuse_if_cut(answer, stream=False, timeout=10)


def sent_by(server):
    """The value of the header that says who asks."""
    lines = server.heard.decode().splitlines()
    return [line.partition(": ")[2] for line in lines if line.lower().startswith("authorization: ")]


def basic(name, password):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.mark.parametrize("in_netrc", [False, True])
@pytest.mark.parametrize("in_environment", [False, True])
def test_who_asks_stays_who_asks(server, monkeypatch, tmp_path, in_netrc, in_environment):
    """The same header with the plugin and without it."""
    server.answer = WITH_LENGTH
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login anna password secret\n" if in_netrc else "", encoding="utf-8")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    if in_environment:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bert")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    mlflow.MlflowClient(server.address).get_experiment_by_name("roofs")
    without = sent_by(server)
    asked(server)
    assert sent_by(server) == without
    expected = [basic("anna", "secret")] if in_netrc else [basic("bert", "word")] if in_environment else []
    assert without == expected


def test_a_plugin_that_somebody_chose_holds(monkeypatch):
    monkeypatch.setenv(VARIABLE, "kubernetes")
    with brief_calls():
        assert os.environ[VARIABLE] == "kubernetes"


def test_the_plugin_is_found_by_its_name():
    assert type(fetch_auth(WholeAnswers().get_name())) is type(WholeAnswers().get_auth())
