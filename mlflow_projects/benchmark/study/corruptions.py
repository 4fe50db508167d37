"""Test images as bad cameras, weather and compression leave them; the same for every system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def make_corruptions() -> dict[str, Any]:
    """One transform for each name, of medium strength."""
    import albumentations as A  # noqa: N812, TID251 (its own convention; no part of the package)

    return {
        "noise": A.GaussNoise(std_range=(0.08, 0.08), p=1.0),
        "blur": A.GaussianBlur(blur_limit=(5, 5), sigma_limit=(1.5, 1.5), p=1.0),
        "brightness": A.RandomBrightnessContrast(brightness_limit=(0.25, 0.25), contrast_limit=(-0.25, -0.25), p=1.0),
        "jpeg": A.ImageCompression(quality_range=(15, 15), p=1.0),
    }


def corrupt(images: Sequence[npt.NDArray[np.generic]], name: str) -> list[npt.NDArray[np.generic]]:
    """All images `(H, W, C)`, corrupted in the way of that name.

    Raises:
        ValueError: Unknown name.
    """
    import albumentations as A  # noqa: N812, TID251 (as above)

    known = make_corruptions()
    if name not in known:
        raise ValueError(f"unknown corruption '{name}': expected one of {', '.join(known)}")
    found = []
    for number, image in enumerate(images):
        transform = A.Compose([known[name]], seed=number)
        found.append(np.asarray(transform(image=np.asarray(image))["image"]))
    return found
