"""Masks made visible: one colour for each class, laid over the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy.typing as npt

    from smp_ensemble.typing import Mode

# Okabe and Ito's palette: told apart with any colour vision. Binary masks use its first entry.
PALETTE = np.array(
    [
        (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
        (0, 114, 178), (213, 94, 0), (204, 121, 167), (120, 120, 120),
    ],
    dtype=np.uint8,
)  # fmt: skip


def colour(index: int) -> npt.NDArray[np.uint8]:
    """The RGB colour of a class; colours repeat after the palette's end."""
    chosen: npt.NDArray[np.uint8] = PALETTE[index % len(PALETTE)]
    return chosen


def to_rgb(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """An image `(H, W, C)` of any bands and type as uint8 RGB: its first three bands, or its only one as grey."""
    bands: npt.NDArray[Any] = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    if bands.dtype == np.uint8:
        return bands
    low, high = np.percentile(bands, (2, 98))
    stretched: npt.NDArray[Any] = 255 * np.clip((bands - low) / max(float(high - low), 1e-6), 0, 1)
    return stretched.astype(np.uint8)


def draw_overlay(
    image: npt.NDArray[Any], mask: npt.NDArray[np.uint8], mode: Mode, opacity: float = 0.45
) -> npt.NDArray[np.uint8]:
    """The image with the mask's classes in colour over it.

    Args:
        image: Shape `(H, W, C)`, raw.
        mask: Class ids `(H, W)`, or 0 and 1 in `(K, H, W)` in multilabel mode. In binary mode 0 stays uncoloured.
        mode: Says how to read the mask.
        opacity: Of the colours, 0..1.

    Returns:
        uint8 RGB, shape `(H, W, 3)`.
    """
    picture = to_rgb(image).astype(np.float32)
    if mode == "multilabel":
        layers = [(index, plane == 1) for index, plane in enumerate(mask)]
    elif mode == "binary":
        layers = [(0, mask == 1)]
    else:
        layers = [(int(index), mask == index) for index in np.unique(mask) if index != IGNORE_INDEX]
    for index, where in layers:
        picture[where] = (1 - opacity) * picture[where] + opacity * colour(index)
    return picture.round().astype(np.uint8)
