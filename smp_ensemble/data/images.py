"""Image and mask files, read as stored: not rotated by EXIF orientation, because masks are aligned to stored pixels."""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from smp_ensemble.data.limits import FILES, Limits
from smp_ensemble.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")  # of Pillow's many; one of the others starts a PostScript interpreter
_GDAL_DRIVERS = ["GTiff", "PNG"]  # likewise: the files that rasterio is asked for, nothing that names other files
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow stretches the ids of 2- and 4-bit grey files to 0..255
_UNREADABLE = (  # what Pillow and rasterio raise for broken files
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # raised where warnings are errors
)
_RASTERIO_LOCK = threading.Lock()
logging.getLogger("PIL.TiffImagePlugin").addHandler(logging.NullHandler())  # else it prints of bands left to rasterio


def read_image(path: str | Path) -> npt.NDArray[Any]:
    """The pixels of an image file, as stored.

    Args:
        path: PNG, JPEG, TIFF, BMP or WebP; GeoTIFF with other bands or depths needs the extra `geo` (rasterio).

    Returns:
        Shape `(H, W, C)`: grey `C = 1`, palette and RGB `C = 3` (an alpha channel is dropped), TIFF all its bands, even
        one that is marked as alpha (GDAL marks near infrared so, unless told otherwise). uint8, uint16 and int16 as
        stored, everything else as float32.

    Raises:
        DataError: The file is missing or broken, or needs rasterio and that is not installed.
    """
    return decode_image(read_bytes(path), str(path))


def decode_image(content: bytes, name: str, limits: Limits = FILES) -> npt.NDArray[Any]:
    """The pixels of an encoded image; `name` stands for it in errors. Else as `read_image`.

    Raises:
        DataError: The bytes are not a readable image, or declare more pixels than `limits` allow.
    """
    with _readable(name):
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                limits.check_size(picture.height, picture.width, len(picture.getbands()), name)
                if not _loses_data(picture):
                    _check_sums(content, picture)
                    return _pixels(picture)
        except UnidentifiedImageError:
            if content[:4] not in _TIFF_STARTS:
                raise
        with _rasterio(content, name) as raster:
            limits.check_size(raster.height, raster.width, raster.count, name)
            return _sensor_values(np.ascontiguousarray(raster.read().transpose(1, 2, 0)))


def declared_size(content: bytes, name: str) -> tuple[int, int, int]:
    """Height, width and bands of an encoded image from its header alone; `name` stands for it in errors.

    Raises:
        DataError: The bytes do not start as an image does.
    """
    with _readable(name):
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                if not _loses_data(picture):
                    return picture.height, picture.width, len(picture.getbands())
        except UnidentifiedImageError:
            if content[:4] not in _TIFF_STARTS:
                raise
        with _rasterio(content, name) as raster:
            return int(raster.height), int(raster.width), int(raster.count)


def read_mask(path: str | Path) -> npt.NDArray[np.uint8]:
    """The class ids of a mask file, as stored: grey levels, or palette indices.

    Returns:
        Shape `(H, W)`.

    Raises:
        DataError: The file is missing or broken, has several bands, or ids beyond 255.
    """
    return decode_mask(read_bytes(path), str(path))


def decode_mask(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """The class ids of an encoded mask; `name` stands for it in errors. Else as `read_mask`.

    Raises:
        DataError: The bytes are not a readable mask.
    """
    with _readable(name), Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise DataError(
                f"mask {name}: expected one band of class ids (PNG of mode L or P), found mode {picture.mode}; "
                "turn its colours into class ids first"
            )
        step = _GREY_STEPS.get(_raw_mode(picture), 1)
        ids = np.asarray(picture)
    if ids.max(initial=0) > 255 or ids.min(initial=0) < 0:
        raise DataError(f"mask {name}: expected class ids 0..255, found {ids.min()}..{ids.max()}")
    return ids.astype(np.uint8) // np.uint8(step)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file in pixels, from its header alone.

    Raises:
        DataError: The file is missing or not an image.
    """
    name = str(path)
    with _readable(name):
        try:
            with Image.open(path, formats=_FORMATS) as picture:
                return picture.height, picture.width
        except UnidentifiedImageError:
            content = read_bytes(path)
            if content[:4] not in _TIFF_STARTS:
                raise
        with _rasterio(content, name) as raster:
            return int(raster.height), int(raster.width)


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes.

    Raises:
        DataError: The file is missing or cannot be opened.
    """
    with _readable(str(path)):
        return Path(path).read_bytes()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:  # its own text holds an address in memory
        raise DataError(f"cannot read image {name}: expected PNG, JPEG, TIFF, BMP or WebP, found none") from error
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"cannot read image {name}: {' '.join(reason.split()) or type(error).__name__}") from error


def _raw_mode(picture: Image.Image) -> str:
    """How the file itself lays out its pixels, in Pillow's words (`L;4`, `RGBX`, `RGB;16B`)."""
    arguments = picture.tile[0].args if isinstance(picture, ImageFile.ImageFile) and picture.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _loses_data(picture: Image.Image) -> bool:
    """Whether Pillow would drop bands (a near-infrared fourth) or the lower half of 16-bit colours."""
    raw = _raw_mode(picture)
    several = len(picture.getbands()) > 1
    return (picture.format == "TIFF" and "X" in raw) or (picture.format in ("TIFF", "PNG") and several and ";16" in raw)


def _check_sums(content: bytes, picture: Image.Image) -> None:
    """Compares the checksums of a PNG, which decoding alone does not: flipped bytes would be other pixels."""
    if picture.format == "PNG":
        with Image.open(io.BytesIO(content), formats=("PNG",)) as again:
            again.verify()


def _pixels(picture: Image.Image) -> npt.NDArray[Any]:
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)[..., None]
    if picture.mode in ("I", "F"):
        return _sensor_values(np.array(picture)[..., None])
    if picture.mode in ("1", "L", "LA", "La"):
        return np.array(picture.convert("LA" if picture.mode == "La" else "L").getchannel(0))[..., None]
    if picture.format == "TIFF" and picture.mode == "RGBA":
        return np.array(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def _sensor_values(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return pixels if pixels.dtype in (np.uint8, np.uint16, np.int16) else pixels.astype(np.float32)


@contextmanager
def _rasterio(content: bytes, name: str) -> Iterator[Any]:
    """An open rasterio data set; the lock is for the warning filter, which belongs to the whole process."""
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning
    except ImportError as error:
        raise DataError(
            f'cannot read image {name}: TIFFs of these bands or bits need rasterio; pip install "smp-ensemble[geo]"'
        ) from error
    with _RASTERIO_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.MemoryFile(content) as file, file.open(driver=_GDAL_DRIVERS) as raster:
            yield raster
