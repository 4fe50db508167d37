"""`sync`: what waits on local disk for a tracking server that was away is delivered, from there alone."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smp_ensemble.exceptions import ConfigError, DeliveryError, UndeliveredError
from smp_ensemble.tracking.syncing import BUSY, RESUMABLE, Waiting, deliver, find_spools
from smp_ensemble.workflows.results import Report
from smp_ensemble.workflows.states import STATE_FILE, TrainingState, held, read_state

if TYPE_CHECKING:
    from smp_ensemble.workflows.options import SyncOptions

HERE = Path(".smp_ensemble")
WAITS, REFUSED = "waits", "refused"

logger = logging.getLogger(__name__)


def sync(options: SyncOptions) -> Report:
    """Delivers all spools of the working folder, or of the one that is named; those with a process at it stay.

    Safe to call at any time, twice, and while trainings run.

    Raises:
        ConfigError: There is no such folder.
        UndeliveredError: A server is still away.
        DeliveryError: A server refused something.
    """
    root = Path(options.spool) if options.spool else HERE
    if options.spool and not root.is_dir():
        raise ConfigError(f"expected the folder of a spool, or one with spools below it, got {options.spool}")
    rows: list[dict[str, Any]] = []
    failures: list[DeliveryError] = []
    for waiting in find_spools([root]):
        try:
            outcome = WAITS if options.dry_run else _deliver(waiting, options)
        except DeliveryError as error:
            failures.append(error)
            outcome = WAITS if isinstance(error, UndeliveredError) else REFUSED
            logger.warning("%s", error)
        rows.append(
            {
                "run": waiting.address.run_id,
                "entries": waiting.entries,
                "MB": round(waiting.size / 1e6, 1),
                "outcome": outcome,
                "spool": str(waiting.folder),
            }
        )
    if failures:
        refused = [error for error in failures if not isinstance(error, UndeliveredError)]
        raise (refused or failures)[0]
    notes = [] if rows else [f"nothing waits in {root}"]
    if any(row["outcome"] == RESUMABLE for row in rows):
        notes.append("trainings that are not finished: the command that began them goes on with --resume auto")
    return Report({"spools": rows}, rows, notes)


def _deliver(waiting: Waiting, options: SyncOptions) -> str:
    """Delivers one spool; what else is kept of a training goes when it is finished."""
    state = _state_of(waiting)
    if state is None:
        return deliver(waiting, wait_seconds=options.wait, can_go_on=False, tracking_uri=options.tracking_uri or None)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(state))
        except ConfigError:
            return BUSY
        outcome = deliver(waiting, wait_seconds=options.wait, can_go_on=True, tracking_uri=options.tracking_uri or None)
        if outcome not in {BUSY, RESUMABLE}:
            state.discard()
        return outcome


def _state_of(waiting: Waiting) -> TrainingState | None:
    """What is kept of a training that can be gone on with."""
    folder = waiting.folder.parent.parent
    return read_state(folder) if waiting.address.resumable and (folder / STATE_FILE).exists() else None
