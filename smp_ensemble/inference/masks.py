"""From an image's probabilities to its mask: the CRF, the decision, what is rejected, and what is cleaned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smp_ensemble.inference.crf import refine
from smp_ensemble.inference.postprocess import clean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from smp_ensemble.ensembling.ensemble import Ensemble


def make_mask(
    ensemble: Ensemble, image: npt.NDArray[Any], probabilities: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """One image's mask, as everything that makes masks makes it.

    Args:
        ensemble: Says how to decide, and what is cleaned.
        image: Raw, `(H, W, C)`; only a CRF looks at it.
        probabilities: The ensemble's own, `(K, H, W)`.

    Returns:
        uint8 class ids `(H, W)`, in multilabel mode 0 or 1 in `(K, H, W)`; 255 where a pixel is rejected.
    """
    settings = ensemble.postprocess
    if settings.crf is not None:
        probabilities = refine(image, probabilities, ensemble.mode, settings.crf)
    mask: npt.NDArray[np.uint8] = ensemble.decide(torch.from_numpy(probabilities)[None])[0].numpy()
    return clean(mask, ensemble.mode, settings) if settings.active else mask
