"""What is to be delivered, on local disk first: whole entries in order.

Exactly once, whatever dies when: an entry is there as a whole or not at all; its delivery remembers what it has done;
and what was delivered stands in the ledger before the entry goes, so that no later process puts it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smp_ensemble.durable import sync_folder, sync_tree, write_json
from smp_ensemble.tracking.ledger import Ledger, Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

ENTRY_FILE = "entry.json"
PROGRESS_FILE = "progress.json"
LEDGER_FILE = "delivered.jsonl"
LOCK_FILE = "lock"
"""Is held by the process that delivers: the training's, or one that does it later."""


@dataclass(frozen=True)
class Entry:
    """One thing to deliver: a folder with `entry.json` and whatever files belong to it.

    Attributes:
        folder: Its place in the spool; the name starts with its number.
        kind: What it is, for the one who delivers it.
        content: Plain values.
        key: Says that two entries are the same thing, put by two processes of one training; None: repeating does no
            harm.
    """

    folder: Path
    kind: str
    content: Mapping[str, Any]
    key: str | None = None

    @property
    def progress(self) -> dict[str, Any]:
        """What `remember` kept: what is already done of this delivery."""
        path = self.folder / PROGRESS_FILE
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return progress

    def remember(self, **values: Any) -> None:
        """Keeps what is done, so that a delivery that breaks off goes on there and does nothing twice."""
        write_json(self.folder / PROGRESS_FILE, {**self.progress, **values})


class Spool:
    """A folder of entries in the order in which they were put.

    Args:
        folder: Created if need be; entries that an earlier process left are delivered first.

    Raises:
        IntegrityError: The ledger of an earlier process cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._ledger = Ledger(folder / LEDGER_FILE)
        delivered = {receipt.key for receipt in self._ledger.receipts}
        for entry in self.waiting():
            if entry.key in delivered:  # the process died between the ledger and the removal
                self._delete(entry)
        self._earlier = delivered | {entry.key for entry in self.waiting() if entry.key is not None}
        self._next = max((_number(path) for path in self._paths()), default=0) + 1
        self._lock = threading.Lock()

    @property
    def receipts(self) -> Sequence[Receipt]:
        """What was delivered of entries with a key, by this process and earlier ones."""
        return tuple(self._ledger.receipts)

    def put(
        self,
        kind: str,
        content: Mapping[str, Any],
        write: Callable[[Path], None] | None = None,
        *,
        key: str | None = None,
    ) -> bool:
        """Adds an entry; it is there as a whole when this returns, and not at all if this raises.

        Args:
            kind: What it is.
            content: Plain values, for `entry.json`.
            write: Writes further files into the entry's folder.
            key: Says which thing it is.

        Returns:
            Whether it was added: an earlier process of the same training may have put the thing of that key.
        """
        if key in self._earlier:
            return False
        with self._lock:
            number, self._next = self._next, self._next + 1
        writing = self.folder / f".writing-{number:08d}"
        writing.mkdir()
        try:
            if write is not None:
                write(writing)
            write_json(writing / ENTRY_FILE, {"kind": kind, "key": key, "content": dict(content)})
            sync_tree(writing)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        writing.rename(self.folder / f"{number:08d}-{kind}")
        sync_folder(self.folder)
        return True

    def first(self) -> Entry | None:
        """The oldest entry, or None."""
        path = min(self._paths(), key=_number, default=None)
        return None if path is None else _read(path)

    def waiting(self) -> list[Entry]:
        """All entries, the oldest first."""
        return [_read(path) for path in sorted(self._paths(), key=_number)]

    def remove(self, entry: Entry, result: Mapping[str, Any] | None = None) -> None:
        """Forgets an entry that was delivered; its key and what its delivery gave stay in the ledger."""
        if entry.key is not None:
            self._ledger.add(Receipt(entry.key, entry.kind, result or {}))
        self._delete(entry)

    def drop(self, kind: str) -> None:
        """Forgets entries of a kind that are no longer true, and were not delivered."""
        for entry in self.waiting():
            if entry.kind == kind:
                self._delete(entry)

    def _delete(self, entry: Entry) -> None:
        gone = entry.folder.with_name(f".writing-{entry.folder.name}")
        entry.folder.rename(gone)  # at once: a half-deleted entry must not look like one to deliver
        shutil.rmtree(gone, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether everything was delivered."""
        return not self._paths()

    def size(self) -> tuple[int, int]:
        """How much waits: entries, and bytes."""
        paths = self._paths()
        files = [file for path in paths for file in path.rglob("*")]
        total = 0
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # delivered in this very moment
                total += file.stat().st_size
        return len(paths), total

    def discard(self) -> None:
        """Deletes the folder, if nothing waits in it, and the folders around it that are empty now."""
        if self.is_empty():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another training's
                for parent in list(self.folder.parents)[:2]:
                    parent.rmdir()

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.glob("*-*") if path.name[:1].isdigit()]


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _read(path: Path) -> Entry:
    values = json.loads((path / ENTRY_FILE).read_text(encoding="utf-8"))
    return Entry(path, values["kind"], values["content"], values.get("key"))
