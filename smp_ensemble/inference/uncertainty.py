"""Maps of uncertainty for people: one number for each image, and a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smp_ensemble.metrics.uncertainty import Uncertainty

if TYPE_CHECKING:
    import numpy.typing as npt

COLUMNS = Uncertainty._fields
"""Names of the three maps, in their order."""

# Every sixteenth colour of viridis (Smith & van der Walt, CC0): equal steps look equal, in grey too.
_VIRIDIS = np.array(
    [
        (68, 1, 84), (72, 24, 106), (71, 45, 123), (66, 64, 134), (59, 82, 139), (51, 99, 141), (44, 114, 142),
        (38, 130, 142), (33, 145, 140), (31, 160, 136), (40, 174, 128), (63, 188, 115), (94, 201, 98), (132, 212, 75),
        (173, 220, 48), (216, 226, 25), (253, 231, 37),
    ],
    dtype=np.float32,
)  # fmt: skip
_VIRIDIS_AT = np.minimum(np.arange(17) * 16, 255) / 255


def image_means(maps: npt.NDArray[np.float32]) -> list[float]:
    """The mean of each of the maps `(3, H, W)` over the image, in the order of `COLUMNS`."""
    means: list[float] = maps.mean(axis=(1, 2), dtype=np.float64).tolist()
    return means


def draw_heatmap(values: npt.NDArray[Any], limit: float) -> npt.NDArray[np.uint8]:
    """One map in colours, dark for 0 and bright for `limit`.

    Args:
        values: Shape `(H, W)`; what lies outside 0..`limit` gets the colour of the nearer end.
        limit: The same for all images, so that their pictures compare.

    Returns:
        uint8 RGB, shape `(H, W, 3)`.
    """
    where = np.clip(values / limit, 0, 1)
    planes = [np.interp(where, _VIRIDIS_AT, _VIRIDIS[:, band]) for band in range(3)]
    picture: npt.NDArray[np.uint8] = np.stack(planes, axis=-1).round().astype(np.uint8)
    return picture
