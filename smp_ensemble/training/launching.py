"""The other processes of a training on this machine: started as this one was, ended with it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.processes import failure_elsewhere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smp_ensemble.training.processes import Place

GRACE_SECONDS = 15.0
"""How long a process may take to leave by itself, when another one failed."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def launched(place: Place, end_as_failed: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, the other processes are there; if it fails, they are ended.

    They run this very program with the same arguments, from its beginning. Where torchrun or SLURM have started all
    processes, nothing is started. If another process fails, and this one waits for it where no exception arrives, a
    thread ends this process.

    Args:
        place: Which process this is, and how many there are.
        end_as_failed: Is called with the reason before this process is ended that way.

    Raises:
        ConfigError: This program cannot be started again.
    """
    if place.count == 1 or not place.is_first:
        yield
        return
    children = [] if place.launched else _start(place)
    done = threading.Event()
    threading.Thread(
        target=_watch, args=(children, done, end_as_failed), name="smp-ensemble-watch", daemon=True
    ).start()
    try:
        yield
    except BaseException:
        done.set()
        _end(children)
        raise
    finally:
        done.set()


def _start(place: Place) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    command = _command()
    os.environ.update(meeting, LOCAL_RANK="0")  # where Lightning looks: processes are there already
    return [
        subprocess.Popen(  # noqa: S603 (this very program)
            command,
            env={**os.environ, "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the first process, which ends the others
        )
        for rank in range(1, place.count)
    ]


def _command() -> list[str]:
    """How this program was started.

    Raises:
        ConfigError: It is no program but a session that somebody types in.
    """
    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    if spec is not None:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    if not getattr(program, "__file__", None):
        raise ConfigError(
            "several processes run one program, and this is none that could be started again: write a script, or use "
            "devices=1"
        )
    return [sys.executable, str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]


def _watch(
    children: list[subprocess.Popen[bytes]], done: threading.Event, end_as_failed: Callable[[str], None]
) -> None:
    """Ends this process some time after another one failed, unless it has left the block by then."""
    while not done.wait(1.0):
        reason = _failure(children)
        if reason is not None and not done.wait(GRACE_SECONDS):
            logger.error("%s", reason)
            end_as_failed(reason)
            _end(children)
            os._exit(1)


def _failure(children: list[subprocess.Popen[bytes]]) -> str | None:
    for rank, child in enumerate(children, 1):
        if child.poll() not in {None, 0}:
            return failure_elsewhere(0.0) or f"process {rank} ended with exit code {child.returncode}"
    return None if children else failure_elsewhere(0.0)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
