"""Finished rows of a large result, kept on disk until it is whole, so that interrupted work goes on where it was."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt


class RowFile:
    """Rows of a result in `NAME.partial.rows`, raw, and beside it in `NAME.progress` (JSON) how many there are.

    Rows are only ever appended, and counted once they are on the disk: whenever the process ends, however hard, what is
    counted is whole.

    Args:
        output: The file that the rows will become; both files lie beside it.
        digest: Of everything that decides what the rows hold. Rows under another digest are thrown away.
        width: W, of the result in pixels.
        resume: False: rows that are there are thrown away.
    """

    def __init__(self, output: Path, digest: str, width: int, *, resume: bool = True) -> None:
        self._path = output.with_name(f"{output.name}.partial.rows")
        self._progress = output.with_name(f"{output.name}.progress")
        self._digest = digest
        self._width = width
        self.rows = 0
        self.bands = 0
        self.dtype = np.dtype(np.uint8)
        if not (resume and self._find()):
            self.remove()

    def _find(self) -> bool:
        """Takes over what an earlier process left, if it is the same work."""
        try:
            content = json.loads(self._progress.read_text(encoding="utf-8"))
            if content["digest"] != self._digest:
                return False
            self.bands, self.dtype = int(content["bands"]), np.dtype(content["dtype"])
            whole = int(content["rows"])
            if self._path.stat().st_size < whole * self._row_bytes:
                return False
            os.truncate(self._path, whole * self._row_bytes)  # a row that was being written
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.rows = whole
        return True

    @property
    def _row_bytes(self) -> int:
        return self.bands * self._width * self.dtype.itemsize

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Keeps further rows, `(B, rows, W)`; B and the type are those of the first ones.

        Raises:
            OSError: The disk is full, say.
        """
        if not self.rows:
            self.bands, self.dtype = len(rows), rows.dtype
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(rows.transpose(1, 0, 2)).data)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows.shape[1]
        progress = {"digest": self._digest, "rows": self.rows, "bands": self.bands, "dtype": self.dtype.name}
        partial = self._progress.with_name(f"{self._progress.name}.partial")
        partial.write_text(json.dumps(progress), encoding="utf-8")
        partial.replace(self._progress)

    def blocks(self, rows: int) -> Iterator[npt.NDArray[Any]]:
        """Everything, from the top, in arrays `(B, rows, W)`; the last may have fewer rows."""
        with self._path.open("rb") as file:
            for top in range(0, self.rows, rows):
                count = min(rows, self.rows - top)
                content = file.read(count * self._row_bytes)
                lines = np.frombuffer(content, self.dtype).reshape(count, self.bands, self._width)
                yield lines.transpose(1, 0, 2)

    def remove(self) -> None:
        """Deletes both files, if they are there."""
        self._progress.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
