"""A PNG written row by row, which Pillow cannot: grey or RGB of 8 bits."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import BinaryIO

    import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}
_NONE, _SUB = 0, 1


def write_png(path: Path, blocks: Iterable[npt.NDArray[np.uint8]], shape: tuple[int, int, int]) -> None:
    """Writes a PNG; memory is that of one block.

    Class ids are stored as they are; colours as differences to the pixel on the left, which compress better.

    Args:
        path: The file.
        blocks: Arrays `(B, rows, W)` from the top, of any numbers of rows.
        shape: `(B, H, W)` with B 1 (grey) or 3 (RGB).

    Raises:
        OSError: It cannot be written.

    References:
        Portable Network Graphics (PNG) Specification, W3C, https://www.w3.org/TR/png-3/.
    """
    bands, height, width = shape
    compressor = zlib.compressobj(6)
    with path.open("wb") as file:
        file.write(_SIGNATURE)
        _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[bands], 0, 0, 0))
        for block in blocks:
            _write_chunk(file, b"IDAT", compressor.compress(_filtered(block)))
        _write_chunk(file, b"IDAT", compressor.flush())
        _write_chunk(file, b"IEND", b"")


def _filtered(block: npt.NDArray[np.uint8]) -> bytes:
    """Each row with the number of its filter in front."""
    bands, height, width = block.shape
    rows = np.ascontiguousarray(block.transpose(1, 2, 0)).reshape(height, width * bands)
    lines = np.empty((height, 1 + width * bands), dtype=np.uint8)
    lines[:, 0] = _NONE if bands == 1 else _SUB
    lines[:, 1:] = rows
    if bands > 1:
        lines[:, 1 + bands :] -= rows[:, :-bands]
    return lines.tobytes()


def _write_chunk(file: BinaryIO, name: bytes, content: bytes) -> None:
    if content or name == b"IEND":
        file.write(struct.pack(">I", len(content)) + name + content)
        file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(name))))
