"""A tracking server that is away: which errors may pass, and calls that say so soon instead of after minutes.

MLflow itself repeats a call up to seven times, which takes four minutes, and repeats those that create something too:
an answer that was lost on its way then leaves two runs. Here a call is made once, and who repeats it looks first; an
answer that was cut is never taken for one that says "nothing".
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
from typing import TYPE_CHECKING, TypeVar

import mlflow
from mlflow.exceptions import MlflowException

from smp_ensemble.exceptions import TrackingError
from smp_ensemble.tracking import cut_answers
from smp_ensemble.tracking.environment import unless_set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

RETRIES, TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
FIRST_TIMEOUT, LONGEST_TIMEOUT = 10, 300
"""Seconds to wait for an answer; doubled after each failure, for a server that needs long to store a large file."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds to wait after a failed call; doubled each time up to the longest."""

START_SECONDS = 30.0
"""How long a training waits for the server at its start."""

logger = logging.getLogger(__name__)


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: the network, a busy or broken server; not a refusal or a defect."""
    if isinstance(error, json.JSONDecodeError):
        return True  # somebody on the way answered instead of the server, or the answer was cut
    status = _status(error)
    if status is not None:
        return status >= 500 or status in {408, 429}
    if type(error).__module__.partition(".")[0] in {"botocore", "boto3", "urllib3"}:
        return True  # without a status: no connection to the artifact store
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, wherever it keeps it: MLflow, requests (artifacts over HTTP) or botocore (S3)."""
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    answer = getattr(error, "response", None)
    found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    found = found if found is not None else getattr(answer, "status_code", None)
    return int(found) if found is not None else None


@contextlib.contextmanager
def brief_calls(failures: int = 0) -> Iterator[None]:
    """While the block runs, MLflow makes each call once, waits for its answer for seconds, and refuses a cut one.

    MLflow knows no such thing for one thread alone: for that long it holds for the whole process. What somebody set in
    the environment holds always, and what is set here is gone after the block.

    Args:
        failures: How often the call failed before.
    """
    wanted = {RETRIES: 0, TIMEOUT: min(FIRST_TIMEOUT * 2**failures, LONGEST_TIMEOUT)}
    with unless_set(wanted), cut_answers.refused():
        yield


def next_pause(pause: float) -> float:
    """Twice as long, up to the longest."""
    return min(2 * pause, LONGEST_PAUSE)


def with_jitter(pause: float) -> float:
    """A pause within a quarter more or less: many trainings do not all come back at the same moment."""
    return pause * random.uniform(0.75, 1.25)  # noqa: S311 (no secret)


def reason_in_one_line(error: BaseException) -> str:
    """What an error says, without the lines that follow."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def persist(call: Callable[[int], Result], seconds: float) -> Result:
    """Makes a call again and again for so long; what does not pass, or has not passed by then, is raised.

    Args:
        call: Gets the number of failures before: one that creates something must look whether it was heard.
        seconds: How long; it is made at least once.
    """
    deadline = time.monotonic() + seconds
    failures, pause = 0, FIRST_PAUSE
    while True:
        try:
            with brief_calls(failures):
                return call(failures)
        except Exception as error:
            if not is_passing(error) or time.monotonic() + pause > deadline:
                raise
            if not failures:
                logger.warning("the tracking server does not answer: %s", reason_in_one_line(error))
        failures += 1
        time.sleep(with_jitter(pause))
        pause = next_pause(pause)


def insist(call: Callable[[int], Result]) -> Result:
    """`persist` for what the start of a training needs.

    Raises:
        TrackingError: The server is still away after `START_SECONDS`.
    """
    try:
        return persist(call, START_SECONDS)
    except Exception as error:
        if not is_passing(error):
            raise
        raise TrackingError(
            f"a training's run is opened at its start, and the tracking server {mlflow.get_tracking_uri()} does not "
            f"answer: {reason_in_one_line(error)}. Start it, or set MLFLOW_TRACKING_URI; nothing was trained yet. Once "
            "training has begun, a server that goes away is waited for"
        ) from error
