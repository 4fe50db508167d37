"""Weights of members, fitted on pixels that no member was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from smp_ensemble.ensembling.temperature import EPSILON
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.typing import IGNORE_INDEX

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from smp_ensemble.typing import PixelSample


def fit_weights(sample: PixelSample) -> list[float]:
    """Weights on the simplex with the least log-loss of the weighted mean: `min -mean log(sum_m w_m p_m(truth))`.

    The problem is convex: there is one minimum. Members that add nothing get the weight 0.

    Returns:
        One weight for each member, summing to 1.

    Raises:
        ConfigError: No pixels.

    References:
        As the maximum likelihood of mixture weights: McLachlan & Peel, "Finite Mixture Models", 2000.

    Example:
        >>> from smp_ensemble.typing import PixelSample
        >>> good, bad = torch.tensor([[0.9], [0.1]]), torch.tensor([[0.4], [0.6]])
        >>> fit_weights(PixelSample(torch.stack([good, bad], dim=1), torch.tensor([1, 0]), "binary"))
        [1.0, 0.0]
    """
    from scipy.optimize import minimize

    likelihood = _of_truth(sample).double().clamp_min(EPSILON).numpy()
    if not likelihood.size:
        raise ConfigError("expected pixels to fit weights on, got none: are all of them ignored?")
    members = likelihood.shape[1]

    def loss(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        mixed = np.maximum(likelihood @ weights, EPSILON)
        return -float(np.log(mixed).mean()), -(likelihood / mixed[:, None]).mean(axis=0)

    found = minimize(
        loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * members,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    weights = np.where(found.x < 1e-6, 0.0, found.x)
    return [float(weight) for weight in weights / weights.sum()]


def _of_truth(sample: PixelSample) -> Tensor:
    """What each member gives the truth: `(pixels, M)`, in multilabel mode `(valid pixel-class pairs, M)`."""
    if sample.mode == "multiclass":
        index = sample.truth[:, None, None].expand(-1, sample.probabilities.shape[1], 1)
        return sample.probabilities.gather(2, index)[..., 0]
    truth = sample.truth.reshape(len(sample.probabilities), 1, sample.probabilities.shape[2])
    chosen = torch.where(truth == 1, sample.probabilities, 1 - sample.probabilities).transpose(1, 2)
    return chosen[truth[:, 0] != IGNORE_INDEX]
