"""Image files opened for reading row by row: as far as needed by rasterio, or decoded whole by Pillow."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from smp_ensemble.data import images
from smp_ensemble.exceptions import DataError
from smp_ensemble.inference import geo
from smp_ensemble.inference.rows import Rows, separate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from smp_ensemble.inference.rows import ImageRows, Place


class DecodedRows:
    """Rows of an image that was decoded whole; pixels have shape `(H, W, C)`."""

    def __init__(self, pixels: npt.NDArray[Any]) -> None:
        self._pixels = pixels
        self.height, self.width, self.bands = pixels.shape
        self.dtype = pixels.dtype
        self.place: Place | None = None

    def read(self, top: int, bottom: int) -> Rows:
        """Its rows from `top` to before `bottom`."""
        return separate(self._pixels[top:bottom].transpose(2, 0, 1), (None,) * self.bands)


@contextmanager
def open_image(path: Path) -> Iterator[ImageRows]:
    """Opens an image for reading rows from the top.

    With rasterio (the extra `geo`) PNG, JPEG and TIFF are read as far as needed. Without it, and in formats or depths
    that GDAL reads in another way than `read_image`, the whole image is decoded.

    Raises:
        DataError: Missing or broken, or it would be decoded whole and has more than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with geo.open_rows(path) as rows:
        if rows is not None:
            yield rows
            return
    size_of(path)
    yield DecodedRows(images.read_image(path))


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header alone, however large it is where it can be read by rows.

    Raises:
        DataError: The file is missing or not an image, or has more pixels than can be decoded.
    """
    with geo.open_rows(path) as rows:
        if rows is not None:
            return rows.height, rows.width
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            height, width = images.image_size(path)
    except DataError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise _too_large(path, f"over {limit}") from error
        raise
    if limit is not None and height * width > limit:
        raise _too_large(path, f"{height} x {width}")
    return height, width


def _too_large(path: Path, pixels: str) -> DataError:
    remedy = "store it as PNG or TIFF of 8 or 16 bits" if geo.available() else 'pip install "smp-ensemble[geo]"'
    return DataError(
        f"{path} has {pixels} pixels, and at most {Image.MAX_IMAGE_PIXELS} (PIL.Image.MAX_IMAGE_PIXELS) are decoded "
        f"whole: {remedy} to have it read row by row"
    )
