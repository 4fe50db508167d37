"""Probabilities in two bytes each: the logit, clipped to 16 either way, in 65536 steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from smp_ensemble.typing import Mode

LIMIT = 16.0
STEPS = 65535
LARGEST_ERROR = 1e-4
"""Of a decoded probability: 6.2e-5 in binary and multilabel mode (half a step of 32/65535, at p = 0.5), 9.5e-5 where
classes are scaled to sum to 1 again."""

_LEAST = 1 / (1 + np.exp(LIMIT))


def _table() -> npt.NDArray[np.float32]:
    logits = np.arange(STEPS + 1) * (2 * LIMIT / STEPS) - LIMIT
    return np.asarray(1 / (1 + np.exp(-logits)), np.float32)


_PROBABILITIES = _table()


def encode(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """Codes of probabilities, of any shape.

    Example:
        >>> encode(np.array([0.0, 0.5, 1.0])).tolist()
        [0, 32768, 65535]
    """
    inside = np.clip(probabilities.astype(np.float64), _LEAST, 1 - _LEAST)
    logits = np.log(inside / (1 - inside))
    codes: npt.NDArray[np.uint16] = np.rint((logits + LIMIT) * (STEPS / (2 * LIMIT))).astype(np.uint16)
    return codes


def decode(codes: npt.NDArray[np.uint16], mode: Mode) -> npt.NDArray[np.float32]:
    """Probabilities `(K, ...)`, float32; in multiclass mode they sum to 1 over K."""
    found = _PROBABILITIES[codes]
    if mode == "multiclass":
        found /= found.sum(axis=0, keepdims=True)
    return found
