"""What can happen to a file; each kind of damage is given the file, another file, and a random generator."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def truncated(path: Path, rng: np.random.Generator, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(1, max(2, len(content)))][: max(0, len(content) - 1)])


def one_bit_flipped(path: Path, rng: np.random.Generator, other: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def swapped(path: Path, rng: np.random.Generator, other: Path) -> None:
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def missing(path: Path, rng: np.random.Generator, other: Path) -> None:
    path.unlink()


def emptied(path: Path, rng: np.random.Generator, other: Path) -> None:
    path.write_bytes(b"")


def replaced_by_a_link(path: Path, rng: np.random.Generator, other: Path) -> None:
    """To a whole copy of itself elsewhere."""
    target = Path(tempfile.mkdtemp()) / path.name
    target.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


def appended(path: Path, rng: np.random.Generator, other: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(rng.integers(1, 40)))


KINDS = (truncated, one_bit_flipped, swapped, missing, emptied, replaced_by_a_link, appended)
