"""What people hand to `predict`: arrays, lists of arrays, and cells of a DataFrame, checked before they are used."""

from __future__ import annotations

import base64
import binascii
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.data.images import declared_size, decode_image
from smp_ensemble.data.limits import FILES, Limits
from smp_ensemble.exceptions import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import pandas as pd

IMAGE_COLUMN = "image"


def read_arrays(data: Any, bands: int | None = None) -> list[npt.NDArray[np.generic]]:
    """Images `(H, W, C)` from an array or a list of arrays.

    Args:
        data: What was handed in.
        bands: C, the number of bands that the model takes; None: any.

    Raises:
        InputError: Wrong shape, type or value, or nothing at all.
    """
    if isinstance(data, np.ndarray):
        if data.ndim != 4:
            hint = ": add the batch axis, images[None]" if data.ndim == 3 else ""
            raise InputError(f"expected an array of shape (N, H, W, C), got {data.shape}{hint}")
        images = list(data)
    elif isinstance(data, list | tuple):
        images = list(data)
    else:
        raise InputError(
            f"expected an array (N, H, W, C), a list of arrays (H, W, C) or a DataFrame, got {type(data).__name__}"
        )
    if not images:
        raise InputError("expected at least one image, got none")
    for index, image in enumerate(images):
        check_image(image, f"image {index}", bands)
    return images


def image_cells(data: pd.DataFrame) -> list[Any]:
    """The cells of the column `image`.

    Raises:
        InputError: There is no such column, more than one, or no row.
    """
    found = list(data.columns).count(IMAGE_COLUMN)
    if found != 1:
        names = ", ".join(str(name)[:40] for name in data.columns[:20]) or "none"
        raise InputError(f"expected a column '{IMAGE_COLUMN}', got {names}")
    cells: list[Any] = data[IMAGE_COLUMN].tolist()
    if not cells:
        raise InputError("expected at least one image, got none")
    return cells


def image_bytes(cell: Any, where: str, limits: Limits) -> tuple[bytes, tuple[int, int]]:
    """A cell's encoded image, with the height and width that its header declares.

    Raises:
        InputError: The cell holds no image, or a larger one than `limits` allow.
    """
    content = to_bytes(cell, where, limits=limits)
    height, width, bands = declared_size(content, where)
    limits.check_size(height, width, bands, where)
    return content, (height, width)


def read_image_bytes(
    content: bytes, where: str, bands: int | None = None, limits: Limits = FILES
) -> npt.NDArray[np.generic]:
    """The image `(H, W, C)` of a cell.

    Raises:
        InputError: It cannot be decoded, or has other bands than the model takes.
    """
    image = decode_image(content, where, limits)
    check_image(image, where, bands)
    return image


def check_image(image: Any, name: str, bands: int | None) -> None:
    """Refuses what is no image `(H, W, C)` of numbers, or has other bands than the model takes.

    Raises:
        InputError: Names the image, what was expected and what came.
    """
    if not isinstance(image, np.ndarray) or image.ndim != 3 or 0 in image.shape:
        shape = image.shape if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"expected {name} as an array of shape (H, W, C), got {shape}")
    if bands is not None and image.shape[-1] != bands:
        hint = ": channels come last" if image.shape[0] == bands else ""
        raise InputError(f"expected {name} with {bands} bands, shape (H, W, {bands}), got {image.shape}{hint}")
    if image.dtype.kind not in "uif":
        raise InputError(f"expected {name} to hold numbers, raw pixel values, got dtype {image.dtype}")
    if image.dtype.kind == "f" and not _fits_float32(image):
        raise InputError(f"expected {name} to hold finite values, got NaN or infinity (or beyond float32)")


def _fits_float32(image: npt.NDArray[Any]) -> bool:
    """Whether every value is finite as float32, in which members compute; NaN compares as false."""
    largest = np.finfo(np.float32).max
    return bool(image.max() <= largest and image.min() >= -largest)


def check_arrays(images: Sequence[npt.NDArray[np.generic]], limits: Limits) -> list[tuple[int, int]]:
    """Height and width of each image, none of them larger than `limits` allow.

    Raises:
        InputError: An image is larger.
    """
    for index, image in enumerate(images):
        height, width, bands = image.shape
        limits.check_size(height, width, bands, f"image {index}")
    return [(image.shape[0], image.shape[1]) for image in images]


def to_bytes(value: Any, where: str, what: str = "image", limits: Limits = FILES) -> bytes:
    """A cell of a DataFrame, bytes or base64 of them, as bytes.

    Args:
        value: The cell.
        where: It stands, for errors: `row 3`.
        what: The bytes are of.
        limits: `image_bytes` is checked before base64 is decoded.

    Raises:
        InputError: Neither of both, or too long.
    """
    label = f"encoded bytes in {where}"
    if isinstance(value, bytes | bytearray | memoryview):
        limits.check("image_bytes", len(value), label)
        return bytes(value)
    if isinstance(value, str):
        limits.check("image_bytes", len(value) // 4 * 3 - value[-2:].count("="), label)
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"expected base64 of {what} bytes in {where}, got other text: {error}") from error
    nothing = value is None or (isinstance(value, float) and math.isnan(value))  # null in JSON becomes either
    came = "nothing" if nothing else type(value).__name__
    raise InputError(f"expected {what} bytes or base64 in {where}, got {came}")
