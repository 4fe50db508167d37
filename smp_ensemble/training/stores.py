"""Which store a training writes to: the given one, or the default, opened and closed here."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from smp_ensemble import registry
from smp_ensemble.exceptions import UndeliveredError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from smp_ensemble.typing import Snapshot, SnapshotRecord, SnapshotStore


class SilentStore:
    """Keeps nothing: the store of all processes but the first."""

    def save_snapshot(self, record: SnapshotRecord) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def snapshots(self) -> list[Snapshot]:
        """None."""
        return []

    def close(self, error: str | None = None) -> None:
        """Does nothing."""


def open_default_store() -> SnapshotStore:
    """MLflow, as configured by its environment variables. By name: training itself knows no tracking server."""
    store: SnapshotStore = registry.load("smp_ensemble.stores", "mlflow")()
    return store


@contextlib.contextmanager
def opened(store: SnapshotStore | None) -> Iterator[SnapshotStore]:
    """The given store, left open; or the default one, closed with the block, as failed if it raises."""
    if store is not None:
        yield store
        return
    own = open_default_store()
    try:
        yield own
    except UndeliveredError:
        own.close()  # nothing went wrong but the delivery
        raise
    except BaseException as error:
        own.close(f"{type(error).__name__}: {error}")
        raise
    own.close()
