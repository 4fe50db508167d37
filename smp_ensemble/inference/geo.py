"""rasterio, where it is installed (the extra `geo`): images read row by row, and GeoTIFF written row by row."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.exceptions import DataError
from smp_ensemble.inference.rows import Place, Rows, separate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

BLOCK = 512
"""Side of the blocks of a GeoTIFF, in pixels; rows are written by so many."""

CACHE_BYTES = 64 * 2**20
"""GDAL's cache of decoded blocks, which would else grow to a share of the machine's memory."""

_DRIVERS = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
}
_KEPT = ("uint8", "uint16", "int16", "float32")
_LOCK = threading.Lock()


def available() -> bool:
    """Whether rasterio is installed."""
    return importlib.util.find_spec("rasterio") is not None


class GeoRows:
    """Rows of an image that GDAL reads as far as needed."""

    def __init__(self, raster: Any) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self._raster = raster
        self.height, self.width = int(raster.height), int(raster.width)
        interpretations = list(raster.colorinterp)
        # As `read_image`: alpha is dropped, save that a TIFF's further bands are data whatever they are marked as.
        dropped = raster.driver != "GTiff" or raster.count == 2
        self._bands = [
            band for band, kind in enumerate(interpretations, 1) if not (dropped and kind == ColorInterp.alpha)
        ]
        self._palette = None
        if interpretations[0] == ColorInterp.palette:
            colours = raster.colormap(1)
            self._palette = np.array([colours.get(index, (0, 0, 0))[:3] for index in range(256)], dtype=np.uint8)
        self._nodata = tuple(raster.nodatavals[band - 1] for band in self._bands)
        flags = raster.mask_flag_enums[0]
        self._masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
        name = raster.dtypes[0]
        self.dtype = np.dtype(name if name in _KEPT else "float32")
        self.bands = 3 if self._palette is not None else len(self._bands)

        self.place: Place | None = self._find_place()

    def _find_place(self) -> Place:
        raster = self._raster
        points, system = raster.gcps
        transform = None if raster.transform.is_identity else raster.transform
        if points and transform is None:
            return Place(system, gcps=points, rpcs=raster.rpcs)
        return Place(raster.crs, transform, rpcs=raster.rpcs)

    def read(self, top: int, bottom: int) -> Rows:
        """Its rows from `top` to before `bottom`.

        Raises:
            DataError: The file is broken there.
        """
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(0, top, self.width, bottom - top)
        try:
            pixels = self._raster.read(self._bands, window=window)
            mask = self._raster.read_masks(1, window=window) > 0 if self._masked else None
        except RasterioError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"cannot read image {self._raster.name}, rows {top}..{bottom}: {reason}") from error
        rows = separate(pixels, self._nodata, mask)
        if self._palette is not None:
            return Rows(np.ascontiguousarray(self._palette[rows.pixels[0]].transpose(2, 0, 1)), rows.valid)
        return Rows(rows.pixels.astype(self.dtype, copy=False), rows.valid)


@contextmanager
def open_rows(path: Path) -> Iterator[GeoRows | None]:
    """Opens a PNG, JPEG or TIFF; None: rasterio is not installed, or it is something that `read_image` reads otherwise.

    Only the driver that the first bytes call for is asked: formats that refer to other files are not opened.

    Raises:
        DataError: The file cannot be opened.
    """
    start = _start(path)
    driver = next((driver for known, driver in _DRIVERS.items() if start.startswith(known)), None)
    if driver is None or not available():
        yield None
        return
    import rasterio
    from rasterio.errors import RasterioIOError

    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        try:
            with _quiet():
                raster = rasterio.open(path, driver=driver)
        except RasterioIOError as error:
            raise DataError(f"cannot read image {path}: {' '.join(str(error).split())}") from error
        with raster:
            yield GeoRows(raster) if _alike(raster) else None


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error


def _alike(raster: Any) -> bool:
    """Whether the pixels are what `read_image` gives: not of 1, 2 or 4 bits, which Pillow stretches, nor complex."""
    whole = all("NBITS" not in raster.tags(band, ns="IMAGE_STRUCTURE") for band in raster.indexes)
    return whole and len(set(raster.dtypes)) == 1 and not raster.dtypes[0].startswith("complex")


@contextmanager
def _quiet() -> Iterator[None]:
    """Most images lie nowhere on Earth; the lock is for the warning filter, which belongs to the whole process."""
    from rasterio.errors import NotGeoreferencedWarning

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def write_geotiff(
    path: Path,
    blocks: Iterable[npt.NDArray[Any]],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    *,
    place: Place | None = None,
    nodata: float | None = None,
    names: Sequence[str] = (),
) -> None:
    """Writes a tiled GeoTIFF, compressed without loss; BigTIFF where it may become larger than 4 GB.

    Args:
        path: The file.
        blocks: Arrays `(B, rows, W)` from the top; `BLOCK` rows each, save the last.
        shape: `(B, H, W)`.
        dtype: Of the pixels.
        place: Where on Earth the image lies.
        nodata: The value that means no data.
        names: Descriptions of the bands.

    Raises:
        OSError: It cannot be written.
    """
    import rasterio
    from rasterio.windows import Window

    bands, height, width = shape
    place = place or Place()
    profile = {
        "driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": dtype.name, "nodata": nodata,
        "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "interleave": "band", "compress": "deflate",
        "predictor": 3 if dtype.kind == "f" else 2, "bigtiff": "if_safer", "crs": place.crs,
    }  # fmt: skip
    if place.transform is not None:
        profile["transform"] = place.transform
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        with _quiet():
            raster = rasterio.open(path, "w", **profile)
        with raster:
            if place.gcps:
                raster.gcps = (place.gcps, place.crs)
            if place.rpcs is not None:
                raster.rpcs = place.rpcs
            for band, name in enumerate(names, 1):
                raster.set_band_description(band, name)
            top = 0
            for block in blocks:
                raster.write(block, window=Window(0, top, width, block.shape[1]))
                top += block.shape[1]
