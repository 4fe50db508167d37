"""Answers that were cut within their headers, which MLflow takes for empty ones: refused, so that they are asked again.

Python's `http.client` takes headers that end with the connection for whole ones. The one that says how long the answer
is may be among those that are missing; then nothing follows, the status is 200, and MLflow makes an empty message of
it, as if a search had found nothing. Who looks whether a lost call was heard would be told that it was not.

MLflow lets plugins add authentication to its requests. This one adds a look at the answer, not at who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider
from requests.auth import AuthBase, HTTPBasicAuth
from requests.exceptions import ChunkedEncodingError
from requests.utils import get_netrc_auth

from smp_ensemble.tracking.environment import unless_set

if TYPE_CHECKING:
    import contextlib

    from requests import PreparedRequest, Response

VARIABLE, NAME = "MLFLOW_TRACKING_AUTH", "smp_ensemble"
"""Where MLflow reads which plugin it is to use, and the name of this one."""


def refused() -> contextlib.AbstractContextManager[None]:
    """While the block runs, in the whole process; a plugin that somebody chose in the environment holds."""
    return unless_set({VARIABLE: NAME})


class WholeAnswers(RequestAuthProvider):
    """The plugin, registered with MLflow by an entry point."""

    def get_name(self) -> str:
        """`NAME`."""
        return NAME

    def get_auth(self) -> AuthBase:
        """What is called with each request."""
        return _Checked()


class _Checked(AuthBase):
    """Has the answer to a request checked; its authentication is what it would have been."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """The same request; a name and password from `.netrc` are added, which requests does only without a plugin."""
        known = get_netrc_auth(str(request.url))
        if known is not None:
            request = HTTPBasicAuth(*known)(request)
        request.register_hook("response", refuse_if_cut)
        return request


def refuse_if_cut(response: Response, **how: object) -> None:
    """Raises for an answer without content that does not say that it has none.

    A file that is being downloaded is not looked into: its content says whether it is whole.

    Args:
        response: An answer; its content is read.
        how: How it was asked for, as `requests` tells hooks.

    Raises:
        ChunkedEncodingError: The answer ends before its content.
    """
    if response.status_code != 200 or how.get("stream") or response.request.method == "HEAD":
        return
    length = response.headers.get("Content-Length", "").strip()
    in_chunks = response.headers.get("Transfer-Encoding", "").strip().lower() == "chunked"
    if not length and not in_chunks and not response.content:
        raise ChunkedEncodingError(f"the answer of {response.url} was cut within its headers")
