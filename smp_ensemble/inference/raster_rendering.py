"""Finished rows of a large image as a kind of prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smp_ensemble.inference.crf import refine
from smp_ensemble.inference.overlay import draw_overlay
from smp_ensemble.inference.postprocess import clean
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.ensembling.ensemble import Ensemble
    from smp_ensemble.inference.rows import Rows

CHUNK_PIXELS = 2**20
"""Pixels that are decided at once, which takes several times the memory of their probabilities."""


def render_rows(ensemble: Ensemble, kind: str, values: Tensor, rows: Rows, *, whole: bool) -> npt.NDArray[Any]:
    """Some rows of an image as a kind.

    Args:
        ensemble: Says how to decide.
        kind: `mask`, `probabilities`, `uncertainty` or `overlay`.
        values: What was predicted, `(K, rows, W)`; with uncertainty its three maps.
        rows: The same rows of the image.
        whole: They are the whole image, so that post-processing belongs here.

    Returns:
        Shape `(B, rows, W)`: masks uint8, of one plane but for multilabel mode; overlays uint8 of three; else float32.
    """
    if kind in {"probabilities", "uncertainty"}:
        maps: npt.NDArray[np.float32] = values.numpy()
        if rows.valid is not None:
            maps[:, ~rows.valid] = np.nan
        return maps
    height, width = values.shape[1:]
    step = height if whole else max(1, CHUNK_PIXELS // width)
    parts = [slice(top, top + step) for top in range(0, height, step)]
    return np.concatenate([_draw(ensemble, kind, values[:, part], rows.of(part), whole) for part in parts], axis=1)


def _draw(ensemble: Ensemble, kind: str, values: Tensor, rows: Rows, whole: bool) -> npt.NDArray[np.uint8]:
    """As `inference.masks.make_mask`, save that pixels without data are rejected before anything is cleaned."""
    image, settings = rows.pixels.transpose(1, 2, 0), ensemble.postprocess
    if whole and settings.crf is not None:
        values = torch.from_numpy(refine(image, values.numpy(), ensemble.mode, settings.crf))
    mask: npt.NDArray[np.uint8] = ensemble.decide(values[None])[0].numpy()
    if rows.valid is not None:
        mask[..., ~rows.valid] = IGNORE_INDEX
    if whole and settings.active:
        mask = clean(mask, ensemble.mode, settings)
    if kind == "overlay":
        return draw_overlay(image, mask, ensemble.mode).transpose(2, 0, 1)
    return mask if mask.ndim == 3 else mask[None]
