"""Files that survive a power cut: there as a whole, or not at all. Written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file whole or not at all; what was there before stays until the new one is on the disk.

    Args:
        path: Its folder exists.
        write: Writes the content.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain values as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(values).encode()))


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file; after a power cut the last one may be there in part, without its end of line."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the disk remember which names a folder holds; where the system keeps that itself, nothing."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes the disk remember all files below a folder, and the folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
