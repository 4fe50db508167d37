"""The thread that sends a spool's entries to the tracking server, and waits for a server that is away."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from smp_ensemble.exceptions import DeliveryError, UndeliveredError
from smp_ensemble.tracking import outages

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from smp_ensemble.tracking.spool import Entry, Spool

logger = logging.getLogger(__name__)


class Courier:
    """A background thread that delivers a spool's entries in order, trying again for as long as it takes.

    A server that is away is waited for. An error that would come again stops the thread and is raised by `drain`.

    Args:
        spool: What to deliver.
        deliver: Sends one entry, and gives what is to be known of it later; raises if it could not.
    """

    def __init__(self, spool: Spool, deliver: Callable[[Entry], Mapping[str, Any] | None]) -> None:
        self._spool = spool
        self._deliver = deliver
        self._wake = threading.Event()
        self._closing = False
        self._failures = 0
        self._last_delivery = 0.0
        self._waits_for: Exception | None = None
        self._broken_by: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="smp-ensemble-courier", daemon=True)
        self._thread.start()

    @property
    def is_stopped(self) -> bool:
        """Whether the server refused something, so that nothing more is sent."""
        return self._broken_by is not None

    def put(
        self,
        kind: str,
        content: Mapping[str, Any],
        write: Callable[[Path], None] | None = None,
        *,
        key: str | None = None,
    ) -> bool:
        """`Spool.put`, and wakes the thread."""
        added = self._spool.put(kind, content, write, key=key)
        self._wake.set()
        return added

    def drain(self, timeout_seconds: float, *, since_last: bool = False) -> None:
        """Waits until everything is delivered; Ctrl-C ends the waiting.

        Args:
            timeout_seconds: How long.
            since_last: Counted from the last entry that was delivered, so that a slow server may take its time.

        Raises:
            UndeliveredError: Something is left after `timeout_seconds`: the server is away, or slow.
            DeliveryError: Something cannot be delivered at all.
        """
        began = time.monotonic()
        said = False
        try:
            while not self._spool.is_empty():
                counted_from = max(began, self._last_delivery) if since_last else began
                if self._broken_by is not None:
                    raise DeliveryError(
                        "not everything could be delivered: "
                        f"{outages.reason_in_one_line(self._broken_by)}. {self._where()}"
                    ) from self._broken_by
                if time.monotonic() - counted_from > timeout_seconds:
                    raise UndeliveredError(self._left("delivery is slow")) from self._waits_for
                if self._waits_for is not None and not said and timeout_seconds >= 1:
                    logger.warning("waiting up to %.0f s for the tracking server; Ctrl-C ends that", timeout_seconds)
                    said = True
                time.sleep(0.02)
        except KeyboardInterrupt as error:
            raise UndeliveredError(self._left("waiting was interrupted")) from error

    def close(self, *, wait: bool = True, then: Callable[[], None] = lambda: None) -> None:
        """Stops the thread after the entry in hand.

        Args:
            wait: For that entry; otherwise it goes on as long as the process lives.
            then: Is called when the thread has ended.
        """
        self._closing = True
        self._wake.set()

        def end() -> None:
            self._thread.join()
            then()

        if wait:
            end()
        else:
            threading.Thread(target=end, name="smp-ensemble-courier-end", daemon=True).start()

    def _left(self, otherwise: str) -> str:
        reason = outages.reason_in_one_line(self._waits_for) if self._waits_for is not None else otherwise
        return (
            f"the tracking server did not take everything ({self._waiting()}): {reason}. {self._where()}: "
            "`smp-ensemble sync` delivers it"
        )

    def _where(self) -> str:
        return f"Nothing is lost: the rest waits in {self._spool.folder}"

    def _run(self) -> None:
        pause = outages.FIRST_PAUSE
        while not self._closing:
            entry = self._spool.first()
            if entry is None:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                with outages.brief_calls(self._failures):
                    result = self._deliver(entry)
                self._spool.remove(entry, result)
            except Exception as error:
                if not outages.is_passing(error):
                    logger.exception("delivery to the tracking server stopped; the spool keeps everything")
                    self._broken_by = error  # raised by drain: a thread has no caller to raise to
                    return
                self._note(error)
                self._pause(outages.with_jitter(pause))
                pause = outages.next_pause(pause)
            else:
                self._last_delivery = time.monotonic()
                self._note(None)
                pause = outages.FIRST_PAUSE

    def _note(self, error: Exception | None) -> None:
        """Says once that the server is away, and once that it is back."""
        if error is not None and self._waits_for is None:
            reason = outages.reason_in_one_line(error)
            logger.warning("delivery waits, training goes on (%s): %s", self._waiting(), reason)
        elif error is None and self._waits_for is not None:
            logger.warning("delivery goes on: the tracking server is back (%s)", self._waiting())
        self._waits_for = error
        self._failures = 0 if error is None else self._failures + 1

    def _waiting(self) -> str:
        entries, size = self._spool.size()
        return f"waiting on disk: {entries} {'entry' if entries == 1 else 'entries'}, {size / 1e6:.1f} MB"

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._closing:
            time.sleep(0.05)
