"""What a large result is written to: PNG, GeoTIFF or `.npy`, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.exceptions import InputError
from smp_ensemble.inference import geo
from smp_ensemble.inference.png_stream import write_png
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from smp_ensemble.inference.rows import Place
    from smp_ensemble.typing import Mode

BLOCK_ROWS = geo.BLOCK

_TIFF = (".tif", ".tiff")
_FORMATS = {
    "mask": (".png", *_TIFF, ".npy"),
    "overlay": (".png", *_TIFF),
    "probabilities": (*_TIFF, ".npy"),
    "uncertainty": (*_TIFF, ".npy"),
}
_NODATA = {"mask": float(IGNORE_INDEX), "probabilities": float("nan"), "uncertainty": float("nan")}


def check_format(output: Path, kind: str, mode: Mode) -> None:
    """Refuses a file name that does not fit what is to be written.

    Raises:
        InputError: `rle`, an ending that the kind has no file format for, or a GeoTIFF without rasterio.
    """
    if kind == "rle":
        raise InputError("kind=rle keeps whole masks in memory: predict kind=mask of a large image and encode that")
    fitting = [suffix for suffix in _FORMATS[kind] if not (suffix == ".png" and (kind, mode) == ("mask", "multilabel"))]
    suffix = output.suffix.lower()
    if suffix not in fitting:
        planes = " in multilabel mode" if kind == "mask" and mode == "multilabel" else ""
        raise InputError(f"expected a file of kind {kind}{planes} to end in {', '.join(fitting)}, got '{output.name}'")
    if suffix in _TIFF and not geo.available():
        raise InputError(
            f"writing '{output.name}' needs rasterio: pip install \"smp-ensemble[geo]\", or name a file that ends in "
            f"{' or '.join(one for one in fitting if one not in _TIFF)}"
        )


def write_file(
    output: Path,
    blocks: Iterable[npt.NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    kind: str,
    *,
    place: Place | None = None,
    names: Sequence[str] = (),
) -> None:
    """Writes a result that `check_format` accepts, whole or not at all.

    Args:
        output: The file; until it is whole it is called `NAME.partial`.
        blocks: Arrays `(B, rows, W)` from the top, `BLOCK_ROWS` rows each, save the last.
        shape: `(B, H, W)`.
        dtype: Of the arrays.
        kind: What they show; says which value means no data.
        place: Where on Earth; only a GeoTIFF keeps it.
        names: Of the bands; only a GeoTIFF keeps them.

    Raises:
        OSError: It cannot be written.
    """
    partial = output.with_name(f"{output.name}.partial")
    suffix = output.suffix.lower()
    if suffix == ".npy":
        _write_npy(partial, blocks, shape, dtype, flat=kind == "mask" and shape[0] == 1)
    elif suffix == ".png":
        write_png(partial, blocks, shape)
    else:
        geo.write_geotiff(partial, blocks, shape, dtype, place=place, nodata=_NODATA.get(kind), names=names)
    partial.replace(output)


def _write_npy(
    path: Path, blocks: Iterable[npt.NDArray[Any]], shape: tuple[int, int, int], dtype: np.dtype[Any], *, flat: bool
) -> None:
    """An array `(B, H, W)`, or `(H, W)` if `flat`; not through a memory map, whose pages would count as memory."""
    _, height, width = shape
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape[1:] if flat else shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        start, top = file.tell(), 0
        for block in blocks:
            for band, rows in enumerate(block):
                file.seek(start + (band * height + top) * width * dtype.itemsize)
                file.write(np.ascontiguousarray(rows).data)
            top += block.shape[1]
