"""Where an image or a mask comes from: small frozen values that read on demand, in any process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from smp_ensemble.data import images, rle
from smp_ensemble.exceptions import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DIGEST_LENGTH = 32


class ImageSource(Protocol):
    """An image that can be read."""

    def read(self) -> npt.NDArray[Any]:
        """Pixels, shape `(H, W, C)`."""
        ...

    def read_with_digest(self) -> tuple[npt.NDArray[Any], str]:
        """Pixels, and the digest of the stored image: of the file's bytes, or of the pixels where there is no file."""
        ...


class MaskSource(Protocol):
    """A mask that can be read."""

    def read(self) -> npt.NDArray[np.uint8]:
        """Class ids, shape `(H, W)`; multilabel 0, 1 and 255, shape `(H, W, K)`."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> npt.NDArray[Any]:
        """Pixels, shape `(H, W, C)`."""
        return images.read_image(self.path)

    def read_with_digest(self) -> tuple[npt.NDArray[Any], str]:
        """Pixels, and the digest of the file's bytes."""
        content = images.read_bytes(self.path)
        return images.decode_image(content, str(self.path)), digest_of(content)


@dataclass(frozen=True)
class MaskFile:
    """A mask file of class ids, some of which stand for others.

    Attributes:
        path: One band of uint8 ids.
        replaced: Pairs of the id in the file and the id it stands for: `((0, 255),)` ignores pixels of id 0.
    """

    path: Path
    replaced: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> npt.NDArray[np.uint8]:
        """Class ids, shape `(H, W)`."""
        mask = images.read_mask(self.path)
        if not self.replaced:
            return mask
        table = np.arange(256, dtype=np.uint8)
        for found, meant in self.replaced:
            table[found] = meant
        return table[mask]


@dataclass(frozen=True)
class ClassMaskFiles:
    """One binary mask file for each class: the multilabel form."""

    files: tuple[MaskFile, ...]

    def __str__(self) -> str:
        return " + ".join(str(file) for file in self.files)

    def read(self) -> npt.NDArray[np.uint8]:
        """0, 1 and 255, shape `(H, W, K)`.

        Raises:
            DataError: A file cannot be read, or the files differ in size.
        """
        return stack_classes(self.files)


@dataclass(frozen=True)
class RunLengths:
    """A binary mask as a line of run lengths.

    Attributes:
        runs: `start length ...`, see `smp_ensemble.data.rle`.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        line: Where it stands, for errors: `train_mask.csv line 7 (a.jpg)`.
    """

    runs: str
    height: int
    width: int
    line: str

    def __str__(self) -> str:
        return self.line

    def read(self) -> npt.NDArray[np.uint8]:
        """0 and 1, shape `(H, W)`.

        Raises:
            DataError: The runs are malformed, or lie beyond the image.
        """
        try:
            return rle.decode(self.runs, self.height, self.width)
        except DataError as error:
            raise DataError(f"{self.line}: {error}") from error


def stack_classes(masks: Sequence[MaskSource]) -> npt.NDArray[np.uint8]:
    """One multilabel mask of a binary one `(H, W)` for each class: shape `(H, W, K)`.

    Raises:
        DataError: One cannot be read, or they differ in size.
    """
    layers = [mask.read() for mask in masks]
    for mask, layer in zip(masks, layers, strict=True):
        if layer.shape != layers[0].shape:
            raise DataError(
                f"mask {mask} is {size_text(layer.shape)}, but {masks[0]} is {size_text(layers[0].shape)}: "
                "expected one size for all classes of an image"
            )
    return np.stack(layers, axis=-1)


def digest_of(content: bytes) -> str:
    """The first 32 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]


def digest_of_array(array: npt.NDArray[Any]) -> str:
    """The digest of an array's shape, type and values."""
    header = f"{array.shape} {array.dtype.str} ".encode()
    return digest_of(header + np.ascontiguousarray(array).tobytes())


def size_text(shape: tuple[int, ...]) -> str:
    """`256x128 (height x width)`, for errors."""
    return f"{shape[0]}x{shape[1]} (height x width)"
