"""What may pass is tried again, soon and within bounds; what somebody set in the environment holds."""

from __future__ import annotations

import json
import os

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, REQUEST_LIMIT_EXCEEDED

from smp_ensemble.exceptions import TrackingError
from smp_ensemble.tracking import outages
from smp_ensemble.tracking.outages import RETRIES, TIMEOUT, brief_calls, insist, is_passing


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionError("refused"), True),
        (TimeoutError(), True),
        (MlflowException("down"), True),
        (MlflowException("busy", error_code=REQUEST_LIMIT_EXCEEDED), True),
        (MlflowException("changed param", error_code=INVALID_PARAMETER_VALUE), False),
        (FileNotFoundError("gone"), False),
        (KeyError("defect"), False),
    ],
)
def test_what_may_pass_is_tried_again_and_a_refusal_is_not(error, passing):
    assert is_passing(error) is passing


def answer(status):
    found = requests.Response()
    found.status_code = status
    return found


class ClientError(Exception):
    """As botocore's: it keeps the answer as plain values."""

    def __init__(self, status):
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize("kind", [lambda status: requests.HTTPError(response=answer(status)), ClientError])
@pytest.mark.parametrize(("status", "passing"), [(401, False), (403, False), (404, False), (408, True), (429, True),
                                                 (500, True), (503, True)])  # fmt: skip
def test_artifact_stores_say_a_status_too(kind, status, passing):
    assert is_passing(kind(status)) is passing


def test_an_answer_that_is_cut_may_come_whole_later():
    with pytest.raises(json.JSONDecodeError) as found:
        json.loads('{"run": ')
    assert is_passing(found.value)


def test_what_the_environment_says_holds_and_nothing_stays(monkeypatch):
    monkeypatch.setenv(RETRIES, "3")
    monkeypatch.delenv(TIMEOUT, raising=False)
    with brief_calls(failures=1):
        assert (os.environ[RETRIES], os.environ[TIMEOUT]) == ("3", "20")
    assert os.environ[RETRIES] == "3"
    assert TIMEOUT not in os.environ
    with brief_calls(failures=60):
        assert os.environ[TIMEOUT] == str(outages.LONGEST_TIMEOUT)


def test_the_start_asks_again_and_knows_that_it_did(monkeypatch):
    monkeypatch.setattr(outages, "FIRST_PAUSE", 0.01)
    failures = []

    def call(before):
        failures.append(before)
        if before < 2:
            raise ConnectionError("refused")
        return "run"

    assert insist(call) == "run"
    assert failures == [0, 1, 2]


def test_a_start_without_a_server_is_one_line(monkeypatch):
    monkeypatch.setattr(outages, "START_SECONDS", 0.0)

    def away(before):
        raise ConnectionError("refused")

    def refused(before):
        raise MlflowException("no", error_code=INVALID_PARAMETER_VALUE)

    with pytest.raises(TrackingError, match=r"does not answer: ConnectionError: refused\. Start it, or set MLFLOW_"):
        insist(away)
    with pytest.raises(MlflowException, match="no"):
        insist(refused)


def test_pauses_grow_to_a_cap_and_are_jittered():
    pauses = [outages.FIRST_PAUSE]
    for _ in range(8):
        pauses.append(outages.next_pause(pauses[-1]))
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    drawn = [outages.with_jitter(8.0) for _ in range(100)]
    assert all(6 <= pause <= 10 for pause in drawn)
    assert len(set(drawn)) > 50
