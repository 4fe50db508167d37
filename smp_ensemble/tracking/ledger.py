"""What of a spool was delivered, for the processes that come after: a line for each entry that must not come twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smp_ensemble.durable import append_line, write_whole
from smp_ensemble.exceptions import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Receipt:
    """An entry that was delivered.

    Attributes:
        key: Which one: the same for the same thing in every process of one training.
        kind: The entry's.
        result: What its delivery left to know: a snapshot's reference, a point of the curves.
    """

    key: str
    kind: str
    result: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """An append-only file of receipts, in the order of delivery.

    Args:
        path: The file; it need not exist.

    Raises:
        IntegrityError: A line of it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.receipts: list[Receipt] = []
        if not path.exists():
            return
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.receipts.append(Receipt(**json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise IntegrityError(f"{path}, line {number}: expected a receipt as JSON, got {line[:80]!r}") from error
        if torn:  # a process died while it wrote the line: that entry is still in the spool
            write_whole(path, lambda file: file.write(whole + b"\n" if whole else b""))

    def add(self, receipt: Receipt) -> None:
        """Keeps a receipt; it is on the disk when this returns."""
        line = json.dumps({"key": receipt.key, "kind": receipt.kind, "result": dict(receipt.result)})
        append_line(self._path, line)
        self.receipts.append(receipt)
