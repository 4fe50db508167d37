"""What is to be delivered, on local disk first: whole entries in order, and the thread that sends them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException

from smp_ensemble.exceptions import DeliveryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ENTRY_FILE = "entry.json"
PROGRESS_FILE = "progress.json"

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds to wait after a failed delivery; doubled each time up to the longest."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One thing to deliver: a folder with `entry.json` and whatever files belong to it.

    Attributes:
        folder: Its place in the spool; the name starts with its number.
        kind: What it is, for the one who delivers it.
        content: Plain values.
    """

    folder: Path
    kind: str
    content: Mapping[str, Any]

    @property
    def progress(self) -> dict[str, Any]:
        """What `remember` kept: what is already done of this delivery."""
        path = self.folder / PROGRESS_FILE
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return progress

    def remember(self, **values: Any) -> None:
        """Keeps what is done, so that a delivery that breaks off goes on there and does nothing twice."""
        _write_json(self.folder / PROGRESS_FILE, {**self.progress, **values})


class Spool:
    """A folder of entries in the order in which they were put.

    Args:
        folder: Created if need be; entries that an earlier process left are delivered first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._next = max((_number(path) for path in self._paths()), default=0) + 1
        self._lock = threading.Lock()

    def put(self, kind: str, content: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Adds an entry; it is there as a whole when this returns, and not at all if this raises.

        Args:
            kind: What it is.
            content: Plain values, for `entry.json`.
            write: Writes further files into the entry's folder.
        """
        with self._lock:
            number, self._next = self._next, self._next + 1
        writing = self.folder / f".writing-{number:08d}"
        writing.mkdir()
        try:
            if write is not None:
                write(writing)
            _write_json(writing / ENTRY_FILE, {"kind": kind, "content": dict(content)})
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        writing.rename(self.folder / f"{number:08d}-{kind}")

    def first(self) -> Entry | None:
        """The oldest entry, or None."""
        path = min(self._paths(), key=_number, default=None)
        if path is None:
            return None
        values = json.loads((path / ENTRY_FILE).read_text(encoding="utf-8"))
        return Entry(path, values["kind"], values["content"])

    def remove(self, entry: Entry) -> None:
        """Forgets an entry that was delivered."""
        gone = entry.folder.with_name(f".writing-{entry.folder.name}")
        entry.folder.rename(gone)  # at once: a half-deleted entry must not look like one to deliver
        shutil.rmtree(gone, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether everything was delivered."""
        return not self._paths()

    def discard(self) -> None:
        """Deletes the folder, if nothing waits in it, and the folders around it that are empty now."""
        if self.is_empty():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another training's
                for parent in list(self.folder.parents)[:2]:
                    parent.rmdir()

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("*-*") if path.name[:1].isdigit()]


class Courier:
    """A background thread that delivers a spool's entries in order, trying again for as long as it takes.

    A server that is away is waited for. An error that would come again stops the thread and is raised by `drain`.

    Args:
        spool: What to deliver.
        deliver: Sends one entry; raises if it could not.
    """

    def __init__(self, spool: Spool, deliver: Callable[[Entry], None]) -> None:
        self._spool = spool
        self._deliver = deliver
        self._wake = threading.Event()
        self._closing = False
        self._waits_for: Exception | None = None
        self._broken_by: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="smp-ensemble-courier", daemon=True)
        self._thread.start()

    def put(self, kind: str, content: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """`Spool.put`, and wakes the thread."""
        self._spool.put(kind, content, write)
        self._wake.set()

    def drain(self, timeout_seconds: float) -> None:
        """Waits until everything is delivered.

        Raises:
            DeliveryError: Something is left after `timeout_seconds`, or cannot be delivered at all.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._spool.is_empty():
            if self._broken_by is not None or time.monotonic() > deadline:
                error = self._broken_by or self._waits_for
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}" if error else "delivery is slow"
                raise DeliveryError(
                    f"not everything could be delivered: {reason}. "
                    f"Nothing is lost: the rest waits in {self._spool.folder}"
                ) from error
            time.sleep(0.02)

    def close(self) -> None:
        """Stops the thread after the entry in hand."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._closing:
            entry = self._spool.first()
            if entry is None:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                self._deliver(entry)
            except Exception as error:
                if not is_passing(error):
                    logger.exception("delivery to the tracking server stopped; the spool keeps everything")
                    self._broken_by = error  # raised by drain: a thread has no caller to raise to
                    return
                if self._waits_for is None:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    logger.warning("delivery to the tracking server waits, training goes on: %s", reason)
                self._waits_for = error
                self._pause(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if self._waits_for is not None:
                    logger.warning("delivery to the tracking server goes on")
                self._waits_for = None
                pause = FIRST_PAUSE
                self._spool.remove(entry)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._closing:
            time.sleep(0.05)


def is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later: the network, a busy or broken server; not a refusal or a defect."""
    if isinstance(error, MlflowException):
        status: int = error.get_http_status_code()
        return status >= 500 or status in {408, 429}
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
