"""Training augmentation: random scale and crop, symmetries, mild colour; a pure function of image, mask and seed.

Soft targets, which are float planes beside the mask, take the same way: they are scaled as the image is, so that planes
that follow its pixels still do, and colour leaves them alone.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest
from smp_ensemble.typing import IGNORE_INDEX

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version

import albumentations as A  # noqa: N812 - after the line above, under the name its users know it by
import cv2

if TYPE_CHECKING:
    from collections.abc import Sequence

Pixels = npt.NDArray[Any]
Arrays = dict[str, Pixels]
"""`image`, `mask` and perhaps `planes`, of one height and width."""

LARGEST_SCALE, SMALLEST_SCALE = 2.0, 0.5


@dataclass(frozen=True)
class Augmentation:
    """What happens besides the random crop.

    Attributes:
        scale: Random scale from `SMALLEST_SCALE` to `LARGEST_SCALE`.
        symmetries: Flips and 90-degree rotations, all eight alike likely.
        colour: Mild changes of brightness, contrast, saturation and hue; uint8 images of 3 bands only.
    """

    scale: bool = False
    symmetries: bool = False
    colour: bool = False


AUGMENTATIONS = {
    "none": Augmentation(),
    "flips": Augmentation(symmetries=True),
    "default": Augmentation(scale=True, symmetries=True, colour=True),
}
"""Augmentations by name."""


class TrainTransform:
    """Cuts a square, augmented crop out of an image and its mask: same seed, same crop, whatever came before.

    Attributes:
        crop_size: Height and width of what comes out, in pixels.
        fill: The pixel that fills images which are smaller than the crop; their mask is filled with 255.
        augment: The augmentation's name.
    """

    def __init__(self, crop_size: int, *, fill: Sequence[float], augment: str = "default") -> None:
        """Prepares the transform.

        Args:
            crop_size: Height and width of what comes out, in pixels.
            fill: One value for each band, in the images' units: best the data set's mean.
            augment: A name in `AUGMENTATIONS`.

        Raises:
            ConfigError: An unknown name, or a crop without pixels.
        """
        if crop_size < 1:
            raise ConfigError(f"crop size: expected at least 1 pixel, found {crop_size}")
        if augment not in AUGMENTATIONS:
            raise ConfigError(f"unknown augmentation '{augment}': {nearest(augment, AUGMENTATIONS)}")
        self.crop_size = crop_size
        self.fill = tuple(float(value) for value in fill)
        self.augment = augment
        steps = AUGMENTATIONS[augment]
        bounds = (SMALLEST_SCALE - 1, LARGEST_SCALE - 1)
        exact = cv2.INTER_NEAREST_EXACT  # plain INTER_NEAREST moves a mask by up to half a pixel
        scale = (
            [A.RandomScale(bounds, mask_interpolation=exact, area_for_downscale="image", p=1)] if steps.scale else []
        )
        symmetries = [A.D4(p=1)] if steps.symmetries else []
        near = (0.8, 1.2)
        colour = [A.ColorJitter(near, near, near, hue=(-0.03, 0.03), p=0.8)] if steps.colour else []
        like_image, like_mask = {"planes": "image"}, {"planes": "mask"}  # as a mask, they are moved and never coloured
        self._scale = A.Compose(scale, additional_targets=like_image) if scale else None
        self._finish = A.Compose(symmetries, additional_targets=like_mask) if symmetries else None
        finish_rgb = symmetries + colour
        self._finish_rgb = A.Compose(finish_rgb, additional_targets=like_mask) if finish_rgb else None

    def __call__(self, image: Pixels, mask: Pixels, seed: int) -> tuple[Pixels, Pixels]:
        """The crop that belongs to `seed`.

        Args:
            image: Shape `(H, W, C)`; uint8, uint16, int16 or float32.
            mask: uint8, shape `(H, W)` or `(H, W, K)`.
            seed: Any integer from 0.

        Returns:
            Image and mask of `crop_size` by `crop_size` pixels, in the types that came.

        Raises:
            ConfigError: The image has not one band for each value of `fill`.
        """
        found = self._run({"image": image, "mask": mask}, seed)
        return found["image"], found["mask"]

    def with_planes(self, image: Pixels, mask: Pixels, planes: Pixels, seed: int) -> tuple[Pixels, Pixels, Pixels]:
        """The crop that belongs to `seed`, with the same crop of soft targets.

        Args:
            image: Shape `(H, W, C)`, as for a call.
            mask: uint8, shape `(H, W)` or `(H, W, K)`.
            planes: float32, shape `(H, W, K)`.
            seed: Any integer from 0; image and mask are those of a call with it.

        Returns:
            Image, mask, and the planes, which are NaN where the image was filled up.

        Raises:
            ConfigError: The image has not one band for each value of `fill`, or the planes have another size.
        """
        if planes.ndim != 3 or planes.shape[:2] != image.shape[:2]:
            raise ConfigError(f"expected planes of shape {image.shape[:2]} and K, found {planes.shape}")
        found = self._run({"image": image, "mask": mask, "planes": planes}, seed)
        return found["image"], found["mask"], found["planes"]

    def _run(self, arrays: Arrays, seed: int) -> Arrays:
        image = arrays["image"]
        if image.shape[2] != len(self.fill):
            raise ConfigError(f"fill: expected one value for each of {image.shape[2]} bands, found {len(self.fill)}")
        generator = np.random.default_rng(seed)
        # Compose.set_random_seed would give every step its own copy of one generator: all would draw the same numbers.
        generators = generator, random.Random(seed)  # noqa: S311 - augmentation, not cryptography
        if self._scale is not None:
            enough = round(self.crop_size / SMALLEST_SCALE)  # the rest would be scaled only to be cut off
            arrays = _apply(self._scale, _crop(arrays, enough, generator), generators)
        arrays = self._pad(_crop(arrays, self.crop_size, generator), generator)
        rgb = arrays["image"].shape[2] == 3 and arrays["image"].dtype == np.uint8
        finish = self._finish_rgb if rgb else self._finish
        return arrays if finish is None else _apply(finish, arrays, generators)

    def _pad(self, arrays: Arrays, generator: np.random.Generator) -> Arrays:
        """Fills up to the crop size, with the image at a random place."""
        height, width = arrays["mask"].shape[:2]
        missing = self.crop_size - height, self.crop_size - width
        if missing == (0, 0):
            return arrays
        top, left = (int(generator.integers(size + 1)) for size in missing)
        inside = slice(top, top + height), slice(left, left + width)
        is_float = arrays["image"].dtype.kind == "f"
        fills = {
            "image": np.array(self.fill) if is_float else np.rint(self.fill),
            "mask": IGNORE_INDEX,
            "planes": np.nan,  # nobody said anything about these pixels
        }
        padded = {}
        for name, array in arrays.items():
            padded[name] = np.empty((self.crop_size, self.crop_size, *array.shape[2:]), dtype=array.dtype)
            padded[name][:] = fills[name]
            padded[name][inside] = array
        return padded


def _crop(arrays: Arrays, size: int, generator: np.random.Generator) -> Arrays:
    """A random window of at most `size` by `size` pixels."""
    height, width = arrays["mask"].shape[:2]
    top = int(generator.integers(max(height - size, 0) + 1))
    left = int(generator.integers(max(width - size, 0) + 1))
    window = slice(top, top + size), slice(left, left + size)
    return {name: array[window] for name, array in arrays.items()}


def _apply(steps: A.Compose, arrays: Arrays, generators: tuple[np.random.Generator, random.Random]) -> Arrays:
    steps.set_random_state(*generators)
    result = steps(**{name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return {name: result[name] for name in arrays}
