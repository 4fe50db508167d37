"""Files that one process holds: the system lets go when it ends, however it ends, so that no lock is ever stale."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path


class Lock:
    """A file that at most one process holds.

    Args:
        path: Created when it is taken; its folder exists. It stays, with the number of the last holder's process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None  # no file object: what nobody closes is held as long as the process lives

    def take(self) -> bool:
        """Takes it, unless another process has it. On Windows two processes are not kept apart.

        Returns:
            Whether this process has it now.
        """
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl
        except ImportError:
            self._handle = handle
            return True
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: worker processes must not inherit it
        except OSError:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._handle = handle
        return True

    def holder(self) -> str:
        """The number of the process that took it last."""
        try:
            return self._path.read_text(encoding="ascii").strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    def let_go(self) -> None:
        """Lets others take it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
