"""Small whole image files of every kind that is read."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 4, (12, 16), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encoded(pixels, form: str, mode: str | None = None, **options) -> bytes:
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def many_bands() -> bytes:
    """A TIFF that only rasterio reads."""
    import rasterio

    place = rasterio.Affine(1, 0, 5, 0, 1, 5)  # without one, it warns
    shape = {"width": 16, "height": 12, "count": 5, "dtype": "uint16"}
    with rasterio.MemoryFile() as file:
        with file.open(driver="GTiff", compress="deflate", transform=place, **shape) as raster:
            raster.write(RNG.integers(0, 4096, (5, 12, 16), dtype=np.uint16))
        return file.read()


SEEDS = {
    "PNG": [
        encoded(GREY, "PNG"),
        encoded(COLOURS, "PNG"),
        encoded(COLOURS, "PNG", "P"),
        encoded(COLOURS, "PNG", "RGBA"),
        encoded(GREY.astype(np.uint16) * 999, "PNG"),
        encoded(GREY, "PNG", bits=2),
    ],
    "JPEG": [encoded(COLOURS, "JPEG"), encoded(GREY, "JPEG"), encoded(COLOURS, "JPEG", progressive=True)],
    "TIFF": [
        encoded(COLOURS, "TIFF"),
        encoded(COLOURS, "TIFF", compression="tiff_lzw"),
        encoded(GREY, "TIFF", compression="tiff_adobe_deflate"),
        encoded(GREY.astype(np.float32), "TIFF"),
    ],
    "BMP": [encoded(COLOURS, "BMP"), encoded(GREY, "BMP")],
    "WebP": [encoded(COLOURS, "WEBP"), encoded(COLOURS, "WEBP", lossless=True)],
}
if importlib.util.find_spec("rasterio"):
    SEEDS["TIFF"].append(many_bands())
