"""A fully connected CRF, cut off at a local window: probabilities that follow the image's edges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smp_ensemble.exceptions import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.ensembling.postprocessing import Crf
    from smp_ensemble.typing import Mode

    Place = tuple[slice, slice]

TILE = 512
"""Side of the tiles, in pixels, that large images are cut into."""

CACHE_BYTES = 256 * 2**20
"""Up to this size the strengths of a tile's pairs are kept; beyond, each update computes them anew."""

_TINY = 1e-7  # a probability of 0 would be infinitely certain
_RGB_BANDS = 3


def refine(
    image: npt.NDArray[Any],
    probabilities: npt.NDArray[np.float32],
    mode: Mode,
    crf: Crf,
    *,
    device: str | torch.device = "cpu",
) -> npt.NDArray[np.float32]:
    """Mean-field inference in a CRF whose unary terms are `-log p`.

    Each update sets, for all pixels i at once, with Potts compatibility,

        Q_i(l)  ~  p_i(l) exp( sum over j of (w_pos k_pos(i, j) + w_bil k_bil(i, j)) Q_j(l) )
        k_pos = exp(-|x_i - x_j|^2 / 2 s_pos^2)
        k_bil = exp(-|x_i - x_j|^2 / 2 s_bil^2 - |c_i - c_j|^2 / 2 s_col^2)

    where j runs over the other pixels of the window around i, x are pixels and c colours. Kernels are normalised
    symmetrically, `k(i, j) / sqrt(n_i n_j)` with `n_i` the sum of `k(i, j)` over the window, i itself included.

    Binary mode is a CRF of two classes, background and foreground; in multilabel mode each channel is one of its own.
    It pulls probabilities away from 1/2 where neighbours agree: a threshold far from 1/2 is to be chosen anew.

    Colours are grey levels 0..255. uint8 is taken as it is; each band of another type is stretched so that its 2nd and
    98th percentile are 0 and 255, and cut off there. `|c_i - c_j|^2` is the mean over bands, times 3: RGB is as in the
    paper, and `colour_sigma` means the same for any number of bands.

    Memory beyond the image and the result is that of one tile: about `4 (5 C + 4 K + 10)` bytes a pixel, and at most
    `CACHE_BYTES`. Tiles overlap by as much as pixels can hear of each other, so that cutting changes nothing. Time
    grows with pixels, `window^2` and `iterations`.

    Args:
        image: Shape `(H, W, C)`, raw.
        probabilities: Shape `(K, H, W)`.
        mode: What the K channels are.
        crf: Settings.
        device: Where to compute.

    Returns:
        float32, shape `(K, H, W)`; sums to 1 over K in multiclass mode.

    Raises:
        InputError: Image and probabilities have different sizes.

    References:
        Kraehenbuehl and Koltun, NeurIPS 2011, arXiv:1210.5644; Teichmann and Cipolla, arXiv:1805.04777.
    """
    if image.shape[:2] != probabilities.shape[1:]:
        raise InputError(
            f"expected an image (H, W, C) of the size of its probabilities (K, H, W), got {image.shape} and "
            f"{probabilities.shape}"
        )
    low, span = _range(image)
    height, width = image.shape[:2]
    halo = (crf.iterations + 1) * (crf.window // 2)  # an update hears one radius away, and so do the kernels' sums
    refined = np.empty(probabilities.shape, dtype=np.float32)
    for rows, tall, inner_rows in _tiles(height, halo):
        for columns, wide, inner_columns in _tiles(width, halo):
            levels = 255 * ((image[tall, wide] - low) / span).clip(0, 1)
            colours = levels.astype(np.float32) * np.float32(math.sqrt(_RGB_BANDS / image.shape[2]) / crf.colour_sigma)
            with torch.inference_mode():
                pairs = _Pairs(torch.from_numpy(colours.transpose(2, 0, 1).copy()).to(device), crf)
                chances = torch.from_numpy(probabilities[:, tall, wide].astype(np.float32)).to(device)
                tile = _mean_field(chances, pairs, mode, crf.iterations)
            refined[:, rows, columns] = tile[:, inner_rows, inner_columns].cpu().numpy()
    return refined


def _range(image: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The value of each band `(C,)` that becomes grey level 0, and how far above it 255 is."""
    if image.dtype == np.uint8:
        return np.zeros(image.shape[2]), np.full(image.shape[2], 255.0)
    low, high = np.percentile(image, (2, 98), axis=(0, 1))
    return low, np.maximum(high - low, 1e-6)


def _tiles(length: int, halo: int) -> Iterator[tuple[slice, slice, slice]]:
    """Along one side of an image: each tile, the tile with its halo, and where in the latter the former is."""
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        first = max(start - halo, 0)
        yield slice(start, stop), slice(first, min(stop + halo, length)), slice(start - first, stop - first)


def _mean_field(chances: Tensor, pairs: _Pairs, mode: Mode, iterations: int) -> Tensor:
    """Two classes need one channel: only the difference of their messages counts, and `Q_1 - Q_0 = 2 Q_1 - 1`."""
    if mode == "multiclass":
        unary = chances.clamp_min(_TINY).log()
        state = unary.softmax(dim=0)
    else:
        unary = chances.logit(eps=_TINY)
        state = unary.sigmoid()
    for _ in range(iterations):
        votes = state if mode == "multiclass" else 2 * state - 1
        total = unary.clone()
        for here, there, strength in pairs:
            total[:, *here].addcmul_(strength, votes[:, *there])
            total[:, *there].addcmul_(strength, votes[:, *here])
        state = total.softmax(dim=0) if mode == "multiclass" else total.sigmoid()
    return state


class _Pairs:
    """All pairs of pixels within a window, by offset: two views of the image, and how strongly their pixels couple."""

    def __init__(self, features: Tensor, crf: Crf) -> None:
        self._features = features
        self._crf = crf
        height, width = features.shape[1:]
        self._offsets = [*_offsets(height, width, crf.window // 2)]
        position, bilateral = (torch.ones(height, width, device=features.device) for _ in range(2))
        for here, there, near, alike in self._kernels():
            for total, kernel in ((position, near), (bilateral, alike)):
                total[here] += kernel
                total[there] += kernel
        self._position, self._bilateral = position.rsqrt(), bilateral.rsqrt()
        fits = len(self._offsets) * height * width * features.element_size() <= CACHE_BYTES
        self._kept = [*self._strengths()] if fits else None

    def __iter__(self) -> Iterator[tuple[Place, Place, Tensor]]:
        return iter(self._kept) if self._kept is not None else self._strengths()

    def _kernels(self) -> Iterator[tuple[Place, Place, float, Tensor]]:
        """For each offset both views, the position kernel, and the bilateral kernel of each pair."""
        for (down, right), here, there in self._offsets:
            distance = down**2 + right**2
            near = math.exp(-distance / (2 * self._crf.position_sigma**2))
            difference = (self._features[:, *here] - self._features[:, *there]).square_().sum(dim=0)
            alike = difference.add_(distance / self._crf.bilateral_sigma**2).mul_(-0.5).exp_()
            yield here, there, near, alike

    def _strengths(self) -> Iterator[tuple[Place, Place, Tensor]]:
        position, bilateral = self._position, self._bilateral
        for here, there, near, alike in self._kernels():
            strength = alike.mul_(bilateral[here]).mul_(bilateral[there]).mul_(self._crf.bilateral_weight)
            strength.add_(position[here] * position[there], alpha=self._crf.position_weight * near)
            yield here, there, strength


def _offsets(height: int, width: int, radius: int) -> Iterator[tuple[tuple[int, int], Place, Place]]:
    """Half of a window's offsets, as the others are the same pairs: each with the views of both pixels."""
    for down in range(min(radius, height - 1) + 1):
        for right in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if (down, right) > (0, 0):
                left, shift = max(-right, 0), max(right, 0)
                here = slice(0, height - down), slice(left, width - shift)
                there = slice(down, height), slice(shift, width - left)
                yield (down, right), here, there
