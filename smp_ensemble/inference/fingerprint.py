"""One digest of everything in an engine that decides what it predicts: weights, settings, and how it computes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from smp_ensemble.inference.engine import Engine


def fingerprint(engine: Engine) -> str:
    """SHA-256, in hexadecimal; the same in every process, for equal weights and settings.

    Example:
        >>> from smp_ensemble.ensembling.ensemble import Ensemble
        >>> from smp_ensemble.inference.engine import Engine
        >>> ensemble = Ensemble([torch.nn.Conv2d(3, 1, 1)], mode="binary")
        >>> fingerprint(Engine(ensemble, "cpu")) == fingerprint(Engine(ensemble, "cpu", views="flips"))
        False
    """
    ensemble = engine.ensemble
    settings = {
        "mode": ensemble.mode,
        "combiner": ensemble.combiner,
        "weights": ensemble.weights,
        "temperature": ensemble.temperature,
        "threshold": ensemble.threshold,
        "reject": ensemble.reject,
        "postprocess": ensemble.postprocess.to_dict(),
        "class_names": ensemble.class_names,
        "views": engine.views,
        "passes": engine.passes,
        "adaptive": ensemble.adaptive.to_dict() if engine.adaptive and ensemble.adaptive is not None else None,
        "precision": engine.precision,
        "device": engine.device.type,
        "torch": torch.__version__,
        "networks": str(ensemble.members),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted({**ensemble.members.state_dict(), **ensemble.state}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    content: memoryview = flat.view(torch.uint8).numpy().data
    return content
