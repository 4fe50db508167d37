"""Spools whose training is over, found on the disk and delivered from there alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import mlflow
from mlflow.exceptions import MlflowException

from smp_ensemble.exceptions import DeliveryError, UndeliveredError
from smp_ensemble.locks import Lock
from smp_ensemble.tracking import names
from smp_ensemble.tracking.addresses import ADDRESS_FILE, read_address, read_previews
from smp_ensemble.tracking.courier import Courier
from smp_ensemble.tracking.delivery import Delivery
from smp_ensemble.tracking.outages import is_passing, persist, reason_in_one_line
from smp_ensemble.tracking.runs import TrackedRun, attach
from smp_ensemble.tracking.settling import REASON, settle
from smp_ensemble.tracking.spool import LOCK_FILE, Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from smp_ensemble.tracking.addresses import Address

BUSY, DELIVERED, RESUMABLE, KILLED = "a process is at it", "delivered", "delivered, not finished", "delivered, FAILED"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Waiting:
    """A spool on the disk.

    Attributes:
        folder: It.
        address: Where it goes.
        entries: How many entries wait.
        size: How large they are, in bytes.
    """

    folder: Path
    address: Address
    entries: int
    size: int


def find_spools(roots: Iterable[Path]) -> list[Waiting]:
    """All spools in folders and below them.

    Raises:
        IntegrityError: One cannot be read.
    """
    folders = sorted({path.parent for root in roots for path in root.rglob(ADDRESS_FILE)})
    return [waiting_in(folder) for folder in folders]


def waiting_in(folder: Path) -> Waiting:
    """What waits in a spool now. Changes nothing: a training may be at it.

    Raises:
        IntegrityError: It cannot be read.
    """
    entries = [path for path in folder.glob("*-*") if path.name[:1].isdigit()]
    size = 0
    for entry in entries:
        for path in entry.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # delivered in this very moment
                size += path.stat().st_size
    return Waiting(folder, read_address(folder), len(entries), size)


@contextlib.contextmanager
def speaking_to(tracking_uri: str | None) -> Iterator[None]:
    """While the block runs, MLflow means this server; None: the one of the environment."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri or before)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def deliver(waiting: Waiting, *, wait_seconds: float, can_go_on: bool, tracking_uri: str | None = None) -> str:
    """Delivers what waits in a spool and ends its run, unless a process is at it. Safe to repeat.

    A training that was killed ends as FAILED, if nobody can go on with it. A spool with which somebody can go on stays,
    with what it knows of the snapshots; all others go.

    Args:
        waiting: The spool.
        wait_seconds: How long to wait for a server that takes nothing.
        can_go_on: Whether somebody can go on with the training.
        tracking_uri: Its server, if it has another address now.

    Returns:
        What became of it.

    Raises:
        UndeliveredError: The server is away.
        DeliveryError: The server refused something, or does not know the run.
    """
    lock = Lock(waiting.folder / LOCK_FILE)
    if not lock.take():
        return BUSY
    with lock, speaking_to(tracking_uri or waiting.address.tracking_uri):
        spool = Spool(waiting.folder)
        run = _asked(lambda: _run(waiting), waiting, wait_seconds)
        previews = read_previews(waiting.folder)
        courier = Courier(spool, Delivery(run, keep=waiting.address.keep, previews=previews, earlier=spool.receipts))
        try:
            courier.drain(wait_seconds, since_last=True)
        finally:
            courier.close(wait=spool.is_empty())
        outcome = _asked(lambda: _outcome(run, can_go_on=can_go_on), waiting, wait_seconds)
        if outcome != RESUMABLE:
            spool.discard()
        return outcome


def _asked(call: Callable[[], Result], waiting: Waiting, seconds: float) -> Result:
    """What a server says, if it answers in time."""
    try:
        return persist(lambda _: call(), seconds)
    except MlflowException as error:
        about = f"run {waiting.address.run_id} on {mlflow.get_tracking_uri()}: {reason_in_one_line(error)}"
        if is_passing(error):
            raise UndeliveredError(
                f"the tracking server does not answer: {about}. Nothing is lost: {waiting.entries} entries wait in "
                f"{waiting.folder}: `smp-ensemble sync` delivers them"
            ) from error
        raise DeliveryError(f"what waits in {waiting.folder} cannot be delivered: {about}") from error


def _run(waiting: Waiting) -> TrackedRun:
    """The training's run. Whoever delivers its end ends it, whoever had opened it."""
    found = attach(waiting.address.run_id)
    return TrackedRun(found.client, found.run_id, found.experiment_id, found.name, owned=True)


def _outcome(run: TrackedRun, *, can_go_on: bool) -> str:
    """What a training is now that all of it is delivered; one that was killed is ended if nobody can go on with it."""
    found = run.client.get_run(run.run_id)
    status = found.info.status
    if status == "FINISHED":
        if names.ERROR in found.data.tags:
            run.client.delete_tag(run.run_id, names.ERROR)
        return DELIVERED
    if can_go_on:
        return RESUMABLE
    if status == "RUNNING":
        settle(run)
        run.end(REASON)
        return KILLED
    return DELIVERED
