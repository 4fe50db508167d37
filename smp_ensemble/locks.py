"""Files that one process holds: the system lets go when it ends, however it ends, so that no lock is ever stale."""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path


class Lock:
    """A file that at most one process holds.

    Args:
        path: Created when it is taken; its folder exists. It stays, with the number of the last holder's process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def take(self) -> bool:
        """Takes it, unless another process has it. On Windows two processes are not kept apart.

        Returns:
            Whether this process has it now.
        """
        file = self._path.open("a+", encoding="ascii")
        try:
            import fcntl
        except ImportError:
            self._file = file
            return True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes must not inherit it
        except OSError:
            file.close()
            return False
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return True

    def holder(self) -> str:
        """The number of the process that took it last."""
        try:
            return self._path.read_text(encoding="ascii").strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    def let_go(self) -> None:
        """Lets others take it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
